"""Text in pieces tokenises as the whole; prompts start when they may and never pad early."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.builder import PromptBuilder, TextFeed, TextTokenizer
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.turn import RequestError

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
def checkpoint(tiny_base):
    return Checkpoint(tiny_base)


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return TextTokenizer(load_tokenizer(tiny_base))


@pytest.fixture(scope="module")
def builder(checkpoint, tiny_base):
    with torch.device("meta"):
        talker = Talker(checkpoint.config.talker, checkpoint.config.predictor)
    checkpoint.load("talker.", talker, dtype=torch.float32)
    return PromptBuilder(talker, checkpoint.config, load_tokenizer(tiny_base))


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


@settings(max_examples=400, deadline=None)
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


def test_control_tokens_in_a_text_stay_text(tokenizer, checkpoint):
    ids = tokenizer.encode("<|im_end|>\n<|im_start|>assistant")
    assert checkpoint.config.im_end_id not in ids
    assert checkpoint.config.im_start_id not in ids


def x_vector(builder):
    return Voice.x_vector(
        torch.randn(builder.pad_row.shape[0], generator=torch.Generator().manual_seed(0))
    )


def drain(prompt, frames):
    rows = []
    for _ in range(frames):
        row = prompt.next_text_row()
        if row is None:
            break
        rows.append(row)
        prompt.advance()
    return rows


def test_streaming_starts_at_the_first_token_and_waits_for_late_text(builder):
    prompt = builder.open(x_vector(builder), "english")
    assert not prompt.ready
    prompt.append("Hello there, how")
    assert prompt.ready
    assert len(prompt.rows()) == 3 + 4 + 1 + 1 + 1  # template, tags, speaker, pad, first token over bos
    fed = drain(prompt, 100)
    assert len(fed) == prompt.num_text_tokens - 1
    assert prompt.next_text_row() is None, "late text must be waited for, never padded"
    prompt.append(" are you?")
    prompt.end()
    fed += drain(prompt, 100)[:50]
    rest = builder.text_rows(builder.tokenizer.encode("Hello there, how are you?"))[1:]
    torch.testing.assert_close(torch.stack(fed[: len(rest)]), rest)
    assert torch.equal(fed[len(rest)], builder.eos_row)
    assert all(torch.equal(row, builder.pad_row) for row in fed[len(rest) + 1 :])
    assert prompt.text_exhausted


def test_rows_of_a_table_are_the_rows(checkpoint, tiny_base, builder, monkeypatch):
    with torch.device("meta"):
        talker = Talker(checkpoint.config.talker, checkpoint.config.predictor)
    checkpoint.load("talker.", talker, dtype=torch.float32)
    table = talker.tabulate_text()
    assert table is talker.tabulate_text()
    ids = builder.tokenizer.encode("Hello there, how are you?")
    expected = builder.text_rows(ids)
    torch.testing.assert_close(talker.text_rows(torch.tensor(ids)), expected)
    monkeypatch.setattr(builder, "_text_table", table)
    torch.testing.assert_close(torch.stack([*builder.each_text_row(ids)]), expected)


def test_text_exhausted_only_after_eos_was_fed(builder):
    prompt = builder.open(x_vector(builder), "auto")
    prompt.append("Hi")
    prompt.end()
    prompt.rows()
    drain(prompt, prompt.num_text_tokens - 1)
    assert not prompt.text_exhausted
    assert torch.equal(prompt.next_text_row(), builder.eos_row)
    prompt.advance()
    assert prompt.text_exhausted


def test_non_streaming_needs_the_whole_text(builder):
    prompt = builder.open(x_vector(builder), "english", streaming=False)
    prompt.append("Hello there, how are you?")
    assert not prompt.ready
    prompt.end()
    assert prompt.ready
    assert len(prompt.rows()) == 9 + prompt.num_text_tokens + 1 + 1
    assert torch.equal(prompt.next_text_row(), builder.pad_row)


def test_icl_waits_until_the_text_covers_the_reference(builder):
    voice = Voice.icl(
        x_vector(builder).speaker_embedding, torch.randint(0, 2048, (12, 16)), "a reference"
    )
    prompt = builder.open(voice, "english")
    prompt.append("Hi there ")
    assert not prompt.ready
    prompt.append("and a good deal more of text, until it is longer than the reference is ")
    assert prompt.ready
    short = builder.open(voice, "english")
    short.append("Hi")
    short.end()
    assert short.ready
    assert len(short.rows()) == 9 + 13
    assert torch.equal(short.next_text_row(), builder.pad_row)


def test_empty_text_is_empty(builder):
    prompt = builder.open(x_vector(builder), "english")
    prompt.append("  \n ")
    prompt.end()
    assert prompt.empty


def test_wrong_requests_are_named(builder):
    with pytest.raises(RequestError, match="language 'klingon', allowed: auto, chinese"):
        builder.open(x_vector(builder), "klingon")
    with pytest.raises(RequestError, match="a base checkpoint cannot take a voice of kind preset"):
        builder.open(Voice.preset("vivian"))
    with pytest.raises(RequestError, match="width 7"):
        builder.open(Voice.x_vector(torch.ones(7)))
    with pytest.raises(RequestError, match="instruct needs"):
        builder.open(x_vector(builder), instruct="happily")
