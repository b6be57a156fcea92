"""The order of a frame's exchanges in the kernel's sources, compared with a plain description."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwen_megakernel.build_tts import build, frame_library
from qwen_megakernel.config import NUM_CODEBOOKS, ModelConfig
from qwen_megakernel.decoding.frame_schedule import Exchange, listed_exchanges
from qwen_megakernel.installation.cubin import read_cubin
from qwen_megakernel.installation.nvrtc import find_compiler
from qwen_megakernel.synth.config import shape_config

if find_compiler() is None:
    pytestmark = pytest.mark.skip(reason="no CUDA compiler")

STEPS = ["qkv", "attention", "out", "gate_up", "down"]


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    """Shape and streams -> exchanges. The schedule alone is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_MEGAKERNEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        cubins = {}
        for shape in ("tiny", "1.7b"):
            whole = frame_library(shape_config(shape), "90a")
            part = replace(whole, name="schedule", source="frame_exchanges.cuh")
            cubins[shape] = read_cubin(build(part, "90a"))

    def exchanges(shape: str, streams: int) -> list[Exchange]:
        return listed_exchanges(cubins[shape], streams)

    exchanges.phases = cubins["tiny"].text("phase_names").splitlines()
    return exchanges


@pytest.mark.parametrize("tiny", ["tiny", "tiny-1.7b"])
@pytest.mark.parametrize(("talker", "predictor"), [(6, 1), (3, 2), (1, 3), (28, 5)])
def test_words_of_wide_frames_never_repeat_a_tag_whatever_the_layers(
    tiny, talker, predictor, tmp_path, monkeypatch
):
    """csrc/dense_tags.h asserts it; a shape for which it does not hold has no kernel."""
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(tmp_path))
    config = shape_config(tiny)
    config = replace(
        config,
        talker=replace(config.talker, num_layers=talker),
        predictor=replace(config.predictor, num_layers=predictor),
    )
    whole = frame_library(config, "90a")
    build(replace(whole, name="schedule", source="frame_exchanges.cuh"), "90a")


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
