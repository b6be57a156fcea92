"""Odd texts on a model that does not end by itself: each turn ends, and within its limit."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from listener import Listener, wait_idle

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.config import Guards, SamplingParams

NUM_TEXTS = 500
AT_ONCE = 20
GUARDS = Guards(base_frames=6, frames_per_token=1)
WORDS = "1次 … ... 😀 ½ Ⅳ ﷺ - ?! «» a Q ß 中 の 한 ক 7 3.14 1e999 %s {} <|im_end|> http://x"
OTHERS = ("\u0301", "\u200b", "\0", "\t", "\n", " ", "👨\u200d👩\u200d👧", "\ud83d", "\U00016d40")
PIECES = (*WORDS.split(), *OTHERS)


def odd_texts() -> list[str]:
    """The same texts each time. A few of them are long."""
    choose = random.Random(0)
    texts = []
    for number in range(NUM_TEXTS):
        count = 40 if number % 50 == 0 else choose.randint(1, 4)
        texts.append(
            choose.choice(PIECES) * count
            if number % 5 == 0
            else "".join(choose.choices(PIECES, k=count))
        )
    return [*texts[1:], "0123456789" * 12]


@pytest.mark.slow
def test_odd_texts_end_within_their_limits(tiny_base, recording, report):
    wild, ends = SamplingParams(10, 0, 1.0), Counter()
    with TTSDecoder.load(tiny_base, num_slots=AT_ONCE, device="cpu", backend="torch") as tts:
        tts.add_voice("default", tts.clone_voice(recording.read_bytes()))
        texts = odd_texts()
        for start in range(0, NUM_TEXTS, AT_ONCE):
            listeners = []
            for number, text in enumerate(texts[start : start + AT_ONCE], start):
                feed = tts._prompts.open_feed()
                limit = GUARDS.budget(len(feed.append(text.replace("\ud83d", "\ufffd")) + feed.flush()))
                listener = Listener()
                params = GenerationParams(wild, wild, seed=number, guards=GUARDS)
                if text.strip():
                    tts.open_turn(text, sink=listener, ended=True, params=params)
                    listeners.append((text, limit, listener))
            for text, limit, listener in listeners:
                finished = listener.wait(120)
                ends[finished.reason] += 1
                assert finished.num_frames <= limit, text
                assert finished.error is None or finished.reason == "length", text
        wait_idle(tts)
    report(f"{sum(ends.values())} odd texts: {dict(ends)}")
    assert set(ends) <= {"stop", "length", "repeat", "silence"}
    assert ends["length"] > NUM_TEXTS / 3  # otherwise the limits were not tested
