"""More turns than the engine can hold: who was let in never runs dry, and nothing is wasted.

The engine is the real one, with real prompts. Decoder and codec only take time, as a GPU does. The clock
is virtual: it moves by the times that are given for the GPU's work and the host's.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.codec.interface import LaunchedAudio
from qwen_megakernel.config import FRAME_S, HOP, SAMPLE_RATE
from qwen_megakernel.decoding.interface import LaunchedFrame
from qwen_megakernel.decoding.kv_cache import KvCache
from qwen_megakernel.engine.active_turn import TurnRequest
from qwen_megakernel.engine.engine import Engine
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.serving.admission import predicted_start_s
from qwen_megakernel.synth.config import shape_config
from qwen_megakernel.turn import Audio, Finished

CONFIG = shape_config("tiny").talker
SLOTS, BATCH, PAGES = 160, 8, 400
FRAMES = (33, 117)
"""Lengths of turns, evenly distributed."""
FRAME_MS, CODEC_MS, PROMPT_MS = 3.5, 1.5, 1.0
VOICES = BATCH * FRAME_S * 1000 / (FRAME_MS + CODEC_MS)
"""What full frames could serve if nothing else took time: 128."""
RATE = VOICES / (sum(FRAMES) / 2 * FRAME_S)
"""Turns a second of so many voices."""
SECONDS, MAX_QUEUE_S = 20.0, 10.0


@dataclass
class Machine:
    """A virtual clock, and a GPU that does one thing after another."""

    now: float = 1000.0
    gpu_free: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def queue(self, milliseconds: float) -> float:
        """Give the GPU work. Returns when it is done."""
        self.gpu_free = max(self.gpu_free, self.now) + milliseconds / 1000
        return self.gpu_free

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


class Decoder:
    """Takes a GPU's time, and ends each turn after a random number of frames."""

    num_slots, max_positions, max_batch = SLOTS, 2048, BATCH

    def __init__(self, machine: Machine, host_ms: float) -> None:
        self._machine, self._host_ms, self._random = machine, host_ms, random.Random(1)
        self.kv_cache = KvCache(
            CONFIG, SLOTS, 2048, dtype=torch.bfloat16, device=torch.device("cpu"), num_pages=PAGES
        )
        self._left: dict[int, int] = {}

    def prefill(self, slot, rows, params, shared):
        self._machine.queue(PROMPT_MS)
        self._left[slot] = self._random.randint(*FRAMES)

    def launch(self, slots, rows):
        self._machine.now += self._host_ms / 1000 * self._random.uniform(0.6, 1.4)
        done_at = self._machine.queue(FRAME_MS * self._random.uniform(0.8, 1.2))
        codes = torch.arange(len(slots) * 16).view(-1, 16) + self._left[slots[0]]
        for row, slot in enumerate(slots):
            self._left[slot] -= 1
            if not self._left[slot]:
                codes[row, 0] = CONFIG.codec_eos_id

        def wait():
            self._machine.wait(done_at)
            return codes

        return LaunchedFrame(codes, wait)

    def release(self, slot):
        del self._left[slot]


class Codec:
    """Takes a GPU's time, and makes a loud sound."""

    num_slots = SLOTS

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def reset(self, slot):
        pass

    def launch(self, slots, codes):
        done_at = self._machine.queue(CODEC_MS)

        def samples():
            self._machine.wait(done_at)
            return np.full((len(slots), HOP), 0.5, np.float32)

        return LaunchedAudio(lambda: self._machine.now >= done_at, samples)


@dataclass
class Caller:
    """Plays a turn's audio as it comes."""

    machine: Machine
    num_samples: int = 0
    ends_at: float | None = None
    """When the audio that has come is played."""
    gaps_s: list[float] = field(default_factory=list)
    reason: str | None = None

    def __call__(self, event: object) -> None:
        if isinstance(event, Audio):
            now = self.machine.now
            if self.ends_at is not None and now > self.ends_at:
                self.gaps_s.append(now - self.ends_at)
            self.ends_at = max(self.ends_at or now, now) + len(event.samples) / SAMPLE_RATE
            self.num_samples += len(event.samples)
        elif isinstance(event, Finished):
            self.reason = event.reason


@pytest.mark.parametrize(
    ("share", "host_ms"),
    [(1.3, 4.0), pytest.param(2.0, 0.2, marks=pytest.mark.slow)],
    ids=["slow host", "quick host"],
)
def test_who_is_let_in_does_not_run_dry(share, host_ms, tiny_voice_design, monkeypatch):
    with TTSDecoder.load(tiny_voice_design, num_slots=1) as tts:
        prompts = tts._prompts
    machine, draw = Machine(), random.Random(3)
    monkeypatch.setattr(Engine, "_run", lambda engine: None)  # this thread runs the ticks
    engine = Engine(Decoder(machine, host_ms), Codec(machine), prompts, eos_id=CONFIG.codec_eos_id)
    engine.thread.join()
    monkeypatch.setattr(time, "monotonic", machine.monotonic)
    callers, ends_at = [], machine.now + SECONDS
    arrivals = deque([machine.now])
    while arrivals[-1] < ends_at:
        arrivals.append(arrivals[-1] + draw.expovariate(share * RATE))
    while machine.now < ends_at:
        while arrivals[0] <= machine.now:
            arrivals.popleft()
            owner = (draw.randrange(40),)
            if predicted_start_s(engine.capacity(owner)) > MAX_QUEUE_S:
                continue
            callers.append(Caller(machine))
            request = TurnRequest(
                voice=Voice.designed(), params=GenerationParams(), max_lead_s=10.0, owner=owner
            )
            engine.open_turn(request, callers[-1], "The train leaves at nine. " * 3, end=True)
        if not engine._tick():
            machine.wait(min(arrivals[0], machine.now + engine._idle_timeout()))
    dry = [caller.gaps_s for caller in callers if caller.gaps_s]
    assert not dry, f"{len(dry)} of {len(callers)} turns ran dry"
    made = sum(caller.num_samples for caller in callers) / SAMPLE_RATE / SECONDS
    num_prompts = RATE * BATCH * FRAME_S / VOICES  # for each frame
    tick_ms = FRAME_MS + CODEC_MS + PROMPT_MS * num_prompts + max(0.0, host_ms - CODEC_MS)
    held = BATCH * FRAME_S * 1000 / tick_ms
    assert made > 0.85 * held, "audio a second; the engine must not shut out more turns than it has to"
    assert {caller.reason for caller in callers} <= {None, "stop"}
