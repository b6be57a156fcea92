"""When a turn ends because nothing more is heard."""

import numpy as np

from qwen_megakernel.config import HOP, Guards
from qwen_megakernel.engine.active_turn import RunawayGuard


def test_silence_ends_only_after_the_text():
    guard = RunawayGuard(Guards(silence_s=0.4))
    quiet, loud = np.full(HOP, 1e-4, np.float32), np.full(HOP, 0.1, np.float32)
    for _ in range(20):
        assert not guard.silent_after(quiet, text_exhausted=False)
    for _ in range(4):
        assert not guard.silent_after(quiet, text_exhausted=True)
    assert not guard.silent_after(loud, text_exhausted=True)
    verdicts = [guard.silent_after(quiet, text_exhausted=True) for _ in range(5)]
    assert verdicts == [False, False, False, False, True]
