"""The streaming codec against one pass of the official decoder, on random but lively weights."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import replace

import official
import pytest
import torch
from codec_interpreter import Interpreter
from codec_weights import TINY, TRUE, random_codes, shared_decoder
from torch import Tensor, nn

from qwen_megakernel.codec.cuda_plan import CodecPlan
from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream
from qwen_megakernel.config import HOP, CodecConfig

SHORT_WINDOW = replace(TINY, sliding_window=8, num_kv_heads=2, max_positions=32)


@functools.cache
def official_decoder(config: CodecConfig) -> nn.Module:
    decoder = official.codec.Qwen3TTSTokenizerV2Decoder(
        official.codec.Qwen3TTSTokenizerV2DecoderConfig(
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim,
            latent_dim=config.latent_dim,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_window,
            max_position_embeddings=config.max_positions,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.rms_norm_eps,
            upsample_rates=config.upsample_rates,
            upsampling_ratios=config.upsampling_ratios,
            decoder_dim=config.decoder_dim,
        )
    ).eval()
    decoder.load_state_dict(shared_decoder(config).state_dict(), strict=True)
    return decoder


@torch.no_grad()
def official_pcm(decoder: nn.Module, codes: Tensor) -> Tensor:
    return decoder(codes.transpose(1, 2)).squeeze(1).float()


def in_parts(stream: CodecStream, slot: int, codes: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([stream.decode([slot], part) for part in codes.split(lengths, dim=1)], dim=1)


def random_lengths(total: int, seed: int, longest: int) -> list[int]:
    rng, lengths = random.Random(seed), []
    while total:
        lengths.append(min(total, rng.randint(1, longest)))
        total -= lengths[-1]
    return lengths


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_weights_have_the_official_names_and_shapes():
    with torch.device("meta"):
        ours = CodecDecoder(SHORT_WINDOW).state_dict()
    theirs = official_decoder(SHORT_WINDOW).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("config", [SHORT_WINDOW, TINY], ids=["window 8", "window 72"])
def test_one_pass_is_the_official_one(config):
    codes = random_codes(100, slots=2)
    expected = official_pcm(official_decoder(config), codes)
    assert expected.abs().mean() > 0.1, "the random weights are too quiet to tell"
    assert (expected.abs() == 1).float().mean() < 0.05, "the random weights are too loud to tell"
    pcm = CodecStream(shared_decoder(config), 2).decode([0, 1], codes)
    assert pcm.shape == (2, 100 * HOP)
    assert pcm.dtype == torch.float32
    assert worst(pcm, expected) <= 1e-4


def test_frame_by_frame_is_the_official_pass():
    codes = random_codes(80)
    pcm = in_parts(CodecStream(shared_decoder(TINY), 1), 0, codes, [1] * 80)
    assert worst(pcm, official_pcm(official_decoder(TINY), codes)) <= 1e-4


@pytest.mark.parametrize("seed", range(8))
def test_any_split_gives_the_samples_of_one_pass(seed):
    codes = random_codes(40, seed)
    stream = CodecStream(shared_decoder(SHORT_WINDOW), 2)
    whole = stream.decode([0], codes)
    parts = in_parts(stream, 1, codes, random_lengths(40, seed, longest=(2, 5, 12, 30)[seed % 4]))
    assert worst(parts, whole) <= 1e-5


def test_company_does_not_matter():
    """Slots that are frames apart share calls, in any order; each sounds as if it were alone."""
    num_slots, rng = 5, random.Random(0)
    codes = random_codes(30, slots=num_slots)
    alone = CodecStream(shared_decoder(SHORT_WINDOW), num_slots).decode(range(num_slots), codes)
    stream, done = CodecStream(shared_decoder(SHORT_WINDOW), num_slots), [0] * num_slots
    pcm = torch.zeros_like(alone)
    while min(done) < 30:
        waiting = [slot for slot in range(num_slots) if done[slot] < 30]
        slots = rng.sample(waiting, rng.randint(1, len(waiting)))
        frames = min(rng.randint(1, 3), *(30 - done[slot] for slot in slots))
        part = stream.decode(slots, torch.stack([codes[s, done[s] : done[s] + frames] for s in slots]))
        for slot, samples in zip(slots, part, strict=True):
            pcm[slot, done[slot] * HOP : (done[slot] + frames) * HOP] = samples
            done[slot] += frames
    assert worst(pcm, alone) <= 1e-5


def test_position_does_not_matter():
    """Far past `max_positions`, frames sound as in a stream that began a receptive field ago."""
    codes = random_codes(300)
    stream = CodecStream(shared_decoder(SHORT_WINDOW), 2)
    old = stream.decode([0], codes)[:, -2 * HOP :]
    young = stream.decode([1], codes[:, -60:])[:, -2 * HOP :]
    assert worst(old, young) <= 1e-5


def test_reset_makes_a_slot_new_and_leaves_the_others():
    codes = random_codes(20)
    start, rest = codes.split(10, dim=1)
    stream = CodecStream(shared_decoder(SHORT_WINDOW), 2)
    first = stream.decode([0], start)
    stream.decode([1], start)
    assert worst(stream.decode([0], start), first) > 0.01, "the history must matter"
    stream.reset(0)
    assert torch.equal(stream.decode([0], start), first)
    assert torch.equal(stream.decode([1], rest), stream.decode([0], rest))


@pytest.mark.parametrize("config", [TINY, SHORT_WINDOW], ids=["tiny", "short window"])
def test_a_slot_goes_on_from_a_prepared_state(config):
    stream = CodecStream(shared_decoder(config), 3)
    reference, speech, other = random_codes(70), random_codes(7, 5), random_codes(6, 9)
    together = stream.decode([0], torch.cat((reference, speech), 1))[:, 70 * HOP :]
    alone = stream.decode([1], other)
    stream.reset(1)
    begun = stream.decode([1], other[:, :2])
    state = stream.state_after(reference[0])
    for slot in (2, 0):  # one new, one used
        stream.restore(slot, state)
        torch.testing.assert_close(stream.decode([slot], speech), together, rtol=0, atol=1e-5)
    begun = torch.cat((begun, stream.decode([1], other[:, 2:])), 1)
    torch.testing.assert_close(begun, alone, rtol=0, atol=1e-5)
    stream.reset(2)
    assert (stream.decode([2], speech) - together).abs().max() > 1e-2, (
        "the reference makes no difference"
    )


@pytest.mark.parametrize(
    ("slots", "codes", "message"),
    [
        ([2], torch.zeros(1, 1, 16, dtype=torch.int64), "slot is 2, allowed: 0 to 1"),
        ([-1], torch.zeros(1, 1, 16, dtype=torch.int64), "slot is -1, allowed: 0 to 1"),
        ([1, 1], torch.zeros(2, 1, 16, dtype=torch.int64), r"slots are \[1, 1\], allowed: one or more"),
        ([], torch.zeros(0, 1, 16, dtype=torch.int64), r"slots are \[\], allowed: one or more"),
        (
            [0],
            torch.zeros(2, 1, 16, dtype=torch.int64),
            r"shape \[2, 1, 16\], allowed: \[1, 1 or more, 16\]",
        ),
        ([0], torch.zeros(1, 0, 16, dtype=torch.int64), r"shape \[1, 0, 16\], allowed"),
        ([0], torch.zeros(1, 1, 15, dtype=torch.int64), r"shape \[1, 1, 15\], allowed"),
        ([0], torch.zeros(1, 16, dtype=torch.int64), r"shape \[1, 16\], allowed"),
        ([0], torch.zeros(1, 1, 16), "codes are torch.float32, allowed: torch.int64"),
        ([0], torch.full((1, 1, 16), 2048), "codes are from 2048 to 2048, allowed: 0 to 2047"),
        ([0], torch.full((1, 1, 16), -1), "codes are from -1 to -1, allowed: 0 to 2047"),
    ],
)
def test_bad_input_is_refused_and_moves_nothing(slots, codes, message):
    good = random_codes(2)
    stream = CodecStream(shared_decoder(SHORT_WINDOW), 2)
    with pytest.raises(ValueError, match=message):
        stream.decode(slots, codes)
    assert torch.equal(
        stream.decode([0], good), CodecStream(shared_decoder(SHORT_WINDOW), 2).decode([0], good)
    )


def test_bad_slot_numbers_are_refused():
    with pytest.raises(ValueError, match="num_slots is 0, allowed: at least 1"):
        CodecStream(shared_decoder(SHORT_WINDOW), 0)
    with pytest.raises(ValueError, match="slot is 7, allowed: 0 to 1"):
        CodecStream(shared_decoder(SHORT_WINDOW), 2).reset(7)


@functools.cache
def official_bf16_decoder(config: CodecConfig) -> nn.Module:
    exact = official_decoder(config)
    decoder = copy.deepcopy(exact).bfloat16()
    # As after `from_pretrained`: RoPE's frequencies are not weights and stay float32.
    decoder.pre_transformer.rotary_emb.inv_freq = exact.pre_transformer.rotary_emb.inv_freq
    return decoder


def test_bf16_is_as_close_to_fp32_as_the_official_one():
    codes = random_codes(24, slots=2)
    truth = official_pcm(official_decoder(SHORT_WINDOW), codes)
    theirs = official_bf16_decoder(SHORT_WINDOW)
    ours = CodecDecoder(SHORT_WINDOW)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    stream = CodecStream(ours, 2)
    pcm = torch.cat([stream.decode([0, 1], part) for part in codes.split(5, dim=1)], dim=1)
    assert pcm.dtype == torch.float32
    error, allowed = rms(pcm - truth), 1.25 * rms(official_pcm(theirs, codes) - truth)
    assert 0 < error <= allowed
    assert worst(pcm, truth) <= 1.25 * worst(official_pcm(theirs, codes), truth)


@torch.no_grad()
def test_the_gpu_s_plan_is_as_close_to_fp32_as_the_official_bf16(report):
    codes = random_codes(24)
    truth = official_pcm(official_decoder(SHORT_WINDOW), codes)
    theirs = official_pcm(official_bf16_decoder(SHORT_WINDOW), codes)
    interpreter = Interpreter(CodecPlan(shared_decoder(SHORT_WINDOW), num_slots=1, max_streams=1))
    pcm = torch.cat([interpreter.step([0], codes[:, frame]) for frame in range(24)], dim=1)
    ratio = rms(pcm - truth) / rms(theirs - truth)
    report(f"error of the GPU codec's arithmetic over the official bf16's: {ratio:.2f}")
    assert 0 < ratio <= 1.25
    assert worst(pcm, truth) <= 1.25 * worst(theirs, truth)


@pytest.mark.slow
def test_true_shape_is_the_official_one():
    codes = random_codes(6)
    expected = official_pcm(official_decoder(TRUE), codes)
    stream = CodecStream(shared_decoder(TRUE), 2)
    assert worst(stream.decode([0], codes), expected) <= 1e-4
    assert worst(in_parts(stream, 1, codes, [1, 3, 2]), expected) <= 1e-4
