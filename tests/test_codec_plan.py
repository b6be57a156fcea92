"""The codec's packing, rings and plan, run by an interpreter, against the PyTorch codec."""

from __future__ import annotations

import random

import pytest
import torch
from codec_interpreter import Interpreter, unpack_fragments
from codec_weights import ODD, TINY, TRUE, WIDE, lively_decoder, random_codes
from slow_cases import slow_after
from torch import Tensor

from qwen_megakernel.codec.cuda_ops import GemmOp
from qwen_megakernel.codec.cuda_packing import pack_fragments, upsample_matrix
from qwen_megakernel.codec.cuda_plan import CodecPlan
from qwen_megakernel.codec.cuda_tiling import (
    choose_tile,
    choose_unit_shape,
    num_tiles,
    partial_floats,
    ring_shapes,
    segments_for,
)
from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream
from qwen_megakernel.codec.layers import Recurrent
from qwen_megakernel.config import HOP, NUM_CODEBOOKS, CodecConfig

torch.set_grad_enabled(False)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("shape", "tile"), [((16, 64), ()), ((140, 200), ()), ((8, 8), ()), ((96, 768), (96, 96))]
)
def test_fragments_hold_the_matrix(shape, tile):
    matrix = torch.randn(shape).bfloat16()
    full = unpack_fragments(pack_fragments(matrix, *tile))
    assert torch.equal(full[: shape[0], : shape[1]], matrix)
    assert not full[shape[0] :].any()
    assert not full[:, shape[1] :].any()


def test_a_stage_s_weights_are_one_piece():
    matrix = torch.arange(128 * 128).reshape(128, 128).float()
    packed = pack_fragments(matrix.bfloat16())
    assert torch.equal(packed[1, 0], pack_fragments(matrix[64:, :64].bfloat16())[0, 0])
    assert packed[1, 0].is_contiguous()


def test_upsampling_is_stacked_products():
    weight, x = torch.randn(8, 16, 6), torch.randn(1, 8, 5)
    expected = torch.nn.functional.conv_transpose1d(x, weight, stride=3)[0, :, 3:15].T
    rows = torch.cat((x[0, :, :-1].T, x[0, :, 1:].T), 1)  # oldest first
    assert torch.allclose((rows @ upsample_matrix(weight, 3).T).reshape(12, 16), expected, atol=1e-5)


def layers_with_a_history(config: CodecConfig) -> list[tuple[int, int, int]]:
    """For each layer of the PyTorch codec that has a history, in the order of running: the time steps of
    a frame, the time steps of the history, and the channels."""
    with torch.device("meta"):
        decoder = CodecDecoder(config)
    found = []

    def note(layer: Recurrent, inputs: tuple) -> None:
        time, shape = layer.time_dim - 1, layer.history_shape
        found.append((inputs[0].shape[1 + time], shape[time], shape[1 - time]))

    for layer in decoder.modules():
        if isinstance(layer, Recurrent) and 0 not in layer.history_shape:
            layer.register_forward_pre_hook(note)
    CodecStream(decoder, 1).launch([0], torch.zeros(1, NUM_CODEBOOKS, dtype=torch.int64))
    return found


@pytest.mark.parametrize("config", [TRUE, ODD], ids=["true", "odd"])
def test_rings_hold_the_pytorch_codec_s_history_and_one_frame(config):
    layers, rings = layers_with_a_history(config), ring_shapes(config)
    for (steps, history, width), (name, ring) in zip(layers, rings.items(), strict=True):
        frames, rows, channels = ring
        assert rows == steps, name
        assert (frames - 1) * rows < history + steps <= frames * rows, name
        assert channels % 8 == 0, name
        assert channels == width or (config is ODD and channels > width), name


def test_a_slot_s_state_is_under_ten_megabytes():
    elements = sum(frames * rows * channels for frames, rows, channels in ring_shapes(TRUE).values())
    assert 2 * elements < 10e6, "in bf16"


def test_segments_follow_the_layer_alone():
    assert segments_for(512, 16, 1) == 4
    assert segments_for(768, 84, 32) == 8
    assert segments_for(96, 11, 1920) == 1
    assert segments_for(16, 1, 1) == 1


@pytest.mark.parametrize("columns", [1, 8, 9, 32, 33, 1024, 61440])
@pytest.mark.parametrize("m", [8, 96, 288, 512, 768, 6144])
def test_a_tile_exists_for_every_size(m, columns):
    assert choose_tile(m, columns, 1, 132) in (8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    ("m", "columns", "segments", "tile"),
    [
        (512, 32, 4, 8), (3072, 32, 2, 16), (2048, 32, 2, 8), (2048, 16, 2, 8),
        (768, 32, 8, 16), (768, 32, 2, 8), (384, 160, 1, 8),
        (1536, 64, 8, 64), (6144, 64, 2, 64),
        (4096, 32, 2, 32), (1024, 16, 8, 16), (384, 160, 4, 32), (288, 640, 1, 32), (512, 8, 4, 8),
    ],
)  # fmt: skip
def test_tiles_are_those_that_were_fastest_on_an_h200(m, columns, segments, tile):
    assert choose_tile(m, columns, segments, 132) == tile


@pytest.mark.parametrize(
    ("unit", "shape"), [((192, 640, 32), (32, 3)), ((96, 1920, 1), (16, 8)), ((96, 1920, 8), (64, 4))]
)
def test_units_have_the_shape_that_was_fastest_on_an_h200(unit, shape):
    assert choose_unit_shape(*unit, num_sms=132, sm_bytes=228 * 1024) == shape
    assert choose_unit_shape(*unit, num_sms=170, sm_bytes=100 * 1024) != shape


@pytest.mark.parametrize("sm_kb", [100, 228])
@pytest.mark.parametrize("streams", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(("channels", "rows"), [(96, 1920), (192, 640), (96, 160), (192, 16)])
def test_a_unit_s_tile_stays_within_a_stream_and_fits(channels, rows, streams, sm_kb):
    tile, stages = choose_unit_shape(channels, rows, streams, 132, sm_kb * 1024)
    assert rows % tile == 0
    assert 2 <= stages <= 8
    assert (channels, tile, sm_kb) != (192, 128, 100)


@pytest.mark.parametrize(
    ("config", "frames"),
    # Every ring of the wide units comes round in 6 frames.
    slow_after(1, [(TINY, 24), (ODD, 24), (WIDE, 6)]),
    ids=["tiny", "odd", "wide"],
)
def test_the_plan_is_the_decoder(config, frames):
    """No further from float32 than the PyTorch codec in bf16; a call's slots are frames apart."""
    decoder, rng = lively_decoder(config), random.Random(0)
    codes = random_codes(frames, slots=3)
    truth = CodecStream(decoder, 3).decode([0, 1, 2], codes)
    plan = CodecPlan(decoder, num_slots=3, max_streams=4)
    interpreter, pcm, done = Interpreter(plan), torch.zeros_like(truth), [0, 0, 0]
    while min(done) < frames:
        waiting = [slot for slot in range(3) if done[slot] < frames]
        slots = rng.sample(waiting, rng.randint(1, len(waiting)))
        part = interpreter.step(slots, torch.stack([codes[s, done[s]] for s in slots]))
        for slot, samples in zip(slots, part, strict=True):
            pcm[slot, done[slot] * HOP : (done[slot] + 1) * HOP] = samples
            done[slot] += 1
    theirs = CodecStream(decoder.bfloat16(), 3).decode([0, 1, 2], codes)
    assert plan.frame_counts.tolist() == [frames, frames, frames, 0]
    assert 0 < rms(pcm - truth) <= 1.25 * rms(theirs - truth)
    assert not plan.state[3].any(), "the scratch slot was not called"


def test_every_gemm_covers_its_rows():
    plan = CodecPlan(lively_decoder(TINY), num_slots=1, max_streams=1)
    for op in plan.ops:
        if isinstance(op, GemmOp):
            _, blocks, strips, steps = op.weights.shape[:4]
            assert len(op.weights) * strips * 16 >= op.m
            assert (op.taps + bool(op.middle)) * op.source.data.shape[2] <= blocks * steps * 16
            if op.source.by_slot:
                assert op.source.data.shape[1] >= op.history + op.source.rows


@pytest.mark.parametrize("m", [64, 96, 1536])
def test_sums_of_segments_have_room_whatever_tile_is_chosen(m):
    """csrc/codec_segments.cuh: [tile of columns][tile of rows][column][row] and padding."""
    for columns in range(1, 400):
        tile = choose_tile(m, columns, segments=4, num_sms=108)
        tiles = -(-columns // tile) * -(-m // 64)
        assert tiles * tile * 68 <= partial_floats(m, columns) <= partial_floats(m, 400)
        assert tiles <= num_tiles(m, columns) <= num_tiles(m, 400)
