"""The utterances of `prove`: texts, voices and seeds, also in the form that the official process
takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_megakernel.prompt.voice import Voice

SENTENCES = Path(__file__).with_name("sentences.txt")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One text in one voice."""

    text: str
    voice: str
    """A name among the voices of the run."""
    seed: int = 0
    language: str = "english"
    streaming: bool = True
    """The text layout."""


def sentences() -> list[str]:
    """Sixty English sentences: forty of the Harvard lists and twenty of dialogue.

    The demonstration voice was not trained on them.
    """
    return SENTENCES.read_text(encoding="utf-8").splitlines()


def paired(texts: Sequence[str], voices: Sequence[str], count: int, language: str) -> list[Utterance]:
    """`count` utterances: each text in each voice once, then again, neighbours in different voices.

    No two have the same seed: with one seed, draws of the same frame are alike, and so are the mistakes.
    """
    found = []
    for seed in range(count):
        turn, place = divmod(seed, len(texts))
        voice = voices[(place + turn) % len(voices)]
        found.append(Utterance(texts[place], voice, seed, language))
    return found


def item(utterance: Utterance, voices: Mapping[str, Voice]) -> dict[str, Any]:
    """The utterance as `official_worker` takes it."""
    voice = voices[utterance.voice]
    embedding, codes = voice.speaker_embedding, voice.ref_codes
    return {
        "text": utterance.text,
        "language": utterance.language,
        "streaming": utterance.streaming,
        "speaker": voice.speaker,
        "embedding": None if embedding is None else embedding.tolist(),
        "ref_codes": None if codes is None else codes.tolist(),
        "ref_text": voice.ref_text,
    }


@dataclass(frozen=True, slots=True)
class ListedText:
    """A line of a list in the format of Seed-TTS-eval: `id|prompt text|prompt wav|text`."""

    name: str
    ref_text: str
    recording: Path
    text: str


def read_list(path: Path) -> list[ListedText]:
    """Read such a list; recordings are named relative to it.

    Raises:
        ValueError: a line with other than four parts, or a recording that is missing; it names the line.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.split("|")
        if len(parts) < 4:
            raise ValueError(f"{path.name}, line {number}: {len(parts)} parts, expected 4")
        name, ref_text, recording, text = (part.strip() for part in parts[:4])
        if not (path.parent / recording).is_file():
            raise ValueError(f"{path.name}, line {number}: no file {recording}")
        found.append(ListedText(name, ref_text, path.parent / recording, text))
    return found
