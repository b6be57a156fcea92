"""Leave out the silence before the first sound of a reply, so that the caller does not wait for it.

Only the beginning is cut; all later samples are sent unchanged. All samples before the cut are quieter
than `THRESHOLD`, so the cut makes no click. The last `MARGIN_S` seconds before the sound are kept, for
soft first consonants.
"""

from __future__ import annotations

import numpy as np

from qwen_megakernel.config import SAMPLE_RATE

THRESHOLD = 10 ** (-46 / 20)
"""A sample beyond this is sound: -46 dBFS."""
MARGIN_S = 0.05
"""Seconds before the first sound that are kept."""
LIMIT_S = 1.0
"""The most seconds that are left out. Longer silence is assumed to be intended."""
_MARGIN, _LIMIT = int(MARGIN_S * SAMPLE_RATE), int(LIMIT_S * SAMPLE_RATE)
_NOTHING = np.zeros(0, dtype=np.float32)


class LeadingSilence:
    """Trims the beginning of one reply. The result does not depend on how it is split into chunks."""

    def __init__(self) -> None:
        self.num_cut = 0
        """Samples that were left out, at 24 kHz."""
        self._segment_start = 0
        """Samples that were left out before this segment."""
        self._held = _NOTHING
        """The margin: silence that is sent if sound follows."""
        self._over = False

    def pass_on(self, samples: np.ndarray) -> np.ndarray:
        """Add a chunk, float32 [n]. Returns the samples to send; none while all is silent."""
        if self._over:
            return samples
        held = np.concatenate([self._held, samples])
        loud = np.abs(held) > THRESHOLD
        num_quiet = int(loud.argmax()) if loud.any() else len(held)
        left = _LIMIT - (self.num_cut - self._segment_start)
        kept = held[max(0, min(num_quiet, left) - _MARGIN) :]
        self.num_cut += len(held) - len(kept)
        self._over = num_quiet < len(held) or num_quiet >= left
        self._held, sent = (_NOTHING, kept) if self._over else (kept, _NOTHING)
        return sent

    def end_segment(self) -> None:
        """End a segment that had no more sound. The held margin is left out, and the limit starts
        anew."""
        self.num_cut += len(self._held)
        self._held, self._segment_start = _NOTHING, self.num_cut
