"""A turn's text becomes tokens on the caller's thread, and the engine takes a few at a time."""

from __future__ import annotations

import threading

import pytest

from qwen_megakernel.turn import MAX_BLOCK, RequestError, Turn


class Feed:
    """A feed with a token for each character. `-` is held back until another character follows."""

    def __init__(self):
        self.texts = []
        self.held = []

    def append(self, text):
        self.texts.append(text)
        tokens = [*self.held, *map(ord, text)]
        self.held = [tokens.pop()] if text.endswith("-") else []
        return tokens

    def flush(self):
        tokens, self.held = self.held, []
        return tokens


class Stage:
    def __init__(self):
        self.wakes = 0
        self.feed = Feed()
        self.turn = Turn(self.wake, self.feed)

    def wake(self):
        self.wakes += 1

    def take_all(self):
        takes = []
        while True:
            tokens, complete = self.turn.take_text()
            if tokens:
                takes.append(tokens)
            if complete or not tokens:
                return takes, complete


@pytest.fixture
def stage():
    return Stage()


def test_text_keeps_its_order(stage):
    turn = stage.turn
    turn.append("a-")
    turn.flush()
    turn.append("b-")
    assert stage.take_all() == ([[ord(c) for c in "a-b"]], False)
    turn.end()
    assert turn.ended
    assert stage.take_all() == ([[ord("-")]], True)
    assert stage.wakes == 4


def test_audio_that_is_not_played_is_news(stage):
    """The engine looks at a turn again only after news of it."""
    stage.turn.skip(0.3)
    assert (stage.turn.skipped_s, stage.wakes) == (0.3, 1)


def test_empty_text_costs_nothing(stage):
    """A flood of empty text neither fills memory nor keeps the engine busy, and starts no clock."""
    for _ in range(10_000):
        stage.turn.append("")
    assert (stage.feed.texts, stage.wakes, stage.turn.has_text) == ([], 0, False)
    assert stage.turn.first_text_at is None
    stage.turn.end()
    with pytest.raises(RequestError, match="after the end"):
        stage.turn.append("")


def test_text_that_gives_no_tokens_does_not_wake_the_engine(stage):
    for _ in range(100):
        stage.turn.append("-")
    assert stage.wakes == 99, "the first is held back"
    stage.turn.flush()
    stage.turn.flush()
    assert stage.wakes == 100


def test_single_characters_are_taken_together_and_a_long_text_bit_by_bit(stage):
    for _ in range(MAX_BLOCK):
        stage.turn.append("a")
    stage.turn.append("b" * (2 * MAX_BLOCK + 1))
    stage.turn.end()
    takes, complete = stage.take_all()
    assert complete
    assert [len(tokens) for tokens in takes] == [MAX_BLOCK, MAX_BLOCK, MAX_BLOCK, 1]


def test_after_a_cancel_no_text_is_tokenised(stage):
    stage.turn.append("a")
    stage.turn.cancel()
    stage.turn.append("b")
    stage.turn.flush()
    stage.turn.end()
    assert stage.feed.texts == ["a"]


def test_the_engine_never_waits_for_a_text_that_is_tokenised(stage):
    began, go_on = threading.Event(), threading.Event()

    def slow(text):
        began.set()
        assert go_on.wait(60)
        return [1]

    stage.feed.append = slow
    caller = threading.Thread(target=stage.turn.append, args=("a long text",))
    caller.start()
    try:
        assert began.wait(60)
        assert stage.turn.take_text() == ([], False)
        stage.turn.cancel()
        assert stage.turn.cancelled
    finally:
        go_on.set()
        caller.join()
