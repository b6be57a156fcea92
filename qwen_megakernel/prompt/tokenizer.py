"""The text tokenizer of a checkpoint: Qwen2's byte-level BPE, read from its three files.

It is built here and not by transformers, because the import of transformers takes as long as everything
else that a server loads. The tests compare the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from qwen_megakernel.checkpoint import TOKENIZER_FILES, CheckpointError
from qwen_megakernel.config import MAX_SIZE

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is split before BPE. No file of a checkpoint has it; it belongs to the class
`Qwen2Tokenizer`."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Flags of an added token, under their names in `tokenizer_config.json`."""


def qwen2_tokenizer(bpe: models.BPE) -> Tokenizer:
    """A tokenizer that splits text as Qwen2's does, with the given vocabulary and merges."""
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(folder: Path, vocab_size: int = MAX_SIZE) -> Tokenizer:
    """Load the text tokenizer of a local checkpoint.

    Args:
        folder: of the checkpoint.
        vocab_size: rows of the text embedding. All ids are below it.

    Raises:
        CheckpointError: a file is missing or malformed.
    """
    vocab, merges, config = (Path(folder) / name for name in TOKENIZER_FILES)
    for path in (vocab, merges, config):
        if not path.is_file():
            raise CheckpointError(f"{folder}: {path.name} is missing, so there is no text tokenizer")
    try:
        _check_ids(json.loads(vocab.read_text(encoding="utf-8")), vocab_size)
        tokenizer = qwen2_tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        _add_tokens(tokenizer, json.loads(config.read_text(encoding="utf-8"))["added_tokens_decoder"])
    except Exception as error:  # a malformed file can raise any error, also one from Rust
        raise CheckpointError(f"{folder}: the text tokenizer cannot be read ({error})") from error
    return tokenizer


def _check_ids(vocab: dict[str, int], vocab_size: int) -> None:
    """Raise `ValueError` for an id that has no row. BPE fills a table up to the largest id."""
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < vocab_size:
            raise ValueError(
                f"{token[:40]!r} is token {str(number)[:40]}, allowed: 0 to {vocab_size - 1}"
            )


def _add_tokens(tokenizer: Tokenizer, added: dict[str, dict[str, Any]]) -> None:
    """Add the tokens that are not BPE's, by id. Raises `ValueError` if one would get another id."""
    tokens = {int(number): fields for number, fields in added.items()}
    tokenizer.add_tokens(
        [
            AddedToken(fields["content"], **{flag: fields[flag] for flag in _FLAGS if flag in fields})
            for _, fields in sorted(tokens.items())
        ]
    )
    for number, fields in tokens.items():
        if (found := tokenizer.token_to_id(fields["content"])) != number:
            raise ValueError(f"{fields['content']} should be token {number}, it would be {found}")
