"""Which decoder and which codec run, and why: CUDA kernels, PyTorch as CUDA graphs, or eager PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import nn

from qwen_megakernel.build_tts import (
    BuildError,
    build,
    build_digest,
    codec_library,
    detect_arch,
    form_of,
    frame_library,
)
from qwen_megakernel.checkpoint import CheckpointError
from qwen_megakernel.codec.cuda_stream import CudaCodecStream
from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream
from qwen_megakernel.codec.graph_stream import GraphCodecStream
from qwen_megakernel.codec.interface import FrameCodec
from qwen_megakernel.config import ModelConfig
from qwen_megakernel.decoding.graph_backend import GraphBackend
from qwen_megakernel.decoding.interface import DecoderBackend
from qwen_megakernel.decoding.kernel_backend import MegakernelBackend
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.engine.memory import CacheSizes
from qwen_megakernel.installation import kernel_tuning, known_gpus
from qwen_megakernel.installation.kernel_tuning import Setting, Target, Tuning
from qwen_megakernel.model.talker import Talker

BACKENDS = ("auto", "torch", "megakernel")
Progress = Callable[[str], None]
_Made = TypeVar("_Made")
_TELL_EVERY_S = 10.0
_KERNELS = {"backend": "the megakernel", "codec": "the codec's kernels"}


def in_daemon_thread(function: Callable[..., _Made], *args: Any) -> Future[_Made]:
    """Run a function in a thread. Unlike an executor's, it does not keep the process from ending."""
    future: Future[_Made] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, name=function.__name__, daemon=True).start()
    return future


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel can run, as far as that is known before the build; None if one can."""
    if device.type != "cuda":
        return "the kernels need a CUDA GPU"
    if dtype != torch.bfloat16:
        return f"the kernels compute in bf16, not in {str(dtype).removeprefix('torch.')}"
    try:
        detect_arch(device)
    except BuildError as error:
        return str(error)
    return None


def tuning_target(config: ModelConfig, device: torch.device, form: str = "auto") -> Target:
    """The target that a tuning of the frame kernel must match to be used for a shape on a GPU.

    Args:
        config: the shape.
        device: the GPU.
        form: the form of the kernel, one of `build_tts.FORMS`.

    Raises:
        BuildError: the GPU or the shape cannot have the kernel.
    """
    arch, gpu = detect_arch(device), torch.cuda.get_device_properties(device)
    library = frame_library(config, arch, form)
    return Target(
        gpu=torch.cuda.get_device_name(device),
        sms=gpu.multi_processor_count,
        arch=arch,
        form=form_of(arch, form),
        geometry=library.header,
        digest=build_digest(library, arch),
    )


class Backends:
    """Makes the decoder and the codec of one checkpoint.

    `auto` takes the frame kernel and the codec's kernels, each if it can run, otherwise PyTorch, and
    says why. `megakernel` is both kernels or an error, `torch` neither. PyTorch on a GPU is CUDA graphs,
    and eager only where they cannot be captured.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
        sms: int | None = None,
    ) -> None:
        """Begin to build missing libraries in threads, so that weights can be read meanwhile.

        Args:
            name: one of `BACKENDS`.
            config: of the checkpoint.
            device, dtype: where the model will run, and in which number format.
            progress: called with a line for each step, from any thread.
            sms: streaming multiprocessors that a frame takes; None is all, or what `tune` has chosen.

        Raises:
            CheckpointError: an unknown backend; `megakernel` or `sms` where the kernels cannot run.
        """
        if name not in BACKENDS:
            raise CheckpointError(f"backend is {name!r}, allowed: {', '.join(BACKENDS)}")
        self._name, self._config, self._progress, self._sms = name, config, progress, sms
        self._device, self._on_gpu = device, device.type == "cuda"
        self._builds: dict[str, Future[Path]] = {}
        self._runs: dict[str, str] = {}
        self._notes: list[str] = []
        self._tuning: Tuning | None = None
        if name == "torch":
            if sms is not None:
                self._refuse(_KERNELS["backend"], "backend is torch")
            return
        if reason := why_no_kernels(device, dtype):
            self._refuse("the kernels", reason)
            return
        arch = detect_arch(device)

        def build_frame() -> Path:
            self._tuning = kernel_tuning.find(tuning_target(config, device), progress)
            slots = self._setting.ring_slots
            return build(frame_library(config, arch, ring_slots=slots), arch, progress)

        self._builds["backend"] = in_daemon_thread(build_frame)
        self._builds["codec"] = in_daemon_thread(build, codec_library(arch), arch, progress)

    def make_decoder(
        self, talker: Talker, *, num_slots: int, max_positions: int, num_pages: int | None = None
    ) -> DecoderBackend:
        """The decoder backend; if it is the kernel, `talker` keeps only the weights that prompts need.

        Raises:
            CheckpointError: `megakernel` or `sms` was named and cannot run.
        """
        shape = (talker, self._config.talker, self._config.predictor)
        sizes: dict[str, Any] = {
            "num_slots": num_slots,
            "max_positions": max_positions,
            "num_pages": num_pages,
        }

        def kernel(library: Path) -> DecoderBackend:
            self._progress("packing the weights for the frame kernel")
            setting = self._setting
            grid = setting.grid if self._sms is None else self._sms
            made: DecoderBackend = MegakernelBackend(
                *shape, library=library, grid=grid, l2_share=setting.l2_share, **sizes
            )
            if self._tuning is not None:
                self._runs["tuning"] = str(self._tuning)
            if self._sms is not None:
                num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count
                self._runs["sms"] = f"a frame takes {self._sms} of {num_sms}"
            elif expected := self._expected_frames():
                self._runs["expect"] = expected
            _forget_layers(talker)
            return made

        def in_pytorch() -> TorchBackend:
            return self._make_in_pytorch(
                "backend",
                lambda: GraphBackend(*shape, **sizes, progress=self._progress),
                lambda: TorchBackend(*shape, **sizes),
            )

        return self._make("backend", "megakernel", kernel, in_pytorch)

    def make_codec(self, decoder: CodecDecoder, num_slots: int, max_streams: int) -> FrameCodec:
        """The codec, for launches of at most `max_streams` of the slots.

        Raises:
            CheckpointError: `megakernel` was named and the codec's kernels cannot run.
        """

        def kernels(library: Path) -> FrameCodec:
            self._progress("capturing the codec's graphs")
            stream: FrameCodec = CudaCodecStream(decoder, num_slots, library, max_streams=max_streams)
            return stream

        def in_pytorch() -> FrameCodec:
            options: dict[str, Any] = {"max_streams": max_streams, "progress": self._progress}
            codec: FrameCodec = self._make_in_pytorch(
                "codec",
                lambda: GraphCodecStream(decoder, num_slots, **options),
                lambda: CodecStream(decoder, num_slots),
            )
            return codec

        codec: FrameCodec = self._make("codec", "kernels", kernels, in_pytorch)
        return codec

    @property
    def description(self) -> dict[str, str]:
        """What runs: `backend` and `codec`. Where they apply, also `tuning` (of the frame kernel), `sms`
        (if chosen), `expect` (a frame's time, on a known GPU) and `note` (why a slower one runs)."""
        return self._runs | ({"note": "; ".join(self._notes)} if self._notes else {})

    def _expected_frames(self) -> str | None:
        talker = self._config.talker
        if (talker.hidden_size, talker.num_layers) != (known_gpus.HIDDEN_SIZE, known_gpus.NUM_LAYERS):
            return None
        return known_gpus.expected_frames(torch.cuda.get_device_name(self._device))

    @property
    def _setting(self) -> Setting:
        return self._tuning.setting if self._tuning is not None else Setting()

    def _make(
        self, part: str, label: str, kernel: Callable[[Path], _Made], in_pytorch: Callable[[], _Made]
    ) -> _Made:
        if part in self._builds:
            try:
                made = kernel(self._built(part))
            except torch.OutOfMemoryError:
                raise  # PyTorch needs just as much memory
            except (BuildError, RuntimeError, OSError, ValueError) as error:
                self._refuse(_KERNELS[part], " ".join(str(error).split()))
            else:
                self._runs[part] = label
                return made
        return in_pytorch()

    def _make_in_pytorch(
        self, part: str, graphs: Callable[[], _Made], eager: Callable[[], _Made]
    ) -> _Made:
        if self._on_gpu:
            try:
                made = graphs()
            except torch.OutOfMemoryError:
                raise  # eager PyTorch needs just as much memory
            except RuntimeError as error:
                reason = " ".join(str(error).split())
            else:
                self._runs[part] = "torch, CUDA graphs"
                return made
            self._note(f"eager PyTorch instead of CUDA graphs: {reason}")
        self._runs[part] = "torch"
        return eager()

    def _built(self, part: str) -> Path:
        """Wait for a build. Raises what it raised."""
        build, started = self._builds[part], time.monotonic()
        while not wait([build], timeout=_TELL_EVERY_S).done:
            self._progress(f"compiling {_KERNELS[part]}, {time.monotonic() - started:.0f} s more")
        return build.result()

    def _refuse(self, what: str, reason: str) -> None:
        """Note why the kernels do not run; raise, if what was asked for needs them."""
        if self._name == "megakernel":
            raise CheckpointError(
                f"backend megakernel cannot run: {reason} (--backend auto runs without it)"
            )
        if self._sms is not None and what != _KERNELS["codec"]:
            raise CheckpointError(f"sms is {self._sms}, and only the frame kernel has them: {reason}")
        self._note(f"PyTorch instead of {what}: {reason}")

    def _note(self, line: str) -> None:
        self._notes.append(line)
        self._progress(line)


def _forget_layers(talker: Talker) -> None:
    """Free the weights of which the kernel has its own copy."""
    predictor = talker.code_predictor
    talker.model.layers = predictor.model.layers = predictor.lm_head = nn.ModuleList()
    torch.cuda.empty_cache()


def memory_refusal(device: torch.device, sizes: CacheSizes) -> str:
    """The error message for a GPU that has too little memory for caches of these sizes."""
    free, total = (size / 1e9 for size in torch.cuda.mem_get_info(device))
    return (
        f"the GPU has too little memory: {free:.1f} of {total:.1f} GB are left, and the caches take "
        f"{sizes.num_bytes / 1e9:.1f} GB beside the weights; give them less (--memory), "
        "or end what else runs there (nvidia-smi lists it)"
    )
