"""The teacher's speech: flite's voices, at 24 kHz, trimmed, with one loudness, in whole frames.

    python -m training.teacher build/training/sentences.txt build/training/speech

Writes chunks of utterances, for `read_chunk`, except those that exist already. It runs one process on
each core but one. Needs the shared libraries of the Debian package `libflite1` (search path, or
LD_LIBRARY_PATH).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
from multiprocessing import Process
from pathlib import Path

import numpy as np
import soxr

from qwen_megakernel.config import HOP, SAMPLE_RATE

VOICES = ("slt", "rms", "awb", "kal16")
SHARES = (0.24, 0.22, 0.26, 0.28)
"""Share of the speech of each voice. Voices that are harder to learn have more."""
_GAINS = {"slt": 0.56, "rms": 1.08, "awb": 0.95, "kal16": 2.40}
"""Gains that bring all voices to a root mean square of about 0.1."""
LEAD_S, TRAIL_S = 0.08, 0.12
"""Seconds of silence that are kept before and after what is louder than `_SILENCE`."""
_SILENCE = 0.01
CHUNK = 64
"""Sentences of a file."""


class _Wave(ctypes.Structure):
    """flite's `cst_wave`."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class Teacher:
    """flite in this process."""

    def __init__(self) -> None:
        """Raises `OSError` if a library is missing."""
        self._flite = _library("flite")
        self._flite.flite_init()
        self._flite.flite_text_to_wave.restype = ctypes.POINTER(_Wave)
        self._flite.flite_text_to_wave.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
        self._flite.delete_wave.argtypes = [ctypes.POINTER(_Wave)]
        for name in ("usenglish", "cmulex"):
            _library(f"flite_{name}")
        self._voices = {name: _voice(name) for name in VOICES}

    def say(self, text: str, voice: str) -> np.ndarray:
        """Read a sentence out: float32 [frames * 1920] at 24 kHz, about -20 dBFS."""
        wave = self._flite.flite_text_to_wave(text.encode("ascii", "ignore"), self._voices[voice])
        samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,))
        rate = wave.contents.sample_rate
        audio = samples.astype(np.float32) * (_GAINS[voice] / 32768)
        self._flite.delete_wave(wave)
        return _whole_frames(soxr.resample(_trim(audio, rate), rate, SAMPLE_RATE))


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(f"lib{name}.so.1", mode=ctypes.RTLD_GLOBAL)


def _voice(name: str) -> int:
    register = getattr(_library(f"flite_cmu_us_{name}"), f"register_cmu_us_{name}")
    register.restype = ctypes.c_void_p
    return register(None)


def _trim(audio: np.ndarray, rate: int) -> np.ndarray:
    loud = np.flatnonzero(np.abs(audio) > _SILENCE)
    if not len(loud):
        return audio[:0]
    first, last = loud[0] - int(LEAD_S * rate), loud[-1] + int(TRAIL_S * rate)
    return audio[max(first, 0) : last]


def _whole_frames(audio: np.ndarray) -> np.ndarray:
    return np.pad(audio.astype(np.float32), (0, -len(audio) % HOP)).clip(-1, 1)


def voice_of(index: int) -> int:
    """The number of the voice that reads the sentence of this index, among `VOICES` in their
    `SHARES`."""
    return random.Random(index).choices(range(len(VOICES)), SHARES)[0]


def _write_chunks(sentences: list[str], folder: Path, first: int, worker: int, workers: int) -> None:
    starts = range((first // CHUNK + worker) * CHUNK, len(sentences), workers * CHUNK)
    missing = [start for start in starts if not (folder / f"{start:06d}.npz").exists()]
    if not missing:
        return
    teacher = Teacher()
    for start in missing:
        indices = range(start, min(start + CHUNK, len(sentences)))
        spoken = [teacher.say(sentences[i], VOICES[voice_of(i)]) for i in indices]
        audio = (np.concatenate(spoken) * 32767).astype(np.int16)
        frames = np.array([len(one) // HOP for one in spoken], dtype=np.int32)
        partial = folder / f"{start:06d}.partial"
        with partial.open("wb") as file:
            np.savez(file, start=start, frames=frames, audio=audio)
        partial.rename(partial.with_suffix(".npz"))


def start(sentences: list[str], folder: Path, workers: int, first: int = 0) -> list[Process]:
    """Start reading the sentences out, from number `first` on. The processes end by themselves.

    Raises:
        ValueError: there are no workers.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, allowed: at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        Process(target=_write_chunks, args=(sentences, folder, first, worker, workers), daemon=True)
        for worker in range(workers)
    ]
    for process in processes:
        process.start()
    return processes


def read_chunk(path: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """Index of the first sentence, frames of each sentence (int32), samples (int16)."""
    with np.load(path) as chunk:
        return int(chunk["start"]), chunk["frames"], chunk["audio"]


def main() -> None:
    """Read all sentences out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentences", type=Path)
    parser.add_argument("out", type=Path, help="folder for the chunks")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--first", type=int, default=0, help="sentence to begin with")
    args = parser.parse_args()
    lines = args.sentences.read_text(encoding="utf-8").splitlines()
    for process in start(lines, args.out, args.workers, args.first):
        process.join()


if __name__ == "__main__":
    main()
