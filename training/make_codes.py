"""Turn what the teacher has read out into codes for the talker to learn.

    python -m training.make_codes build/training --follow 400

Reads the codec of the folder and `speech/`, and writes `codes-*.npz`. With `--follow` it goes on for so
many seconds, while the teacher still reads and the talker already learns. Speech that has codes keeps
them. After a change of the codec, delete `codes-*.npz`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_megakernel.config import HOP, SAMPLE_RATE
from training import corpus, teacher
from training.codec_model import ENCODER_MARGIN, TrainedCodec
from training.train_codec import load_codec

FILES = 16
"""Files of speech whose codes make one file."""
SHOWN_S = 20
"""Seconds between two lines of progress."""
_ROUND = 8
"""Lengths are rounded up to a multiple of this many frames, so that there are few different ones."""


@torch.no_grad()
def encode_chunks(
    codec: TrainedCodec, paths: Iterable[Path], batch: int = 64
) -> Iterator[tuple[int, Tensor]]:
    """(sentence, codes uint8 [frames, 16]) of every utterance in the teacher's files."""
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
    """Encode what is new, and what comes later."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codec", type=Path, default=None, help="folder of it; default: the folder")
    parser.add_argument("--speech", type=Path, default=None, help="default: speech/ of the folder")
    parser.add_argument("--follow", type=float, default=0, metavar="SECONDS", help="wait for more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    codec = load_codec(args.codec or args.folder).eval().to(args.device)
    speech: Path = args.speech or args.folder / "speech"
    end, shown = time.monotonic() + args.follow, time.monotonic()
    known, done = set(corpus.Codes(args.folder).take()), set[Path]()
    sentences = frames = 0
    while True:
        late = time.monotonic() >= end
        paths = sorted(set(speech.glob("*.npz")) - done)[:FILES]
        if len(paths) == FILES or (paths and late):
            done.update(paths)
            fresh = {i: codes for i, codes in encode_chunks(codec, paths) if i not in known}
            if fresh:
                corpus.write_codes(args.folder, fresh)
            sentences, frames = sentences + len(fresh), frames + sum(map(len, fresh.values()))
        elif late:
            break
        else:
            time.sleep(0.5)
        if time.monotonic() > shown + SHOWN_S:
            shown = time.monotonic()
            print(_progress(sentences, frames), flush=True)
    print(_progress(sentences, frames))


def _progress(sentences: int, frames: int) -> str:
    return f"codes of {sentences} more sentences, {frames * HOP / SAMPLE_RATE / 3600:.1f} hours"


if __name__ == "__main__":
    main()
