"""Expected times of GPUs: the model agrees with the measured GPU, and the pages with the model."""

from __future__ import annotations

import pytest
from live_server import ROOT

from qwen_megakernel.build_tts import ARCHES
from qwen_megakernel.installation.known_gpus import KNOWN_GPUS, expected_frames, find_gpu


@pytest.mark.parametrize(
    ("driver_s", "known"),
    [
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090"),
        ("NVIDIA A10", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_found_by_the_driver_s_name(driver_s, known):
    found = find_gpu(driver_s)
    assert (found and found.name) == known
    assert (expected_frames(driver_s) is None) == (known is None)


@pytest.mark.parametrize("streams", [1, 8])
def test_the_model_gives_what_was_measured(streams):
    gpu = find_gpu("NVIDIA H200")
    assert gpu.frame_ms(streams, kept_mb=0) == pytest.approx(gpu.measured_ms[streams], rel=0.03)


def test_more_in_l2_and_fewer_streams_take_less():
    for gpu in KNOWN_GPUS:
        assert gpu.frame_ms(1, gpu.l2_mb / 2) < gpu.frame_ms(1, 0) < gpu.frame_ms(8, 0)


def test_kernels_are_built_for_each():
    assert {gpu.arch for gpu in KNOWN_GPUS} == set(ARCHES)


def row_of(gpu) -> str:
    return f"| {gpu.name} | sm_{gpu.arch} | {gpu.expectation(1)} | {gpu.expectation(8)} |"


@pytest.mark.parametrize("page", ["SETUP.md", "docs/kernel.md"])
def test_the_page_has_the_model_s_rows(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert [row_of(gpu) for gpu in KNOWN_GPUS if row_of(gpu) not in lines] == []
