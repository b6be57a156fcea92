"""The text tokenizer gives the same tokens as transformers with the same files."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import ROOT

from qwen_megakernel.checkpoint import TOKENIZER_FILES, CheckpointError
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.synth.tokenizer import write_tokenizer

TEXTS = (
    "Hello world, it's 42!  We'LL see\u2026\n\n", "Größe e\u0301lève", "今天 오늘 Поезд", "🙂\t\x00 ",
    "<|im_start|>assistant\nHi<|im_end|>\n<tts_pad> <tts_text_bos>x", " <|im_end|> ", "",
)  # fmt: skip


@pytest.fixture(scope="module", params=["tiny", "true ids", "demo"])
def folder(request, tmp_path_factory):
    if request.param == "demo":
        return ROOT / "demo_voice"
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tiny=request.param == "tiny")
    return folder


@pytest.fixture(scope="module")
def both(folder):
    from transformers import Qwen2TokenizerFast

    return load_tokenizer(folder), Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_transformers_tokens(both, text):
    ours, theirs = both
    ids = ours.encode(text).ids
    assert ids == theirs(text).input_ids
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


PIECES = (*"aE '\n\t1.<|>é한", "\u0301", "'ll", "<|im_end|>")


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_is_transformers_tokens(both, text):
    ours, theirs = both
    assert ours.encode(text).ids == theirs(text).input_ids


def test_all_else_is_the_same_too(both):
    ours, theirs = both[0], both[1].backend_tokenizer
    assert ours.get_vocab() == theirs.get_vocab()
    kept = ("normalizer", "pre_tokenizer", "decoder", "added_tokens")
    ours, theirs = (json.loads(tokenizer.to_str()) for tokenizer in (ours, theirs))
    assert {part: ours[part] for part in kept} == {part: theirs[part] for part in kept}


@pytest.fixture
def copy(tmp_path):
    for name in TOKENIZER_FILES:
        shutil.copy(ROOT / "demo_voice" / name, tmp_path)
    return tmp_path


def test_it_needs_its_files_and_a_readable_vocabulary(copy):
    (copy / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="text tokenizer cannot be read"):
        load_tokenizer(copy)
    (copy / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt is missing"):
        load_tokenizer(copy)


@pytest.mark.parametrize("number", [2**31, 2**40, -1, 1.5, True, "7"])
def test_an_id_beyond_the_embedding_is_refused_before_a_table_is_filled(copy, number):
    vocab = json.loads((copy / "vocab.json").read_text())
    (copy / "vocab.json").write_text(json.dumps({**vocab, "far": number}))
    with pytest.raises(CheckpointError, match=r"'far' is token .*, allowed: 0 to 1048575"):
        load_tokenizer(copy)


def test_an_id_has_a_row_of_the_embedding(copy):
    largest = max(json.loads((copy / "vocab.json").read_text()).values())
    load_tokenizer(copy, largest + 1)
    with pytest.raises(CheckpointError, match=f"is token {largest}, allowed: 0 to {largest - 1}"):
        load_tokenizer(copy, largest)


def test_a_token_that_would_get_another_id_is_named(copy):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    added["4000"] = {**added["1000"], "content": "<far>"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"<far> should be token 4000, it would be 1010"):
        load_tokenizer(copy)
