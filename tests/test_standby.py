"""What an engine does while nobody speaks: unheard frames, and a model that leaves its device."""

from __future__ import annotations

import gc
import json
import time
import weakref

import numpy as np
import pytest
import torch
from listener import TEXT, Listener, speak
from live_server import LiveServer, collect, send

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.config import Guards
from qwen_megakernel.engine.standby import WARM_EVERY_S, Standby, StandbyPlan
from qwen_megakernel.tts_model import SynthesisError

PARAMS = GenerationParams(seed=7, min_frames=6, max_frames=6, guards=Guards(repeat_frames=0))
LIMIT_S = 60.0


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------- what is due when


class Unused:
    """A loader or a prompt builder, where nothing is loaded."""


def test_nothing_is_due_where_nothing_is_wanted():
    standby = Standby(StandbyPlan(), None, Unused())
    assert standby.due(0.0) is None
    assert standby.wait_s(0.0) is None
    assert standby.due(1e6) is None


def test_unloading_is_due_after_the_time_without_a_turn():
    standby = Standby(StandbyPlan(unload_after_s=10.0), Unused(), Unused())
    assert standby.due(100.0) is None
    assert standby.wait_s(100.0) == 10.0
    assert standby.due(109.9) is None
    standby.end()  # a turn comes, and goes
    assert standby.wait_s(110.0) is None
    assert standby.due(112.0) is None
    assert standby.due(121.9) is None
    assert standby.due(122.0) == "unload"
    standby.memory = "unloaded"
    assert standby.due(500.0) is None
    assert standby.wait_s(500.0) is None


def test_a_frame_is_due_until_the_model_is_unloaded():
    standby = Standby(StandbyPlan(keep_warm=True, unload_after_s=10.0), Unused(), Unused())
    assert standby.due(100.0) is None
    assert standby.wait_s(100.0) == WARM_EVERY_S
    assert standby.due(100.0 + WARM_EVERY_S) == "warm"
    assert standby.due(110.0) == "unload"


def test_a_model_that_cannot_be_loaded_again_is_not_unloaded():
    with pytest.raises(ValueError, match="needs a loader"):
        Standby(StandbyPlan(unload_after_s=1.0), None, Unused())


# ---------------------------------------------------------------------------- unloading


NEVER = StandbyPlan(unload_after_s=1e6)


@pytest.fixture
def tts(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=4, standby=NEVER) as loaded:
        yield loaded


def unload(tts: TTSDecoder) -> None:
    """Have the time without a turn be over."""
    tts.standby._plan = StandbyPlan(unload_after_s=0.0)
    tts._engine._wake.set()
    wait_until(lambda: tts.standby.memory == "unloaded")
    tts.standby._plan = NEVER


def count_values() -> int:
    """Elements of all tensors that are alive."""
    gc.collect()
    return sum(each.numel() for each in gc.get_objects() if issubclass(type(each), torch.Tensor))


@pytest.fixture
def num_elsewhere() -> int:
    """Elements of the tensors that other tests of this process keep."""
    return count_values()


@pytest.mark.slow
def test_the_model_leaves_its_memory_and_speaks_as_before(num_elsewhere, tts):
    before = speak(tts, params=PARAMS).samples
    backend, codec = (weakref.ref(part) for part in (tts._engine._backend, tts._engine._codec))
    num_loaded = count_values() - num_elsewhere
    unload(tts)
    wait_until(lambda: backend() is None and codec() is None)
    assert count_values() - num_elsewhere < num_loaded / 20
    assert (tts.num_slots, tts.capacity().num_free) == (4, 4)
    for _ in range(2):
        assert np.array_equal(speak(tts, params=PARAMS).samples, before)
        assert tts.standby.loaded
        unload(tts)


@pytest.mark.slow
def test_turns_that_come_together_all_speak(tts):
    unload(tts)
    listeners = [Listener() for _ in range(6)]  # more than slots
    for listener in listeners:
        tts.open_turn(TEXT, sink=listener, ended=True, params=PARAMS)
    for listener in listeners:
        assert listener.wait(LIMIT_S).error is None
        # On a CPU the last digits depend on how many speak at a time.
        assert np.allclose(listener.samples, listeners[0].samples, atol=1e-3)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_fails_the_turn_and_not_the_engine(tts, tiny_base):
    expected = speak(tts, params=PARAMS).samples
    unload(tts)
    weights = tiny_base / "model.safetensors"
    aside = weights.rename(weights.with_suffix(".aside"))
    try:
        for _ in range(2):
            with pytest.raises(SynthesisError, match=r"could not be loaded: .*model\.safetensors"):
                tts.synthesize(TEXT, params=PARAMS)
            assert tts.standby.memory == "unloaded"
    finally:
        aside.rename(weights)
    assert tts.error is None
    assert np.array_equal(speak(tts, params=PARAMS).samples, expected)


# ---------------------------------------------------------------------------- keeping warm


def test_unheard_frames_change_no_turn(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=2) as quiet:
        expected = speak(quiet, params=PARAMS).samples
        assert quiet.standby.num_warm_frames == 0
    with TTSDecoder.load(tiny_base, num_slots=2, standby=StandbyPlan(keep_warm=True)) as warm:
        for count in (2, 4):
            wait_until(lambda count=count: warm.standby.num_warm_frames >= count)
            assert np.array_equal(speak(warm, params=PARAMS).samples, expected)
        assert warm.num_active == 0


# ---------------------------------------------------------------------------- the server


def test_a_server_says_what_is_loaded(brief_base, recording):
    options = ("--unload-after", "0.3", "--keep-warm", "--speaker-ref", str(recording))
    server = LiveServer("--model", str(brief_base), *options)
    try:
        server.wait_until_ready()
        server.wait_for_line("nobody speaks: the model was unloaded")
        status, body = server.get("/ready")
        assert (status, json.loads(body)["memory"]) == (200, "unloaded")
        assert "qwen_megakernel_model_loaded 0.0" in server.get("/metrics")[1]
        with server.connect() as client:
            send(client, text="Hello there.", seed=1)
            chunks, end = collect(client)
        assert chunks
        assert "finish_reason" in end, end
        server.wait_for_line("the model was loaded again in")
        assert json.loads(server.get("/ready")[1])["phase"] == "ready"
        assert server.handshake_status() == 101
        assert server.stop() == 0
    finally:
        server.kill()
