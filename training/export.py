"""Put the trained parts together: a checkpoint folder in the official layout, and four saved voices.

    python -m training.export build/training demo_voice

Reads `tokenizer/`, `talker.safetensors`, `codec-decoder.safetensors`, `speaker-encoder.safetensors` and
`speakers.safetensors` of the first folder. Weights are stored in bf16. `voices/` beside the checkpoint's
own files gets the teacher's voices, for `Voice.load`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_megakernel.checkpoint import SPEECH_FOLDER, Checkpoint
from qwen_megakernel.prompt.voice import Voice
from training import geometry
from training.teacher import VOICES

_NOTE = {"format": "pt", "made_by": "training/ of the qwen_megakernel repository"}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(path: Path, weights: dict[str, Tensor]) -> int:
    """Store weights in bf16. Returns the number of values."""
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(stored, path, _NOTE)
    return sum(tensor.numel() for tensor in stored.values())


def export(folder: Path, out: Path) -> int:
    """Write the checkpoint.

    Args:
        folder: of the trained parts.
        out: of the checkpoint. It is made if it is missing, and its files are replaced.

    Returns:
        The number of values in it.

    Raises:
        FileNotFoundError: a part is missing.
        CheckpointError: the parts do not make a checkpoint of `geometry`.
    """
    for name, content in geometry.files().items():
        _write_json(out / name, content)
    for path in sorted((folder / "tokenizer").iterdir()):
        shutil.copy(path, out / path.name)
    root = load_file(folder / "talker.safetensors") | load_file(folder / "speaker-encoder.safetensors")
    count = _write_weights(out / "model.safetensors", root)
    decoder = load_file(folder / "codec-decoder.safetensors")
    count += _write_weights(out / SPEECH_FOLDER / "model.safetensors", decoder)
    _write_voices(load_file(folder / "speakers.safetensors")["clips"], out / "voices")
    Checkpoint(out).verify()
    return count


def _write_voices(clips: Tensor, folder: Path) -> None:
    """Write the mean embedding of each voice. `clips` is float32 [voices, clips, hidden]."""
    folder.mkdir(exist_ok=True)
    for name, embeddings in zip(VOICES, clips, strict=True):
        Voice.x_vector(embeddings.mean(0)).save(folder / f"{name}.safetensors")


def main() -> None:
    """Export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    count = export(args.folder, args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {count / 1e6:.2f} million values, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
