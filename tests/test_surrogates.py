"""Halves of surrogate pairs: two halves are joined, and a single one is replaced."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_megakernel.surrogates import SurrogateJoiner, repair
from qwen_megakernel.turn import Turn

FIRST, SECOND, FACE = "\ud83d", "\ude00", "\U0001f600"


def joined(*pieces):
    joiner = SurrogateJoiner()
    return [*map(joiner.join, pieces), joiner.end()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello.", "Hello."),
        (FACE, FACE),
        (f"a{FIRST}{SECOND}b", f"a{FACE}b"),
        (f"a{FIRST}b", "a\ufffdb"),
        (f"a{FIRST}", "a\ufffd"),
        (f"{SECOND}b", "\ufffdb"),
        (f"{SECOND}{FIRST}", "\ufffd\ufffd"),
        (f"{FIRST}{FIRST}{SECOND}", f"\ufffd{FACE}"),
    ],
)
def test_repair(text, expected):
    assert repair(text) == expected


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("Glad ", "to."), ["Glad ", "to.", ""]),
        ((f"Glad {FIRST}", f"{SECOND}."), ["Glad ", f"{FACE}.", ""]),
        ((f"Glad {FIRST}", "", f"{SECOND}."), ["Glad ", "", f"{FACE}.", ""]),
        ((f"Glad {FIRST}", "so."), ["Glad ", "\ufffdso.", ""]),
        ((f"Glad {FIRST}",), ["Glad ", "\ufffd"]),
        ((SECOND, FIRST), ["\ufffd", "", "\ufffd"]),
    ],
)
def test_halves_in_consecutive_pieces_are_joined(pieces, expected):
    assert joined(*pieces) == expected


@given(st.text(st.sampled_from(f"ab {FIRST}{SECOND}{FACE}")), st.data())
def test_any_split_gives_the_same_unicode_text(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    ends = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in pairwise(ends)]
    found = "".join(joined(*pieces))
    assert found == repair(text)
    found.encode()


def test_a_turn_takes_tokens_with_halves():
    texts = []
    feed = SimpleNamespace(
        append=lambda text: texts.append(text) or [], flush=lambda: texts.append(None) or []
    )
    turn = Turn(lambda: None, feed)
    turn.append(f"Glad {FIRST}")
    turn.append(f"{SECOND} to see")
    turn.append(f" you {FIRST}")
    turn.flush()
    turn.append(f"now {FIRST}")
    turn.end()
    assert texts == ["Glad ", f"{FACE} to see", " you ", "\ufffd", None, "now ", "\ufffd", None]
