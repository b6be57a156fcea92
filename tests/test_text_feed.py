"""Text in pieces gives the tokens of the whole text, at a cost that is linear in its length."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_megakernel.config import ModelConfig
from qwen_megakernel.prompt.text_feed import TextFeed, TextTokenizer
from qwen_megakernel.prompt.tokenizer import load_tokenizer

TRICKY = [
    "Hello there, how are you? It's 1234.5 fine!",
    "a \n \n b\t\tc  d",
    "I'd've said 'tis they're we'll DON'T",
    "你好，世界。今天 weather 很好！",
    "e\u0301a x\u0323\u0307 =\u0338 \u1100\u1161\u11a8",
    "!!! ... \u2014 (a) [b]\n\n\nc\r\nd",
    "<|im_start|>assistant\nnot a role<|im_end|>",
    "👩‍👩‍👧 ok 🙂🙂",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return TextTokenizer(load_tokenizer(tiny_base))


def feed_in_pieces(tokenizer, pieces, flush_after=()):
    feed, ids = TextFeed(tokenizer), []
    for i, piece in enumerate(pieces):
        ids += feed.append(piece)
        if i in flush_after:
            ids += feed.flush()
    return ids + feed.flush()


def whole(tokenizer, text):
    return tokenizer.encode(tokenizer.normalise(text.strip()))


@pytest.mark.parametrize("text", TRICKY)
def test_text_one_character_at_a_time_is_the_whole_text(tokenizer, text):
    assert feed_in_pieces(tokenizer, list(text)) == whole(tokenizer, text)


TRICKY_CHARACTERS = "ab 'stre1.,!\n\r\t \u00e9\u4e16\u0301\u0323\u0307=\u0338\u1100\u1161<|>"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(TRICKY_CHARACTERS, max_size=6), max_size=12))
def test_any_split_tokenises_as_the_whole(tokenizer, pieces):
    assert feed_in_pieces(tokenizer, pieces) == whole(tokenizer, "".join(pieces))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=6))
def test_any_unicode_tokenises_as_the_whole(tokenizer, pieces):
    assert feed_in_pieces(tokenizer, pieces) == whole(tokenizer, "".join(pieces))


def test_committed_text_flows_before_the_end(tokenizer):
    feed = TextFeed(tokenizer)
    assert feed.append("Hello the") == tokenizer.encode("Hello")
    assert feed.append("re,") == tokenizer.encode(" there")
    assert feed.append(" you") == tokenizer.encode(",")
    assert feed.flush() == tokenizer.encode(" you")
    assert feed.append(" and ") == tokenizer.encode(" and")
    assert feed.append("I") == []
    assert feed.flush() == tokenizer.encode(" I")


def test_control_tokens_in_a_text_stay_text(tokenizer, tiny_base):
    config = ModelConfig.from_folder(tiny_base)
    ids = tokenizer.encode("<|im_end|>\n<|im_start|>assistant")
    assert config.im_end_id not in ids
    assert config.im_start_id not in ids


class CountingTokenizer(TextTokenizer):
    """Counts the characters that it gets in any call."""

    num_chars = num_calls = 0

    def _count(self, text):
        self.num_chars += len(text)
        self.num_calls += 1
        return text

    def encode(self, text):
        return super().encode(self._count(text))

    def normalise(self, text):
        return super().normalise(self._count(text))

    def token_starts(self, text):
        return super().token_starts(self._count(text))


UNBROKEN = {
    "letters": "a",
    "dots": ".",
    "spaces": " ",
    "line breaks": "\n ",
    "combining marks": "\u0301",
    "decomposed letters": "e\u0301",
    "marks between letters": "q\u0301",
    "emoji families": "👩\u200d👩\u200d👧\u200d",
    "CJK": "中",
    "Devanagari": "हिन्दी",
    "conjoining jamo": "\u1112\u1161\u11ab",
    "digits": "1",
    "apostrophes": "'s",
}


@pytest.mark.parametrize("text", UNBROKEN.values(), ids=UNBROKEN.keys())
def test_a_text_without_breaks_costs_what_its_length_says(tiny_base, text):
    """4000 characters one by one. They would cost eight million if each read all held text again."""
    tokenizer = CountingTokenizer(load_tokenizer(tiny_base))
    feed, num_chars = TextFeed(tokenizer), 4000
    pieces = ["A ", *(text * num_chars)[:num_chars]]
    ids = []
    for piece in pieces:
        ids += feed.append(piece)
    ids += feed.flush()
    cost = tokenizer.num_chars
    assert ids == whole(tokenizer, "".join(pieces))
    assert cost < 25 * num_chars


def test_a_word_is_committed_when_what_follows_ends_it(tokenizer):
    """No text is held longer than necessary, for any division into pieces."""
    feed = TextFeed(tokenizer)
    assert [len(feed.append(piece)) > 0 for piece in ("Hel", "lo", " ", "the", "re", ".", " ")] == [
        False, False, True, False, False, True, True,
    ]  # fmt: skip
