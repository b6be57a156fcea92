"""The account of a context: what it counts."""

import numpy as np

from qwen_megakernel.serving.account import Account
from qwen_megakernel.turn import Audio, Finished


def test_playback_that_runs_dry_counts_within_an_utterance_only():
    account, samples = Account(), np.zeros(1920, np.float32)
    for _ in range(2):
        account.mark_dry()
        account.add_audio(Audio(samples, generation_s=0.1), len(samples))
        account.mark_dry()
        account.add_audio(Audio(samples, generation_s=0.2), len(samples))
        account.add_turn(Finished("stop", 2, 3840, generation_s=0.2))
    assert account.num_dry == 2
