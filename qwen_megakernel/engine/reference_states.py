"""The codec state at the end of each voice's reference, where the speech of a clone in context begins.

The speech of such a voice continues its recording. For its sound to do so too, the codec must have
decoded the recording. That is done once for each voice, and each turn copies the resulting state.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from qwen_megakernel.codec.interface import CodecState, FrameCodec
from qwen_megakernel.prompt.voice import Voice

MAX_STATES = 64
"""States that are kept: 2.6 MB each at the released shape in bf16, with the codec's kernels 8.8 MB. The
least recently used is dropped."""
_CHUNK_FRAMES, _CONTEXT_FRAMES = 300, 25
"""Frames that the official package decodes at a time, and frames of context before them."""


def official_context(ref_codes: Tensor) -> Tensor:
    """The frames of a reference that the official package decodes together with the first speech.

    All of them up to 24 s; of a longer one those of the last chunk and its context.
    """
    chunk_start = len(ref_codes) // _CHUNK_FRAMES * _CHUNK_FRAMES
    return ref_codes[max(0, chunk_start - _CONTEXT_FRAMES) :]


class ReferenceStates:
    """The states of one codec, by voice; of one thread, that of the codec's launches."""

    def __init__(self) -> None:
        self._states: OrderedDict[int, tuple[Voice, CodecState]] = OrderedDict()

    def begin(self, codec: FrameCodec, slot: int, voice: Voice) -> None:
        """Make a slot ready for an utterance of the voice."""
        if voice.ref_codes is None:
            codec.reset(slot)
        else:
            codec.restore(slot, self._state_of(codec, voice))

    def _state_of(self, codec: FrameCodec, voice: Voice) -> CodecState:
        key = id(voice)  # the entry keeps the voice, so nothing else gets its id
        if key not in self._states:
            self._states[key] = (voice, codec.state_after(official_context(voice.ref_codes)))
            if len(self._states) > MAX_STATES:
                self._states.popitem(last=False)
        self._states.move_to_end(key)
        return self._states[key][1]
