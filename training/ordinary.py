"""Plain sentences of ordinary words, from which a small talker learns how English is pronounced.

The words are those of WordNet that occur at least a few times in its own glosses and tagged texts. The
sentences are more or less grammatical and mean nothing. Needs the Debian package `wordnet-base`.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from training.dialogue import with_articles

WORDNET = Path("/usr/share/wordnet")
KINDS = ("noun", "verb", "adj", "adv")
FLATNESS = 0.5
"""A word is drawn in proportion to its count to this power, so that rare words come often enough."""
_TEMPLATES = Path(__file__).with_name("ordinary_templates.txt")
_WORD = re.compile(r"[a-z]{2,12}")
_LEAST = 4
"""A word with this many occurrences counts as ordinary."""
_OBJECT_FRAMES = {8, 9, 10, 11, 20, 21}
"""WordNet's verb frames with a direct object. Frames without any object are 1 to 4 and 22."""
_ALONE_FRAMES = {1, 2, 3, 4, 22}
_DOUBLING = re.compile(r"[^aeiou]*[aeiou][bdgmnprt]")
"""Short verbs that double their last letter."""
_CLOSED = {
    "p": "in|on|at|by|near|under|over|behind|beside|below|above|across|along|around|against|beyond|"
    "through|between|toward|inside|outside|without|with|from|off|past|before|after|of|for|into|onto",
    "d": "the|a|his|her|my|your|our|their|its|this|that|each|every|some|any|one",
    "W": "I|you|he|she|we|they|the man|the woman|the boy|the girl|the child|somebody|nobody|people|"
    "the old man|my brother|my sister|his mother|her father|a friend|the neighbours|the children",
    "num": "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    "sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|"
    "a hundred|a thousand|several|many|few",
}


@dataclass
class Words:
    """Ordinary words, and their irregular forms."""

    pools: dict[str, dict[str, float]]
    """Kind of word -> word -> weight. Kinds are `noun`, `adj`, `adv`, and the verbs `object` and
    `alone`."""
    irregular: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """`noun` or `verb` -> base -> its irregular forms."""

    def plural(self, noun: str) -> str:
        """The plural of a noun."""
        if forms := self.irregular["noun"].get(noun):
            return forms[0]
        return noun if noun.endswith("s") else _with_s(noun)

    def past(self, verb: str, rng: random.Random) -> str:
        """A verb's past tense or participle. WordNet does not say which of them an irregular form is."""
        forms = [form for form in self.irregular["verb"].get(verb, []) if not form.endswith("ing")]
        return rng.choice(forms) if forms else _doubled(verb, "ed")

    def gerund(self, verb: str) -> str:
        """The form of a verb in -ing."""
        forms = [form for form in self.irregular["verb"].get(verb, []) if form.endswith("ing")]
        if forms:
            return forms[0]
        if verb.endswith("e") and not verb.endswith(("ee", "ye", "oe", "ie")):
            return verb[:-1] + "ing"
        return _doubled(verb, "ing")


def _with_s(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + "s"


def _doubled(verb: str, ending: str) -> str:
    if ending == "ed" and verb.endswith("e"):
        return verb + "d"
    if ending == "ed" and re.search(r"[^aeiou]y$", verb):
        return verb[:-1] + "ied"
    if _DOUBLING.fullmatch(verb):
        return verb + verb[-1] + ending
    return verb + ending


def _occurrences() -> Counter[str]:
    """How often each word form occurs in glosses, and each lemma in the texts that WordNet tagged."""
    counts: Counter[str] = Counter()
    for kind in KINDS:
        for line in (WORDNET / f"data.{kind}").read_text("utf-8", "ignore").splitlines():
            if not line.startswith("  "):  # the licence
                counts.update(re.findall(r"[a-z]+", line.partition(" | ")[2]))
    for line in (WORDNET / "cntlist.rev").read_text("utf-8").splitlines():
        sense, _, count = line.split()
        counts[sense.partition("%")[0]] += int(count)
    return counts


def _lemmas(kind: str) -> Iterator[tuple[str, set[int]]]:
    """Lemmas of a kind. Verbs come with the frames of one of their senses, others with an empty set."""
    for line in (WORDNET / f"data.{kind}").read_text("utf-8", "ignore").splitlines():
        if line.startswith("  "):
            continue
        fields = line.partition(" | ")[0].split()
        number = int(fields[3], 16)
        frames = set()
        if kind == "verb":
            frames = {int(a) for mark, a in pairwise(fields) if mark == "+" and len(a) == 2}
        for index in range(number):
            yield re.sub(r"\(.*", "", fields[4 + 2 * index]), frames


def _irregular(kind: str) -> dict[str, list[str]]:
    forms: dict[str, list[str]] = defaultdict(list)
    for line in (WORDNET / f"{kind}.exc").read_text("utf-8").splitlines():
        inflected, *bases = line.split()
        if _WORD.fullmatch(inflected):
            for base in bases:
                forms[base].append(inflected)
    return forms


def words() -> Words:
    """The ordinary words of the installed WordNet."""
    counts = _occurrences()
    pools: dict[str, dict[str, float]] = {name: {} for name in ("noun", "adj", "adv", "object", "alone")}
    for kind in KINDS:
        for lemma, frames in _lemmas(kind):
            if not _WORD.fullmatch(lemma) or counts[lemma] < _LEAST:
                continue
            weight = counts[lemma] ** FLATNESS
            if kind != "verb":
                pools[kind][lemma] = weight
            if frames & _OBJECT_FRAMES:
                pools["object"][lemma] = weight
            if frames & _ALONE_FRAMES:
                pools["alone"][lemma] = weight
    pools["adv"] = {word: weight for word, weight in pools["adv"].items() if word.endswith("ly")}
    return Words(pools, {kind: _irregular(kind) for kind in ("noun", "verb")})


class Writer:
    """Fills templates with words."""

    def __init__(self, found: Words, rng: random.Random) -> None:
        self._words, self._rng = found, rng
        self._templates = _TEMPLATES.read_text(encoding="utf-8").splitlines()
        self._drawn = {name: iter(()) for name in found.pools}
        self._closed = {name: options.split("|") for name, options in _CLOSED.items()}
        verb = "object"
        self._slots: dict[str, Callable[[], str]] = {
            "n": lambda: self._draw("noun"),
            "ns": lambda: found.plural(self._draw("noun")),
            "a": lambda: self._draw("adj"),
            "r": lambda: self._draw("adv"),
            "v": lambda: self._draw(verb),
            "vs": lambda: _with_s(self._draw(verb)),
            "vd": lambda: found.past(self._draw(verb), rng),
            "vn": lambda: found.past(self._draw(verb), rng),
            "vg": lambda: found.gerund(self._draw(verb)),
            "id": lambda: found.past(self._draw("alone"), rng),
        }

    def _draw(self, pool: str) -> str:
        word = next(self._drawn[pool], None)
        if word is None:
            weights = self._words.pools[pool]
            self._drawn[pool] = iter(self._rng.choices(list(weights), list(weights.values()), k=5_000))
            word = next(self._drawn[pool])
        return word

    def sentence(self) -> str:
        """One sentence, which begins with a capital."""

        def fill(slot: re.Match[str]) -> str:
            if options := self._closed.get(slot[1]):
                return self._rng.choice(options)
            return self._slots[slot[1]]()

        return with_articles(re.sub(r"\{(\w+)\}", fill, self._rng.choice(self._templates)))


def sentences(count: int, rng: random.Random) -> Iterator[str]:
    """`count` sentences, drawn with `rng`."""
    writer = Writer(words(), rng)
    for _ in range(count):
        yield writer.sentence()
