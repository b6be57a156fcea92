"""The decoder seam: what the engine asks of a decoder, frame by frame.

All decode state of a stream lives in a numbered slot: keys and values, position, sampling state,
draw key and the codes fed back. A backend knows nothing of text, voices, turns or audio:

    prefill(slot, rows, params)      takes the prompt; the slot is live
    launch(slots, text_rows)         begins one frame of each slot -> its codes, once they are computed
    release(slot)                    frees the slot

`prefill` runs all prompt rows but the last. Every `launch` runs one row of each slot plus the text
row that the caller passes: at first the last prompt row, then the sum of the previous frame's 16 code
embeddings. So a frame is always talker, then predictor, and a stream whose next text is late is
simply left out of `launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.kv_cache import KvCache
from qwen_megakernel.prompt.shared_rows import SharedRows


@dataclass(frozen=True, slots=True)
class LaunchedFrame:
    """A frame that the device may still be computing."""

    device_codes: Tensor
    """Integers [n, 16] on the backend's device, for work that is queued on the current stream after
    this frame and before the next."""
    codes: Callable[[], Tensor]
    """Waits for the frame: int64 [n, 16] on the CPU. Call it before the next launch."""


class DecoderBackend(Protocol):
    """The decoder that the engine drives. `TorchBackend` is the specification.

    A backend does its work in the order of the calls. On a GPU, `prefill` and `launch` may return
    before their work is done.
    """

    num_slots: int
    """Streams that can be live."""
    max_batch: int
    """The most streams that one frame decodes."""
    max_positions: int
    """Prompt rows plus frames that a slot can hold."""
    kv_cache: KvCache
    """A slot's pages may be reserved before its stream begins. The slot keeps them until they are freed.
    A stream without a reservation takes pages for `max_positions` and keeps them until its release."""

    def prefill(
        self, slot: int, rows: Tensor, params: GenerationParams, shared: SharedRows | None = None
    ) -> None:
        """Start a stream in a free slot.

        Args:
            slot: 0 .. num_slots - 1.
            rows: [p, hidden] prompt rows in the model's dtype, 1 <= p < max_positions.
            params: sampling of talker and predictor, seed, minimum length.
            shared: how many of the first rows other prompts share, at most p - 1. None: no shared rows.
        """

    def launch(
        self, slots: Sequence[int], text_rows: Tensor, noise: Tensor | None = None
    ) -> LaunchedFrame:
        """Begin one frame of each slot. A frame whose code 0 is EOS ends its stream and has no audio.

        Args:
            slots: 1 to `max_batch` different live slots.
            text_rows: [n, hidden], added to the input rows of this frame; zeros in a slot's first.
            noise: fp32 [n, 16, talker vocabulary] to use instead of the slots' own draws (tests).
        """

    def release(self, slot: int) -> None:
        """Free a slot, even while its frame runs; its next stream sees nothing of this one."""


def check_max_positions(num_slots: int, max_positions: int, limit: int) -> None:
    """Check a backend's sizes. Raises `ValueError`."""
    if num_slots < 1:
        raise ValueError(f"num_slots is {num_slots}, allowed: at least 1")
    if not 2 <= max_positions <= limit:
        raise ValueError(f"max_positions is {max_positions}, allowed: 2 to {limit}")


def check_prefill(
    backend: DecoderBackend,
    slot: int,
    in_use: bool,
    rows: Tensor,
    hidden: int,
    shared: SharedRows | None,
) -> None:
    """Check the arguments of `DecoderBackend.prefill`. Raises `ValueError`."""
    if not 0 <= slot < backend.num_slots:
        raise ValueError(f"slot is {slot}, allowed: 0 to {backend.num_slots - 1}")
    if in_use:
        raise ValueError(f"slot {slot} is in use")
    if rows.ndim != 2 or rows.shape[1] != hidden:
        raise ValueError(f"rows is {list(rows.shape)}, expected [p, {hidden}]")
    room = backend.kv_cache.room(slot) or backend.max_positions
    if not 1 <= rows.shape[0] < room:
        raise ValueError(f"the prompt has {rows.shape[0]} rows, allowed: 1 to {room - 1}")
    if shared and not 0 <= shared.count < rows.shape[0]:
        raise ValueError(f"{shared.count} rows are shared, allowed: 0 to {rows.shape[0] - 1}")


class HasPosition(Protocol):
    """A live stream."""

    position: int
    """Rows in its KV cache."""


def check_decode(
    backend: DecoderBackend,
    slots: Sequence[int],
    streams: Mapping[int, HasPosition],
    text_rows: Tensor,
    hidden: int,
) -> None:
    """Check the arguments of `DecoderBackend.launch`; `streams` by live slot. Raises `ValueError`."""
    if not 1 <= len(slots) <= backend.max_batch:
        raise ValueError(f"{len(slots)} slots in a frame, allowed: 1 to {backend.max_batch}")
    if len(set(slots)) != len(slots):
        raise ValueError(f"slots {list(slots)} repeat")
    for slot in slots:
        if slot not in streams:
            raise ValueError(f"slot {slot} is not in use")
        if streams[slot].position >= (room := backend.kv_cache.room(slot)):
            raise ValueError(f"slot {slot} is full: {room} positions")
    expected = (len(slots), hidden)
    if tuple(text_rows.shape) != expected:
        raise ValueError(f"text_rows is {list(text_rows.shape)}, expected {list(expected)}")
