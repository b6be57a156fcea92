"""Prompts start as soon as they may, and never pad too early."""

from __future__ import annotations

import pytest
import torch
from prompt_text import give_text

from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.builder import PromptBuilder
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.turn import RequestError


@pytest.fixture(scope="module")
def checkpoint(tiny_base):
    return Checkpoint(tiny_base)


@pytest.fixture(scope="module")
def builder(checkpoint, tiny_base):
    with torch.device("meta"):
        talker = Talker(checkpoint.config.talker, checkpoint.config.predictor)
    checkpoint.load("talker.", talker, dtype=torch.float32)
    return PromptBuilder(talker, checkpoint.config, load_tokenizer(tiny_base))


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
    feed = builder.open_feed()
    prompt.extend(feed.append("Hello there, how"))
    assert prompt.ready
    assert len(prompt.rows()) == 3 + 4 + 1 + 1 + 1  # template, tags, speaker, pad, first token over bos
    fed = drain(prompt, 100)
    assert len(fed) == prompt.num_text_tokens - 1
    assert prompt.next_text_row() is None, "late text must be waited for, never padded"
    prompt.extend(feed.append(" are you?") + feed.flush())
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
    give_text(builder, prompt, "Hi")
    prompt.rows()
    drain(prompt, prompt.num_text_tokens - 1)
    assert not prompt.text_exhausted
    assert torch.equal(prompt.next_text_row(), builder.eos_row)
    prompt.advance()
    assert prompt.text_exhausted


def test_non_streaming_needs_the_whole_text(builder):
    prompt = builder.open(x_vector(builder), "english", streaming=False)
    feed = builder.open_feed()
    prompt.extend(feed.append("Hello there, how are you?") + feed.flush())
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
    feed = builder.open_feed()
    prompt.extend(feed.append("Hi there "))
    assert not prompt.ready
    more = "and a good deal more of text, until it is longer than the reference is "
    prompt.extend(feed.append(more))
    assert prompt.ready
    short = builder.open(voice, "english")
    give_text(builder, short, "Hi")
    assert short.ready
    assert len(short.rows()) == 9 + 13
    assert torch.equal(short.next_text_row(), builder.pad_row)


def test_empty_text_is_empty(builder):
    prompt = builder.open(x_vector(builder), "english")
    give_text(builder, prompt, "  \n ")
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
