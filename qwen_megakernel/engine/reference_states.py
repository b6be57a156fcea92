"""The codec state at the end of each voice's reference recording, for clones in context.

The speech of such a voice continues its recording, so the codec must decode the recording first. That
happens once for each voice. Each turn starts with a copy of the resulting state.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from qwen_megakernel.codec.interface import CodecState, FrameCodec
from qwen_megakernel.prompt.voice import Voice

MAX_STATES = 64
"""The number of states that are kept; the least recently used is dropped. At the released shape a
state has 2.6 MB in bf16, and 8.8 MB with the codec's kernels."""
_CHUNK_FRAMES, _CONTEXT_FRAMES = 300, 25
"""Frames in a chunk of the official package's decoder, and frames of context before each chunk."""


def official_context(ref_codes: Tensor) -> Tensor:
    """The frames of a reference that the official package decodes together with the first speech.

    A reference of up to 24 s has all its frames in there. A longer one has those of the last chunk and
    its context.
    """
    chunk_start = len(ref_codes) // _CHUNK_FRAMES * _CHUNK_FRAMES
    return ref_codes[max(0, chunk_start - _CONTEXT_FRAMES) :]


class ReferenceStates:
    """The states of one codec, by voice. Only the thread that launches the codec may use it."""

    def __init__(self) -> None:
        self._states: OrderedDict[int, tuple[Voice, CodecState]] = OrderedDict()

    def begin(self, codec: FrameCodec, slot: int, voice: Voice) -> None:
        """Make a slot ready for an utterance of the voice."""
        if voice.ref_codes is None:
            codec.reset(slot)
        else:
            codec.restore(slot, self._state_of(codec, voice))

    def _state_of(self, codec: FrameCodec, voice: Voice) -> CodecState:
        key = id(voice)  # the entry holds the voice, so no other object gets its id
        if key not in self._states:
            self._states[key] = (voice, codec.state_after(official_context(voice.ref_codes)))
            if len(self._states) > MAX_STATES:
                self._states.popitem(last=False)
        self._states.move_to_end(key)
        return self._states[key][1]
