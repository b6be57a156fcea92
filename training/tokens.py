"""The tiny model's own tokenizer, and the training sentences as its tokens.

    python -m training.tokens build/training

Reads `sentences.txt` of the folder and writes `tokens.npz`. If `tokenizer/` has a tokenizer, it is used.
Otherwise one is made from the natural sentences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.synth.tokenizer import write_tokenizer
from training import sentences as texts
from training.corpus import write_tokens

DROPOUT = 0.1
"""Share of merges left out in the second reading, so that the model learns what tokens consist of."""
_ROLES = "assistant\nuser\nsystem\n" * 20_000
"""Often enough for the template's words to become tokens."""


def encode_all(tokenizer: Tokenizer, sentences: list[str]) -> list[np.ndarray]:
    """Token ids uint16 of each sentence."""
    encoded = tokenizer.encode_batch(sentences, add_special_tokens=False)
    return [np.array(one.ids, dtype=np.uint16) for one in encoded]


def main() -> None:
    """Train the tokenizer and encode the sentences twice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    sentences = (folder / "sentences.txt").read_text(encoding="utf-8").splitlines()
    if not (folder / "tokenizer").is_dir():
        (folder / "tokenizer").mkdir()
        write_tokenizer(folder / "tokenizer", tiny=True, text=[*texts.first_draw(), _ROLES])
    tokenizer = load_tokenizer(folder / "tokenizer")
    plain = encode_all(tokenizer, sentences)
    role = encode_all(tokenizer, ["assistant\n"])
    tokenizer.model.dropout = DROPOUT
    dropped = encode_all(tokenizer, sentences)
    write_tokens(folder / "tokens.npz", {"plain": plain, "dropped": dropped, "role": role})
    count = sum(map(len, plain))
    print(f"{count} tokens of {sum(map(len, sentences)) / count:.2f} characters")


if __name__ == "__main__":
    main()
