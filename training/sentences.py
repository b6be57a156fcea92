"""What the teacher reads: WordNet's examples, verses, dialogue, and ordinary words in plain sentences.

    python -m training.sentences build/training/sentences.txt --round 0

Each round has the same natural sentences in another order, so that other voices read them. Each round
also has its own ordinary sentences.

Needs the Debian packages `wordnet-base` (WordNet licence) and `bible-kjv` (its text is in the public
domain). Nothing of `qwen_megakernel/prove/sentences.txt` is among the sentences.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qwen_megakernel.prove import utterances
from training import dialogue, ordinary

BOOKS = (
    "genesis",
    "exodus",
    "ruth",
    "esther",
    "job",
    "psalms",
    "proverbs",
    "mark",
    "luke",
    "john",
    "acts",
)
MORE = 60_000
"""Natural sentences beyond the first draw. With half as many, the talker learnt them by heart."""
ORDINARY = 130_000
"""Sentences of ordinary words in a round."""
MAX_CHARS = 130
"""About ten seconds of speech."""
SEED = 6

_SPEAKABLE = re.compile(r"[A-Za-z0-9 ,.'!?;:-]+")


def heldout() -> list[str]:
    """The sixty sentences that measure the model."""
    return utterances.sentences()


def wordnet() -> Iterator[tuple[str, str]]:
    """Examples and definitions of WordNet, as ("example" or "definition", text)."""
    for path in sorted(ordinary.WORDNET.glob("data.*")):
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
            if line.startswith("  "):  # the licence
                continue
            gloss = line.partition(" | ")[2]
            for example in re.findall(r'"([^"]+)"', gloss):
                yield "example", example
            yield "definition", re.sub(r'"[^"]*"|\([^)]*\)', "", gloss).split(";")[0]


def verses() -> Iterator[str]:
    """Verses of the King James Bible, cut at colons and semicolons."""
    for book in BOOKS:
        shown = subprocess.run(
            ["bible", "-f", f"{book}1:1-150:1"], capture_output=True, text=True
        ).stdout
        for line in shown.splitlines():
            text = re.sub(r"^\S+\d+:\d+\s+", "", line)
            yield from re.split(r"[:;.?!]", text)


def _tidy(text: str) -> str | None:
    """A sentence with a capital and an end, or None if it cannot be read out well."""
    text = " ".join(text.replace("`", "'").replace("--", ", ").split()).strip(" ,;:-'")
    if not _SPEAKABLE.fullmatch(text) or ".." in text or " " not in text:
        return None
    if len(text) > MAX_CHARS:
        return None
    if sum(c.isupper() for c in text) > 1 + text.count(" "):  # abbreviations
        return None
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def key(text: str) -> str:
    """What two sentences have in common that sound alike."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def collect(rng: random.Random) -> list[str]:
    """All sentences once, in random order."""
    words = list(wordnet())
    definitions = [text for kind, text in words if kind == "definition"]
    lines = [text for text in verses() if 12 <= len(text.strip()) <= 90]
    sources = [
        [text for kind, text in words if kind == "example"],
        rng.sample(definitions, 9_000),
        rng.sample(lines, min(len(lines), 5_000)),
        dialogue.sentences(16_000, rng),
    ]
    unseen = {key(text) for text in heldout()}
    kept: dict[str, str] = {}
    for text in (tidy for source in sources for raw in source if (tidy := _tidy(raw))):
        if key(text) not in unseen:
            kept.setdefault(key(text), text)
    chosen = list(kept.values())
    rng.shuffle(chosen)
    return _with_pairs(chosen, rng)


def more(rng: random.Random, known: list[str]) -> list[str]:
    """Further sentences that `collect` left out. Each comes once, and none is among `known`."""
    definitions = [text for kind, text in wordnet() if kind == "definition"]
    lines = [text for text in verses() if 12 <= len(text.strip()) <= 90]
    taken = {key(text) for text in (*known, *heldout())}
    kept: dict[str, str] = {}
    for raw in (*definitions, *lines, *dialogue.sentences(30_000, rng)):
        text = _tidy(raw)
        if text and len(text) <= 70 and key(text) not in taken:
            kept.setdefault(key(text), text)
    chosen = list(kept.values())
    rng.shuffle(chosen)
    return chosen[:MORE]


def _with_pairs(chosen: list[str], rng: random.Random) -> list[str]:
    """Join some neighbours, so that there are longer texts too. The rest stays as it is."""
    joined: list[str] = []
    for text in chosen:
        if joined and rng.random() < 0.12 and len(joined[-1]) + len(text) < MAX_CHARS:
            joined[-1] += " " + text
        else:
            joined.append(text)
    return joined


def natural() -> list[str]:
    """The first draw, from which the tokenizer is made, and the sentences beyond it. None repeats."""
    first = first_draw()
    return first + more(random.Random(SEED + 1), first)


def first_draw() -> list[str]:
    """Natural sentences of every kind."""
    return collect(random.Random(SEED))


def of_round(number: int) -> list[str]:
    """All sentences of a round, shuffled."""
    rng = random.Random(1_000 + number)
    chosen = natural()
    taken = {key(text) for text in (*chosen, *heldout())}
    for raw in ordinary.sentences(ORDINARY, rng):
        text = _tidy(raw)
        if text and key(text) not in taken:
            taken.add(key(text))
            chosen.append(text)
    rng.shuffle(chosen)
    return chosen


def main() -> None:
    """Write one sentence a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--round", type=int, default=0)
    args = parser.parse_args()
    out: Path = args.out
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen = of_round(args.round)
    out.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    print(f"{out}: {len(chosen)} sentences, {sum(map(len, chosen)) / len(chosen):.0f} characters each")


if __name__ == "__main__":
    main()
