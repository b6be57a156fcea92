"""What an engine does while no turn is open: it keeps the GPU warm, and gives its memory back.

A GPU that has nothing to do lowers its clocks, and the first turn after a pause is slow. A frame now and
then keeps them up. Nobody hears it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal

import torch

from qwen_megakernel.checkpoint import CheckpointError
from qwen_megakernel.codec.interface import FrameCodec
from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.interface import DecoderBackend
from qwen_megakernel.engine.model_loader import ModelLoader
from qwen_megakernel.prompt.builder import PromptBuilder

log = logging.getLogger(__name__)

WARM_EVERY_S = 0.5
_PROMPT_ROWS = 2

Memory = Literal["loaded", "loading", "unloaded"]
Due = Literal["warm", "unload"]


@dataclass(frozen=True, slots=True)
class StandbyPlan:
    """What the engine shall do while no turn is open."""

    keep_warm: bool = False
    """Whether to decode a frame every `WARM_EVERY_S` seconds, as long as the model is loaded."""
    unload_after_s: float | None = None
    """Seconds without a turn after which the model leaves the device; None is never."""


class Standby:
    """Decides what is due while no turn is open, and knows whether the model is on the device."""

    def __init__(self, plan: StandbyPlan, loader: ModelLoader | None, prompts: PromptBuilder) -> None:
        """`loader` loads the model again after the plan has unloaded it. Raises `ValueError` if it is
        None and the plan unloads."""
        if plan.unload_after_s is not None and loader is None:
            raise ValueError("a model that is unloaded needs a loader")
        self._plan, self._loader, self._prompts = plan, loader, prompts
        self._since: float | None = None
        """When the last turn ended; None while turns are open."""
        self._warm_at = 0.0
        self.memory: Memory = "loaded"
        """State of the model. Any thread may read it."""
        self.num_warm_frames = 0
        """Number of frames that kept the GPU warm. Any thread may read it."""

    @property
    def loaded(self) -> bool:
        """Whether the model is on the device. Any thread may ask."""
        return self.memory == "loaded"

    def end(self) -> None:
        """Note that a turn is open."""
        self._since = None

    def due(self, now: float) -> Due | None:
        """What to do at `now` (`time.monotonic()`), while no turn is open; None if nothing is due."""
        if self._since is None:
            self._since, self._warm_at = now, now + WARM_EVERY_S
        if not self.loaded:
            return None
        if self._plan.unload_after_s is not None and now - self._since >= self._plan.unload_after_s:
            return "unload"
        return "warm" if self._plan.keep_warm and now >= self._warm_at else None

    def wait_s(self, now: float) -> float | None:
        """Seconds until something is due; None if nothing will be."""
        if self._since is None or not self.loaded:
            return None
        times = [self._warm_at] if self._plan.keep_warm else []
        if self._plan.unload_after_s is not None:
            times.append(self._since + self._plan.unload_after_s)
        return max(0.0, min(times) - now) if times else None

    def warm(self, backend: DecoderBackend, codec: FrameCodec) -> None:
        """Decode one frame of a stream that nobody hears, in slot 0: all slots are free."""
        row = self._prompts.pad_row
        with torch.inference_mode():
            codec.reset(0)
            backend.prefill(0, row.repeat(_PROMPT_ROWS, 1), GenerationParams(seed=0))
            frame = backend.launch([0], torch.zeros_like(row)[None])
            audio = codec.launch([0], frame.device_codes)
            frame.codes()
            audio.samples()
            backend.release(0)
        self.num_warm_frames += 1
        self._warm_at = time.monotonic() + WARM_EVERY_S

    def unload(self) -> None:
        """Give the device's memory back. The caller must have dropped decoder and codec."""
        assert self._loader is not None
        start, self.memory = time.monotonic(), "unloaded"
        self._prompts.unload()
        self._loader.free()
        log.info("nobody speaks: the model was unloaded in %.1f s", time.monotonic() - start)

    def load(self) -> tuple[DecoderBackend, FrameCodec]:
        """Load decoder and codec again. Raises `CheckpointError` if that fails; the model then stays
        unloaded."""
        assert self._loader is not None
        start, self.memory = time.monotonic(), "loading"
        try:
            loaded = self._loader.load(self._prompts.load)
        except CheckpointError as error:
            said = f"the model could not be loaded: {error}"
        else:
            self.memory = "loaded"
            log.info("the model was loaded again in %.1f s", time.monotonic() - start)
            return loaded
        log.error("%s", said)
        self.memory = "unloaded"
        self._prompts.unload()
        self._loader.free()  # after the error and what its traceback holds are gone
        raise CheckpointError(said)
