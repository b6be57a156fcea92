"""The frame kernel's forms draw the same codes, so a test on a large GPU holds for a small one."""

from __future__ import annotations

import pytest
import torch

from qwen_megakernel.build_tts import FORMS, BuildError, frame_library, shared_bytes
from qwen_megakernel.config import GenerationParams
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

if torch.cuda.is_available():
    from kernel_twins import forms_here, make_kernel

LENGTHS = (138, 9, 61, 3, 140, 17, 52, 30)
"""Rows of the prompts, by stream."""


def test_a_form_is_as_large_as_its_name_says():
    assert (
        shared_bytes("120a")
        == shared_bytes("120a", "small")
        == shared_bytes("90a", "small")
        == 99 * 1024
    )
    assert shared_bytes("90a") == shared_bytes("90a", "large") == 227 * 1024
    assert shared_bytes("80") == 163 * 1024
    assert shared_bytes("86") == shared_bytes("89") == 99 * 1024
    headers = {form: frame_library(shape_config("tiny"), "90a", form).header for form in FORMS}
    assert headers["auto"] == headers["large"] != headers["small"]


def test_a_form_that_has_no_room_is_refused():
    with pytest.raises(
        BuildError, match="sm_120a has 101376 bytes of shared memory, too little for the large"
    ):
        frame_library(shape_config("tiny"), "120a", "large")
    with pytest.raises(BuildError, match="form is 'huge', allowed: auto, large, small"):
        frame_library(shape_config("tiny"), "90a", "huge")


def codes_of(kernel, prompts: list[torch.Tensor], frames: int, takes: int) -> list[torch.Tensor]:
    """Codes int64 [frames, streams, 16] of the same turns, decoded `takes` times."""
    slots, text = range(len(prompts)), torch.zeros(len(prompts), prompts[0].shape[1])
    found = []
    for _ in range(takes):
        for slot, rows in enumerate(prompts):
            kernel.prefill(slot, rows, GenerationParams(seed=slot))
        found.append(torch.stack([kernel.decode(slots, text) for _ in range(frames)]))
        for slot in slots:
            kernel.release(slot)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "lengths", "frames", "takes"),
    [
        ("tiny", LENGTHS[:1], 256, 2),
        ("tiny", LENGTHS, 256, 2),
        ("tiny", LENGTHS * 4, 256, 2),
        ("tiny", (2049, 1500, 1025, 513), 16, 2),
        ("0.6b", LENGTHS[:1], 256, 2),
        ("0.6b", LENGTHS, 256, 4),
        ("0.6b", LENGTHS * 4, 64, 4),
        ("0.6b", (2049, 1500, 1025, 513), 16, 4),
        ("1.7b", LENGTHS, 64, 2),
        ("1.7b", LENGTHS * 4, 16, 2),
    ],
)
def test_codes_are_the_same_in_every_form_and_every_time(shape, lengths, frames, takes):
    config = shape_config(shape)
    talker = random_talker(config, "cuda")
    generator = torch.Generator("cuda").manual_seed(3)
    prompts = [
        torch.randn(n, config.talker.hidden_size, device="cuda", generator=generator) for n in lengths
    ]
    expected = None
    for arch, form in forms_here():
        room = max(lengths) + frames + 1
        kernel = make_kernel(shape, talker, form=form, arch=arch, max_positions=room)
        for codes in codes_of(kernel, prompts, frames, takes):
            expected = codes if expected is None else expected
            assert torch.equal(codes, expected), f"sm_{arch}, {form} form"
        del kernel
        torch.cuda.empty_cache()
