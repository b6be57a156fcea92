"""Frames in flight: if results are as late as a GPU's, turns sound the same as one step at a time.

The decoder and the codec are the real ones on the CPU, but give their results as on a GPU: codes and
samples are in buffers that later launches overwrite, and no sound is ready at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from listener import LONG, PARAMS, TEXT, Listener, always_says, speak, wait_idle
from slow_cases import slow_after
from torch import Tensor

from qwen_megakernel import GenerationParams, SamplingParams, TTSDecoder
from qwen_megakernel.codec.interface import LaunchedAudio
from qwen_megakernel.config import HOP, NUM_CODEBOOKS, Guards
from qwen_megakernel.decoding.interface import LaunchedFrame
from qwen_megakernel.turn import Audio, Finished

NONSENSE = 999_999


class LateBackend:
    """A decoder whose codes are there after a wait, and gone with the next launch."""

    def __init__(self, real) -> None:
        self._real = real
        self._codes = torch.zeros(real.max_batch, NUM_CODEBOOKS, dtype=torch.int64)
        self.batches: list[list[int]] = []

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def launch(self, slots: Sequence[int], text_rows: Tensor) -> LaunchedFrame:
        self.batches.append(list(slots))
        self._codes.fill_(NONSENSE)
        codes = self._codes[: len(slots)]
        codes.copy_(self._real.launch(slots, text_rows).device_codes)
        return LaunchedFrame(codes, codes.clone)


class LateCodec:
    """A codec whose sound is never ready at once. It uses two buffers in turns."""

    def __init__(self, real) -> None:
        self._real = real
        self._buffers = [np.zeros((real.num_slots, HOP), np.float32) for _ in range(2)]
        self.fail = False

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def launch(self, slots: Sequence[int], codes: Tensor) -> LaunchedAudio:
        self._buffers.reverse()
        buffer = self._buffers[0]
        buffer.fill(np.nan)
        buffer[: len(slots)] = self._real.launch(slots, codes).samples()

        def samples() -> np.ndarray:
            if self.fail:
                raise RuntimeError("device lost")
            return buffer[: len(slots)].copy()

        return LaunchedAudio(lambda: False, samples)


def make_late(tts: TTSDecoder) -> None:
    tts._engine._backend = LateBackend(tts._engine._backend)
    tts._engine._codec = LateCodec(tts._engine._codec)


@pytest.fixture(scope="module")
def serial(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=4) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def late(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=4) as loaded:
        make_late(loaded)
        yield loaded


def what(listener: Listener) -> tuple:
    """A turn's outcome, chunk by chunk, without times."""
    chunks = [len(e.samples) for e in listener.events if isinstance(e, Audio)]
    end = listener.events[-1]
    return end.reason, end.num_frames, end.num_samples, chunks


def assert_same(late: Listener, serial: Listener) -> None:
    assert what(late) == what(serial)
    assert np.array_equal(late.samples, serial.samples)


@pytest.mark.parametrize(
    "options", slow_after(1, [{}, {"chunk_frames": 7}, {"streaming": False}]), ids=str
)
def test_a_turn_is_the_same(late, serial, options):
    one = speak(late, **options)
    assert_same(one, speak(serial, **options))
    assert one.events[-1].num_frames == PARAMS.max_frames


def test_only_frames_that_are_heard_are_launched(late):
    """The length is known in advance, and EOS with the codes, so neither costs a frame."""
    backend = late._engine._backend
    backend.batches.clear()
    speak(late)
    assert len(backend.batches) == PARAMS.max_frames
    backend.batches.clear()
    with always_says(late, late.config.talker.codec_eos_id):
        finished = speak(late, params=GenerationParams(seed=1)).events[-1]
    assert finished.reason == "stop"
    assert len(backend.batches) == finished.num_frames + 1


def test_eos_and_repeats_end_as_they_do(late, serial):
    for code, params in (
        (late.config.talker.codec_eos_id, GenerationParams(seed=1)),
        (
            100,
            GenerationParams(
                talker=SamplingParams(0.0, 0, 1.0, 1.0), max_frames=99, guards=Guards(repeat_frames=2)
            ),
        ),
    ):
        spoken = []
        for tts in (late, serial):
            with always_says(tts, code):
                spoken.append(speak(tts, params=params))
        assert_same(*spoken)
        assert spoken[0].events[-1].reason in ("stop", "repeat")


@pytest.mark.slow
def test_silence_ends_on_the_same_frame_and_drops_the_one_in_flight(late, serial):
    guards = Guards(silence_s=0.16, silence_rms=10.0)  # everything is silence
    params = GenerationParams(seed=5, max_frames=200, guards=guards)
    backend = late._engine._backend
    backend.batches.clear()
    one = speak(late, "Hello.", params=params)
    assert_same(one, speak(serial, "Hello.", params=params))
    assert one.events[-1].reason == "silence"
    assert len(backend.batches) == one.events[-1].num_frames + 1
    assert_same(speak(late), speak(serial))  # in the slot that was left in flight


@pytest.mark.slow
def test_turns_that_join_and_leave_sound_as_alone(late, serial):
    plans = [
        {"params": GenerationParams(seed=20 + i, max_frames=6 + 5 * i), "chunk_frames": 1 + i % 3}
        for i in range(7)  # more than slots
    ]
    listeners = [Listener() for _ in plans]
    for listener, plan in zip(listeners, plans, strict=True):
        late.open_turn(TEXT, sink=listener, ended=True, **plan)
        time.sleep(0.05)
    for listener, plan in zip(listeners, plans, strict=True):
        listener.wait()
        alone = speak(serial, **plan)
        assert listener.events[-1].num_frames == alone.events[-1].num_frames
        np.testing.assert_allclose(listener.samples, alone.samples, atol=1e-5)


@pytest.mark.slow
def test_no_frame_is_wider_than_the_backend(tiny_base, serial):
    with TTSDecoder.load(tiny_base, num_slots=4) as tts:
        make_late(tts)
        backend = tts._engine._backend
        backend.max_batch = 2
        listeners = [Listener() for _ in range(4)]
        for listener in listeners:
            tts.open_turn(TEXT, sink=listener, ended=True, params=PARAMS)
        for listener in listeners:
            assert listener.wait().num_frames == PARAMS.max_frames
        assert max(len(slots) for slots in backend.batches) == 2
        alone = speak(serial)
        for listener in listeners:
            np.testing.assert_allclose(listener.samples, alone.samples, atol=1e-5)


def test_live_text_waits_and_goes_on_the_same(late, serial):
    whole, listener = speak(serial), Listener()
    turn = late.open_turn(TEXT[:30], sink=listener, params=PARAMS)
    listener.wait_for_audio()
    (active,), deadline = late._engine._speaking, time.monotonic() + 240
    while not active.text_late or active.in_flight:
        assert time.monotonic() < deadline, "sound was left in flight"
        time.sleep(0.01)
    assert listener.wait_until_still() < len(whole.samples)
    turn.append(TEXT[30:])
    turn.end()
    listener.wait()
    assert np.array_equal(listener.samples, whole.samples)


@pytest.mark.slow
def test_a_cancel_in_flight_is_heard_by_nobody_and_its_slot_is_clean(late, serial):
    backend = late._engine._backend
    expected = speak(serial)
    for delay_s in (0.0, 0.01, 0.03, 0.05):
        listener = Listener()
        turn = late.open_turn(TEXT, sink=listener, ended=True, params=LONG)
        listener.wait_for_audio()
        time.sleep(delay_s)
        launched = len(backend.batches)
        turn.cancel()
        assert listener.wait().reason == "cancelled"
        assert len(backend.batches) - launched <= 1
        assert_same(speak(late), expected)
        assert isinstance(listener.events[-1], Finished), "something was heard after the cancel"
    wait_idle(late)


def test_an_error_in_flight_tells_every_turn(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=2) as tts:
        make_late(tts)
        listeners = [Listener() for _ in range(3)]
        for listener in listeners:
            tts.open_turn(TEXT, sink=listener, ended=True, params=LONG)
        listeners[0].wait_for_audio()
        tts._engine._codec.fail = True
        for listener in listeners:
            assert listener.wait().reason == "error"
        assert str(tts.error) == "device lost"


def test_close_while_a_frame_is_in_flight(tiny_base):
    tts = TTSDecoder.load(tiny_base, num_slots=2)
    make_late(tts)
    listener = Listener()
    tts.open_turn(TEXT, sink=listener, ended=True, params=LONG)
    listener.wait_for_audio()
    tts.close()
    assert listener.wait().reason == "cancelled"
