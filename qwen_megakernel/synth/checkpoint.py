"""Random checkpoints in the official layout, for machines that have no released weights.

Every file, tensor name, shape and dtype is that of a released Qwen3-TTS-12Hz checkpoint, so whatever
runs on a random one runs on a released one. The numbers are random, so the audio is noise. The scales
are chosen so that mistakes show: logits spread as in a trained model, no branch is negligible, and the
waveform is neither silent nor clipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from qwen_megakernel.codec.decoder import CodecDecoder
from qwen_megakernel.codec.encoder import CodecEncoder
from qwen_megakernel.config import NUM_CODEBOOKS, ModelConfig, VoiceMode
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.speaker_encoder import SpeakerEncoder
from qwen_megakernel.synth.config import SHAPES, Shape, json_files, shape_config
from qwen_megakernel.synth.tokenizer import write_tokenizer

Progress = Callable[[int, int], None]
"""Called with (bytes written, all bytes) of the file that is being written."""

SYNTHETIC_KEY = "synthetic"
"""Key in the safetensors metadata that marks a random checkpoint. No released file has it."""

_CHUNK = 1 << 22
"""Values drawn at a time. Limits memory for the 311 M values of the text embeddings."""


class SynthError(ValueError):
    """The checkpoint cannot be written to this folder. The message is one line that says why."""


# --- tensors -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape of one tensor, and the distribution of its values: `offset + scale * draw`."""

    shape: tuple[int, ...]
    scale: float
    offset: float = 0.0
    uniform: bool = False
    """Draw from [0, 1) instead of a standard normal."""
    zero_sum: bool = False
    """Subtract the mean over the last axis (a convolution's taps), so that the layer passes no DC."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)


Specs = dict[str, TensorSpec]

ToSpec = Callable[[tuple[int, ...]], TensorSpec]
"""Chooses the distribution of a tensor from its shape."""


def _around(mean: float, std: float) -> ToSpec:
    return lambda shape: TensorSpec(shape, std, offset=mean)


def _fan_in(gain: float = 1.0, *, zero_sum: bool = False) -> ToSpec:
    """For linear layers `[out, in]` and convolutions `[out, in, kernel]`: output of `gain` times the
    input's size."""
    return lambda shape: TensorSpec(shape, gain / sqrt(prod(shape[1:])), zero_sum=zero_sum)


def _transposed(taps: int) -> ToSpec:
    """For transposed convolutions `[in, out, kernel]`. `taps` of the kernel reach each output sample."""
    return lambda shape: TensorSpec(shape, 1 / sqrt(shape[0] * taps))


def _rules(config: ModelConfig) -> list[tuple[str, ToSpec]]:
    """Patterns that are searched for in a tensor's full name. The first match decides."""

    def branch(layers: int) -> ToSpec:
        # In a deep random stack the branches would drown the input. This keeps their sum near its size.
        return _fan_in(min(1.0, 2 / sqrt(layers)))

    last_conv = rf"^decoder\.decoder\.{len(config.codec.upsample_rates) + 2}\.conv\."
    return [
        # Around one but never exactly one, so that a missing norm shows.
        (r"norm\.weight$", _around(1.0, 0.1)),
        (r"(_layer_scale\.scale|\.gamma)$", _around(0.3, 0.03)),
        (r"\.(alpha|beta)$", _around(0.0, 0.2)),  # both are used as exp()
        (r"\.cluster_usage$", lambda shape: TensorSpec(shape, 1.5, offset=0.5, uniform=True)),
        (r"\.initialized$", _around(1.0, 0.0)),
        # An entry is sum / usage. The acoustic entries are summed, so each is smaller.
        (r"\.rvq_rest\..*\.embedding_sum$", _around(0.0, 1.5 / sqrt(NUM_CODEBOOKS - 1))),
        (r"\.embedding_sum$", _around(0.0, 1.5)),
        (r"\.embed_sum$", _around(0.0, 1.0)),
        (r"\.text_embedding\.", _around(0.0, 1.0)),
        (r"\.codec_embedding\.", _around(0.0, 0.3)),  # sixteen add up to the size of a text row
        (last_conv + "bias$", _around(0.0, 0.005)),
        (r"\.bias$", _around(0.0, 0.05)),
        (r"^talker\.text_projection\.linear_fc2\.", _fan_in(1.6)),
        (r"^talker\.(codec_head|code_predictor\.lm_head)\.", _fan_in(3.0)),  # deviation of the logits
        (r"^talker\.model\..*\.(o_proj|down_proj)\.", branch(config.talker.num_layers)),
        (r"^talker\.code_predictor\..*\.(o_proj|down_proj)\.", branch(config.predictor.num_layers)),
        (r"^speaker_encoder\.blocks\.0\.", _fan_in(0.3)),  # log-mels are about -5
        (r"^speaker_encoder\.fc\.", _fan_in(0.6)),
        (r"^speaker_encoder\.", _fan_in(sqrt(2))),  # ReLU
        (r"^encoder\.encoder\.layers\.0\.", _fan_in(10.0)),  # the RMS of speech is about 0.1
        (r"^encoder\.encoder\.layers\.", _fan_in(1.2)),
        (r"^decoder\.upsample\.\d\.0\.", _transposed(1)),
        (r"^decoder\.decoder\.\d\.block\.1\.", _transposed(2)),
        (r"^decoder\.decoder\..*\.conv1\.", _fan_in(0.7)),
        (r"^decoder\.decoder\..*\.conv2\.", _fan_in(0.5)),
        # SnakeBeta's mean is never zero. Without zero-sum taps the waveform would be mostly DC.
        (last_conv + "weight$", _fan_in(0.035, zero_sum=True)),
        (r"", _fan_in()),
    ]


def tensor_specs(config: ModelConfig) -> tuple[Specs, Specs]:
    """All tensors of the root `model.safetensors`, and those of the one in `speech_tokenizer/`."""
    with torch.device("meta"):
        root: dict[str, torch.nn.Module] = {"talker.": Talker(config.talker, config.predictor)}
        if config.speaker_encoder is not None:
            root["speaker_encoder."] = SpeakerEncoder(config.speaker_encoder)
        speech: dict[str, torch.nn.Module] = {}
        if config.codec_encoder is not None:
            speech["encoder."] = CodecEncoder(config.codec_encoder)
        speech["decoder."] = CodecDecoder(config.codec)
    rules = _rules(config)

    def spec(name: str, shape: tuple[int, ...]) -> TensorSpec:
        return next(make(shape) for pattern, make in rules if re.search(pattern, name))

    def specs(modules: dict[str, torch.nn.Module]) -> Specs:
        return {
            prefix + name: spec(prefix + name, tuple(tensor.shape))
            for prefix, module in modules.items()
            for name, tensor in module.state_dict().items()
        }

    return specs(root), specs(speech)


def random_talker(config: ModelConfig, device: torch.device | str, *, seed: int = 0) -> Talker:
    """A talker with weights of these distributions, drawn on the device, without a file.

    Args:
        config: the shape.
        device: where the weights are made, bf16. They depend on the kind of device, and differ from
            those of `write_checkpoint`.
        seed: key of the weights.

    Returns:
        The talker. Its text embedding, which a frame does not use, stays on the meta device.
    """
    with torch.device("meta"):
        talker = Talker(config.talker, config.predictor)
    specs, _ = tensor_specs(config)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name in talker.state_dict():
        if "text_" in name:
            continue
        spec = specs[f"talker.{name}"]
        make = torch.rand if spec.uniform else torch.randn
        draw = make(spec.shape, generator=generator, device=device)
        weights[name] = (draw * spec.scale + spec.offset).to(torch.bfloat16)
    talker.load_state_dict(weights, strict=False, assign=True)
    return talker


# --- writing -----------------------------------------------------------------------------------


def _draw(spec: TensorSpec, seed: int, name: str) -> Iterator[torch.Tensor]:
    """The tensor's values in order, as flat float32 pieces of at most `_CHUNK`."""
    # The key contains the name, so a tensor's values do not depend on the other tensors in the file.
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    rng = np.random.Generator(np.random.SFC64(key))
    for start in range(0, spec.numel, _CHUNK):
        size = min(_CHUNK, spec.numel - start)
        draw = rng.random if spec.uniform else rng.standard_normal
        values = draw(size, dtype=np.float32)
        if spec.zero_sum:  # only small tensors, which are drawn whole
            taps = values.reshape(spec.shape)
            values = (taps - taps.mean(axis=-1, keepdims=True)).reshape(-1)
        values *= np.float32(spec.scale)
        values += np.float32(spec.offset)
        yield torch.from_numpy(values)


_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def _header(specs: Specs, dtype: torch.dtype, metadata: dict[str, str]) -> bytes:
    """Length and JSON header of a safetensors file (https://github.com/huggingface/safetensors)."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, spec in sorted(specs.items()):
        end = offset + spec.numel * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the start of the data
    return struct.pack("<Q", len(text)) + text


def _write_tensors(
    path: Path, specs: Specs, dtype: torch.dtype, seed: int, note: str, progress: Progress | None
) -> None:
    """Write a safetensors file piece by piece. It gets its name only when it is complete."""
    total = sum(spec.numel for spec in specs.values()) * dtype.itemsize
    done = 0
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(_header(specs, dtype, {"format": "pt", SYNTHETIC_KEY: note}))
            for name, spec in sorted(specs.items()):
                for values in _draw(spec, seed, name):
                    file.write(values.to(dtype).view(torch.uint8).numpy().data)
                    done += values.numel() * dtype.itemsize
                    if progress is not None:
                        progress(done, total)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# --- entry point -------------------------------------------------------------------------------


def _is_synthetic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100 << 20)))
        return SYNTHETIC_KEY in header.get("__metadata__", {})
    except (OSError, ValueError, struct.error):
        return False


def _check_target(folder: Path) -> None:
    """Refuse to overwrite anything but an earlier synthetic checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise SynthError(f"{folder}: is a file, expected a folder to write to")
    if not any(path.is_file() for path in folder.rglob("*")):  # a failed first try leaves this too
        return
    if not _is_synthetic(folder / "model.safetensors"):
        raise SynthError(
            f"{folder}: is not empty and holds no synthetic checkpoint; choose a new folder"
        )


def write_checkpoint(
    folder: Path,
    *,
    shape: Shape,
    mode: VoiceMode,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write a random checkpoint in the official layout. The same arguments give the same bytes.

    Args:
        folder: created if missing. It may hold an earlier synthetic checkpoint, which is replaced.
        shape: `tiny` (about 30 MB), `tiny-1.7b`, or a true one: `0.6b` (2.5 GB), `1.7b` (4.5 GB).
        mode: the model type to imitate. Only `base` has a speaker encoder.
        seed: key of the weights.
        progress: called with the bytes written and all bytes, for each of the two weight files.

    Raises:
        SynthError: the shape or mode is unknown, or the folder holds something else.
    """
    if shape not in SHAPES:
        raise SynthError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")
    if mode not in get_args(VoiceMode):
        raise SynthError(f"mode is {mode!r}, expected one of {', '.join(get_args(VoiceMode))}")
    folder = Path(folder)
    _check_target(folder)
    speech = folder / "speech_tokenizer"
    speech.mkdir(parents=True, exist_ok=True)
    note = f"random weights, shape {shape}, seed {seed}: the audio is noise"
    files = json_files(shape, mode)
    root_specs, speech_specs = tensor_specs(shape_config(shape, mode))
    # This file comes first, because its metadata allows a second try in this folder.
    _write_tensors(folder / "model.safetensors", root_specs, torch.bfloat16, seed, note, progress)
    _write_tensors(speech / "model.safetensors", speech_specs, torch.float32, seed, note, progress)
    for name, value in files.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    write_tokenizer(folder, tiny=shape.startswith("tiny"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m qwen_megakernel synth-checkpoint`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write; created if missing")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="tiny",
        help="size: tiny (29 MB, the default), tiny-1.7b (the same with a talker wider than its "
        "predictor, as 1.7b has), 0.6b (2.5 GB) or 1.7b (4.5 GB) as released",
    )
    parser.add_argument(
        "--type",
        dest="mode",
        choices=get_args(VoiceMode),
        default="base",
        help="which model to imitate (default: base)",
    )
    parser.add_argument("--seed", type=int, default=0, help="key of the weights (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint that the command line asks for. Returns the exit status."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done / 1e6:8.0f} of {total / 1e6:.0f} MB", end=end, file=sys.stderr, flush=True)

    try:
        write_checkpoint(
            args.folder,
            shape=args.shape,
            mode=args.mode,
            seed=args.seed,
            progress=show if sys.stderr.isatty() else None,
        )
    except (SynthError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.folder}: random {args.shape} {args.mode} checkpoint; its audio is noise")
    return 0
