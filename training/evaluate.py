"""Measure a checkpoint on the sentences that were kept out of its training.

    python -m training.evaluate demo_voice --report build/training/report.json

Every sentence is spoken with default sampling and a fixed seed, in each voice of the checkpoint's
`voices/`. The demo's voice also speaks in the non-streaming layout. `training.listening` transcribes the
speech. Then each voice is cloned from three seconds of the teacher, and live text is compared with whole
text. If flite is installed, the teacher is measured too. `--codec`, the folder of a trained codec, adds
that codec's reconstruction of the teacher's speech.
"""

from __future__ import annotations

import argparse
import json
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from qwen_megakernel.codec.decoder import CodecStream
from qwen_megakernel.config import HOP, SAMPLE_RATE, GenerationParams
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.prove import paths, speech
from qwen_megakernel.prove.utterances import Utterance
from qwen_megakernel.tools.demo import VOICE
from qwen_megakernel.tts_model import TTSDecoder
from qwen_megakernel.turn import Audio, Finished, TurnEvent
from training.codec_model import ENCODER_MARGIN, TrainedCodec
from training.listening import Listener, word_errors
from training.sentences import heldout
from training.teacher import VOICES, Teacher
from training.train_codec import load_codec

CLIP_S = 3
"""Seconds of the teacher's speech from which a voice is cloned."""
ALONE = 10
"""Sentences spoken one at a time, for the real-time factor."""
LIVE = 6
"""Sentences that are also fed word by word."""


@dataclass
class Score:
    """How well some sentences were understood."""

    errors: int = 0
    words: int = 0
    worst: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    misheard: list[str] = field(default_factory=list)

    def add(self, said: str, heard: str) -> None:
        """Add one sentence."""
        errors, count = word_errors(said, heard)
        self.errors, self.words = self.errors + errors, self.words + count
        self.worst = max(self.worst, errors / count)
        if errors:
            self.misheard.append(f"{errors}/{count} {said} | {heard}")

    def summary(self) -> dict[str, object]:
        """Rates, for the report."""
        found: dict[str, object] = {
            "wer": round(self.errors / max(self.words, 1), 4), "worst": round(self.worst, 3),
        }  # fmt: skip
        if self.reasons:
            found |= {"ends": dict(self.reasons)}
        return found


def speak(
    tts: TTSDecoder,
    pieces: Iterable[str],
    voice: str | Voice,
    seed: int,
    *,
    streaming: bool = True,
) -> tuple[np.ndarray, Finished]:
    """Speak a text given in pieces. Returns samples float32 [n] at 24 kHz, and how the turn ended."""
    events: queue.SimpleQueue[TurnEvent] = queue.SimpleQueue()
    turn = tts.open_turn(
        sink=events.put, voice=voice, streaming=streaming, params=GenerationParams(seed=seed)
    )
    for piece in pieces:
        turn.append(piece)
    turn.end()
    return _collect(events)


def _collect(events: queue.SimpleQueue[TurnEvent]) -> tuple[np.ndarray, Finished]:
    chunks = [np.zeros(0, np.float32)]
    while not isinstance(event := events.get(), Finished):
        if isinstance(event, Audio):
            chunks.append(event.samples)
    return np.concatenate(chunks), event


def score_synthesis(
    tts: TTSDecoder, listener: Listener, sentences: list[str], voice: str, *, streaming: bool
) -> Score:
    """Speak all sentences and transcribe them."""
    score = Score()
    said = [Utterance(t, voice, seed, "auto", streaming) for seed, t in enumerate(sentences)]
    for text, spoken in zip(sentences, speech.speak(tts, said, tts.voices), strict=True):
        score.reasons[spoken.reason] += 1
        score.add(text, listener.write_down(spoken.samples))
    return score


def score_teacher(teacher: Teacher, listener: Listener, sentences: list[str], voice: str) -> Score:
    """Score the teacher's own speech."""
    score = Score()
    for text in sentences:
        score.add(text, listener.write_down(teacher.say(text, voice)))
    return score


@torch.no_grad()
def score_codec(
    codec: TrainedCodec, teacher: Teacher, listener: Listener, sentences: list[str], voice: str
) -> Score:
    """Score the teacher's speech after the codec. No talker can do better."""
    score = Score()
    for text in sentences:
        audio = torch.from_numpy(teacher.say(text, voice))[None]
        margin = ENCODER_MARGIN * HOP
        codes = codec.encode(F.pad(audio, (margin, margin)))[:, ENCODER_MARGIN:-ENCODER_MARGIN]
        made = CodecStream(codec.decoder, 1).decode([0], codes)[0]
        score.add(text, listener.write_down(made.numpy()))
    return score


def likeness(tts: TTSDecoder, teacher: Teacher, sentences: list[str]) -> dict[str, dict[str, float]]:
    """Clone each voice from a clip. Returns the cosines of its speech to a clip of every voice."""
    encoder = tts._voice_cloner().speaker_encoder

    def embedded(audio: np.ndarray) -> torch.Tensor:
        return encoder.embed(torch.from_numpy(audio))

    clips = {}
    for voice in VOICES:
        audio = np.concatenate([teacher.say(text, voice) for text in sentences[:3]])
        clips[voice] = embedded(audio[: CLIP_S * SAMPLE_RATE])
    table = {}
    for voice, clip in clips.items():
        cloned = Voice.x_vector(clip)
        said = [speak(tts, [text], cloned, seed)[0] for seed, text in enumerate(sentences[-3:])]
        spoken = embedded(np.concatenate(said))
        table[voice] = {
            other: round(float(F.cosine_similarity(spoken, clips[other], dim=0)), 3) for other in VOICES
        }
    return table


def live_is_whole(tts: TTSDecoder, sentences: list[str], voice: str) -> bool:
    """Whether sentences fed word by word give the same samples, bit for bit, as whole sentences."""
    for seed, text in enumerate(sentences):
        ways = paths.Ways(tts, Utterance(text, voice, seed, "auto"), tts.voices[voice])
        if paths.difference(ways.turn(paths.words(text))(), ways.turn([text])()):
            return False
    return True


def evaluate(
    folder: Path, show: Callable[[str], None], codec: TrainedCodec | None = None
) -> dict[str, object]:
    """Do all measurements. Returns the report. `show` is told of each result."""
    sentences, listener = heldout(), Listener()
    report: dict[str, object] = {"sentences": len(sentences)}

    def note(name: str, score: Score) -> None:
        report[name] = score.summary() | {"misheard": score.misheard}
        show(f"{name}: {json.dumps(score.summary())}")

    began = time.monotonic()
    with TTSDecoder.load(folder, num_slots=8) as tts:
        report["load_s"] = round(time.monotonic() - began, 2)
        tts.load_voices(folder / "voices")
        tts.warm_up()
        alone = [speak(tts, [text], VOICE, 0)[1].rtf for text in sentences[-ALONE:]]
        report["rtf"] = round(float(np.median(alone)), 3)
        for voice in VOICES:
            note(voice, score_synthesis(tts, listener, sentences, voice, streaming=True))
        score = score_synthesis(tts, listener, sentences, VOICE, streaming=False)
        note(f"{VOICE}, non-streaming", score)
        report["live text is whole text"] = live_is_whole(tts, sentences[-LIVE:], VOICE)
        try:
            teacher = Teacher()
        except OSError as error:
            show(f"the teacher is not heard: {error}")
            return report
        report["cosines"] = likeness(tts, teacher, sentences)
        for voice in VOICES:
            note(f"teacher, {voice}", score_teacher(teacher, listener, sentences, voice))
            if codec:
                note(f"codec, {voice}", score_codec(codec, teacher, listener, sentences, voice))
    return report


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--codec", type=Path, default=None, help="folder of a trained codec")
    parser.add_argument("--report", type=Path, default=None, help="where to write all as JSON")
    args = parser.parse_args()
    codec = load_codec(args.codec).eval() if args.codec else None
    report = evaluate(args.folder, lambda line: print(line, flush=True), codec)
    shown = {key: value for key, value in report.items() if not isinstance(value, dict)}
    print(json.dumps(shown | {"cosines": report.get("cosines")}, indent=2))
    if args.report:
        args.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
