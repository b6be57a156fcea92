"""The frame kernel beside its twins: the same weights in PyTorch, in bf16 and in fp32."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen_megakernel.build_tts import build, detect_arch, form_of, frame_library
from qwen_megakernel.config import NUM_CODEBOOKS, GenerationParams, ModelConfig
from qwen_megakernel.decoding.kernel_backend import MegakernelBackend
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.installation.build_environment import arch_of
from qwen_megakernel.model.talker import Attend, Talker
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import Shape, shape_config

DEVICE = torch.device("cuda")
PHASES = ("qkv", "attention", "out", "gate_up", "down")


OLDEST_ARCH = "80"
"""The PTX of this architecture's kernels runs on every newer GPU."""


def build_kernel(
    shape: Shape, *, form: str | None = None, arch: str | None = None, racecheck: bool = False
) -> Path:
    """The kernel for `shape`, built at first use.

    Args:
        shape: of the model.
        form: one of `FORMS`; None is the value of the option `--form`.
        arch: of the kernel; None is `detect_arch`.
        racecheck: whether to build it for the sanitizer's racecheck.
    """
    arch = arch or detect_arch(DEVICE)
    form = form or os.environ.get("FRAME_KERNEL_FORM", "auto")
    library = frame_library(shape_config(shape), arch, form)
    if racecheck:
        library = replace(library, header=library.header + "#define QWEN_TTS_RACECHECK\n")
    return build(library, arch)


def forms_here() -> list[tuple[str, str]]:
    """(architecture, form) of all kernels that this GPU runs: its own, and those of older GPUs."""
    own = arch_of(torch.cuda.get_device_capability(DEVICE))
    forms = [(own, form) for form in ("large", "small") if form_of(own) in (form, "large")]
    return forms if own == OLDEST_ARCH else [*forms, (OLDEST_ARCH, "small")]


def make_kernel(
    shape: Shape,
    talker: Talker,
    *,
    form: str | None = None,
    arch: str | None = None,
    racecheck: bool = False,
    **options: object,
) -> MegakernelBackend:
    """A backend with the kernel for `shape`; see `build_kernel`."""
    config = shape_config(shape)
    library = build_kernel(shape, form=form, arch=arch, racecheck=racecheck)
    return MegakernelBackend(talker, config.talker, config.predictor, library=library, **options)


class LayersAsRead:
    """A stack of `DecoderLayer` modules where a backend has `JoinedLayers`: slower, with hooks."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module) -> None:
        self.layers, self.norm = layers, norm

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        cos, sin = (table.squeeze(-2) for table in rope)
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, index, attend)
        return self.norm(x)


def run_as_read(backend: TorchBackend, talker: Talker) -> None:
    """Compute with the modules of `model/talker.py`, and not with the joined layers."""
    predictor = talker.code_predictor.model
    backend._layers = LayersAsRead(talker.model.layers, talker.model.norm)
    backend._predictor_layers = LayersAsRead(predictor.layers, predictor.norm)


@dataclass
class Twins:
    """One set of random weights in three decoders that get the same calls."""

    shape: Shape
    max_positions: int = 512
    config: ModelConfig = field(init=False)
    kernel: MegakernelBackend = field(init=False)
    bf16: TorchBackend = field(init=False)
    fp32: TorchBackend = field(init=False)
    talkers: dict[str, Talker] = field(init=False)

    def __post_init__(self) -> None:
        self.config = shape_config(self.shape)
        narrow, wide = (random_talker(self.config, "cuda") for _ in range(2))
        for parameter in wide.parameters():
            parameter.data = parameter.data.float()
        self.talkers = {"bf16": narrow, "fp32": wide}
        self.kernel = make_kernel(self.shape, narrow, max_positions=self.max_positions)
        self.bf16, self.fp32 = (self._in_pytorch(talker) for talker in (narrow, wide))

    def _in_pytorch(self, talker: Talker) -> TorchBackend:
        shapes = self.config.talker, self.config.predictor
        sizes = {"max_positions": self.max_positions, "max_batch": self.kernel.max_batch}
        backend = TorchBackend(talker, *shapes, **sizes)
        run_as_read(backend, talker)
        return backend

    @property
    def all(self) -> tuple[MegakernelBackend, TorchBackend, TorchBackend]:
        return self.kernel, self.bf16, self.fp32

    def rows(self, *shape: int, seed: int) -> Tensor:
        """Random rows, bf16 values."""
        generator = torch.Generator("cuda").manual_seed(seed)
        rows = torch.randn(*shape, self.config.talker.hidden_size, device=DEVICE, generator=generator)
        return rows.bfloat16()

    def codes(self, n: int, seed: int) -> Tensor:
        """Random codes to force, int64 [n, 16]."""
        generator = torch.Generator("cuda").manual_seed(seed)
        vocab = self.config.predictor.vocab_size
        return torch.randint(0, vocab, (n, NUM_CODEBOOKS), device=DEVICE, generator=generator)

    def prefill(self, lengths: Sequence[int], params: GenerationParams, seed: int = 1) -> None:
        """Start slots 0, 1, ... with prompts of these lengths in all three."""
        prompt = self.rows(max(lengths), seed=seed)
        for slot, length in enumerate(lengths):
            for backend in self.all:
                backend.prefill(slot, prompt[:length], params)

    def release(self, n: int) -> None:
        for slot in range(n):
            for backend in self.all:
                backend.release(slot)


@dataclass
class Recorder:
    """The values that pass through a talker's linear layers during a frame, named as in the kernel."""

    talker: Talker
    taken: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in PHASES})

    def __enter__(self) -> Recorder:
        layers = [*self.talker.model.layers, *self.talker.code_predictor.model.layers]
        self.handles = [h for layer in layers for h in self._hooks(layer)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hooks(self, layer: nn.Module) -> list:
        attention, mlp = layer.self_attn, layer.mlp
        pieces: list[Tensor] = []

        def piece(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            pieces.append(output.flatten(2))
            if len(pieces) == 3:
                self.taken["qkv"].append(torch.cat(pieces, -1))
                pieces.clear()

        def through(inward: str, outward: str):
            def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
                self.taken[inward].append(inputs[0])
                self.taken[outward].append(output)

            return hook

        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [
            *(p.register_forward_hook(piece) for p in projections),
            attention.o_proj.register_forward_hook(through("attention", "out")),
            mlp.down_proj.register_forward_hook(through("gate_up", "down")),
        ]
