"""Turn what the teacher has read out into codes for the talker to learn.

    python -m training.make_codes build/training

Reads the codec of the folder and `speech/`, writes `codes-*.npz`; sentences that have codes already
keep them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_megakernel.config import HOP
from training import corpus, teacher
from training.codec_model import ENCODER_MARGIN, TrainedCodec
from training.train_codec import load_codec

_ROUND = 8
"""Lengths are rounded up to so many frames: few different ones."""


@torch.no_grad()
def encode_chunks(
    codec: TrainedCodec, paths: Iterable[Path], batch: int = 64
) -> Iterator[tuple[int, Tensor]]:
    """(sentence, codes uint8 [frames, 16]) of every utterance of the teacher's files."""
    device = next(codec.parameters()).device
    margin = ENCODER_MARGIN
    for path in paths:
        first, lengths, samples = teacher.read_chunk(path)
        frames = lengths.tolist()
        pieces = torch.from_numpy(samples).split([n * HOP for n in frames])
        order = sorted(range(len(pieces)), key=lambda i: frames[i])
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            longest = -(-max(frames[i] for i in group) // _ROUND) * _ROUND + margin
            padded = torch.stack(
                [F.pad(pieces[i], (margin * HOP, longest * HOP - len(pieces[i]))) for i in group]
            )
            codes = codec.encode(padded.to(device).float() / 32768)[:, margin:]
            for i, row in zip(group, codes.to(torch.uint8).cpu(), strict=True):
                yield first + i, row[: frames[i]].clone()


def main() -> None:
    """Encode what is new."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codec", type=Path, default=None, help="folder of it; default: the folder")
    parser.add_argument("--speech", type=Path, default=None, help="default: speech/ of the folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    codec = load_codec(args.codec or args.folder).eval().to(args.device)
    known: dict[int, Tensor] = {}
    if any(args.folder.glob("codes-*.npz")):
        found = corpus.read_codes(args.folder)
        known = {index: torch.from_numpy(codes) for index, codes in found.items()}
    count = len(known)
    for index, codes in encode_chunks(
        codec, sorted((args.speech or args.folder / "speech").glob("*.npz"))
    ):
        known.setdefault(index, codes)
    corpus.write_codes(args.folder, known)
    hours = sum(map(len, known.values())) * HOP / 24_000 / 3600
    print(f"codes of {len(known)} sentences ({len(known) - count} new), {hours:.1f} hours")


if __name__ == "__main__":
    main()
