"""Puts a checkpoint's model on its device: at the start, and again after its memory was given back.

Nothing of the weights stays in the process meanwhile. They are read from the files again, which the
operating system keeps in memory as long as it has room.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

from qwen_megakernel.checkpoint import Checkpoint, CheckpointError
from qwen_megakernel.codec.decoder import CodecDecoder
from qwen_megakernel.codec.interface import FrameCodec
from qwen_megakernel.decoding.interface import DecoderBackend
from qwen_megakernel.engine.backends import Backends, Progress, memory_refusal
from qwen_megakernel.engine.memory import CacheSizes
from qwen_megakernel.model.talker import Talker


class ModelLoader:
    """The weights, caches and graphs of one checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backends: Backends,
        *,
        device: torch.device,
        dtype: torch.dtype,
        sizes: CacheSizes,
        max_positions: int,
        progress: Progress,
    ) -> None:
        """Keep the arguments. `load` loads the model."""
        self._checkpoint, self._backends = checkpoint, backends
        self._device, self._dtype = device, dtype
        self._sizes, self._max_positions = sizes, max_positions
        self._progress = progress
        self._froze = False
        self.also_free: Callable[[], object] = lambda: None
        """Called by `free`: drops other models that are on the device."""
        self.num_weights = 0
        """Number of weights of the loaded model."""

    def load(self, take_talker: Callable[[Talker], object]) -> tuple[DecoderBackend, FrameCodec]:
        """Decoder and codec on the device.

        Args:
            take_talker: makes or fills the prompt builder, before the decoder takes the talker's layers.

        Raises:
            CheckpointError: the files or the device's memory do not suffice.
        """
        try:
            loaded = self._load(take_talker)
        except torch.OutOfMemoryError as error:
            raise CheckpointError(memory_refusal(self._device, self._sizes)) from error
        if self._froze:
            gc.freeze()
        return loaded

    def _load(self, take_talker: Callable[[Talker], object]) -> tuple[DecoderBackend, FrameCodec]:
        config, tell, slots = self._checkpoint.config, self._progress, self._sizes.num_slots
        tell("laying out the modules")
        with torch.device("meta"):
            talker, codec = Talker(config.talker, config.predictor), CodecDecoder(config.codec)
        tell("loading the talker and the code predictor")
        self._checkpoint.load("talker.", talker, dtype=self._dtype, device=self._device)
        tell("loading the codec")
        self._checkpoint.load("decoder.", codec, dtype=self._dtype, device=self._device)
        self.num_weights = _num_weights(talker) + _num_weights(codec)
        take_talker(talker)
        decoder = self._backends.make_decoder(
            talker,
            num_slots=slots,
            num_pages=self._sizes.num_pages,
            max_positions=self._max_positions,
        )
        tell(f"reserved {self._sizes}")
        return decoder, self._backends.make_codec(codec, slots, decoder.max_batch)

    def free(self) -> None:
        """Give the device's memory back, after the caller has dropped decoder and codec."""
        self.also_free()
        self._froze = self._froze or gc.get_freeze_count() > 0
        gc.unfreeze()  # what was loaded has cycles, and the collector leaves frozen objects alone
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _num_weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
