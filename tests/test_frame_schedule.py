"""The order of a frame's exchanges in the kernel's sources, compared with a plain description."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest

from qwen_megakernel.build_tts import build, frame_library
from qwen_megakernel.config import NUM_CODEBOOKS, ModelConfig
from qwen_megakernel.decoding.frame_schedule import Exchange, parse_exchanges
from qwen_megakernel.installation.build_environment import find_nvcc
from qwen_megakernel.synth.config import shape_config

if find_nvcc() is None:
    pytestmark = pytest.mark.skip(reason="no nvcc")

STEPS = ["qkv", "attention", "out", "gate_up", "down"]


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    """Shape and streams -> exchanges. The schedule alone is compiled, by the host's compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MEGAKERNEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        libraries = {}
        for shape in ("tiny", "1.7b"):
            whole = frame_library(shape_config(shape), "90a")
            part = replace(whole, name="schedule", cuda_sources=(), cpp_sources=("frame_exchanges.cpp",))
            libraries[shape] = ctypes.CDLL(str(build(part, "90a")))
            libraries[shape].frame_exchanges.restype = ctypes.c_char_p
            libraries[shape].frame_phases.restype = ctypes.c_char_p

    def exchanges(shape: str, streams: int) -> list[Exchange]:
        return parse_exchanges(libraries[shape].frame_exchanges(streams).decode())

    exchanges.phases = libraries["tiny"].frame_phases().decode().splitlines()
    return exchanges


def described(config: ModelConfig, streams: int) -> list[Exchange]:
    """The frame's exchanges, described without the kernel's sources."""
    talker, predictor = config.talker, config.predictor
    found = [Exchange("talker", -1, i, step) for i in range(talker.num_layers) for step in STEPS]
    found.append(Exchange("talker", -1, talker.num_layers, "head"))
    if talker.hidden_size != predictor.hidden_size:
        found.append(Exchange("talker", -1, talker.num_layers, "projection"))
    if streams > 4:  # position 0 alone, up to its keys and values
        alone = [
            Exchange("predictor", 0, i, step) for i in range(predictor.num_layers) for step in STEPS
        ]
        found += alone[:-4]
    for code in range(NUM_CODEBOOKS):
        position = code + 1
        found.append(Exchange("predictor", position, 0, "code"))
        if code == NUM_CODEBOOKS - 1:
            return found
        rows = [
            Exchange("predictor", position, i, step)
            for i in range(predictor.num_layers)
            for step in STEPS
        ]
        found += rows[position > 1 :]  # of an embedding, the first layer's QKV is in a table
        found.append(Exchange("predictor", position, predictor.num_layers, "head"))
    raise AssertionError


@pytest.mark.parametrize("shape", ["tiny", "1.7b"])
@pytest.mark.parametrize("streams", range(1, 9))
def test_a_frame_s_exchanges_are_in_the_order_described(schedule, shape, streams):
    assert schedule(shape, streams) == described(shape_config(shape), streams)


def test_every_phase_of_a_wait_has_a_name(schedule):
    assert schedule.phases == ["input", "attention", "combine", "O", "MLP", "logits", "code"]


def test_an_exchange_reads_as_a_place(schedule):
    names = [str(exchange) for exchange in schedule("1.7b", 8)]
    assert names[0] == "talker layer 0 qkv"
    assert names[28 * 5 : 28 * 5 + 3] == [
        "talker head",
        "talker projection",
        "predictor pass 0 layer 0 qkv",
    ]
    assert names[-2:] == ["predictor pass 15 head", "code 15"]
    assert len(set(names)) == len(names)
