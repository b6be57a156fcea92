"""Everyday sentences from templates: what a voice agent says and dictionaries do not have."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

_WORDS = Path(__file__).with_name("dialogue_words.txt")
"""Each line has the name of a slot and what may stand in it."""
_TEMPLATES = Path(__file__).with_name("dialogue_templates.txt")


def sentences(count: int, rng: random.Random) -> Iterator[str]:
    """`count` sentences, drawn with `rng`. Some may repeat."""
    slots = (line.split(": ") for line in _WORDS.read_text(encoding="utf-8").splitlines())
    words = {name: options.split("|") for name, options in slots}
    templates = _TEMPLATES.read_text(encoding="utf-8").splitlines()
    for _ in range(count):
        filled = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(words[slot[1]]), rng.choice(templates))
        yield with_articles(filled)


def with_articles(text: str) -> str:
    """Begin with a capital, and use `an` before vowels."""
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)
    return text[0].upper() + text[1:]
