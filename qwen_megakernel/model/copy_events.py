"""How the host waits for copies from a GPU."""

from __future__ import annotations

import torch

BLOCKS_FROM = 16
"""From this many streams on, the host waits without spinning. A core is then worth more than the tens of
microseconds that it takes to wake up."""


class CopyEvents:
    """Two events for one kind of copy. The host spins on one and sleeps on the other."""

    def __init__(self) -> None:
        self._spins, self._blocks = torch.cuda.Event(), torch.cuda.Event(blocking=True)

    def choose(self, num_streams: int) -> torch.cuda.Event:
        """The event to record and to wait for when a copy is for `num_streams` streams."""
        return self._blocks if num_streams >= BLOCKS_FROM else self._spins
