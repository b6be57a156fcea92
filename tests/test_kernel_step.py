"""The frame kernel against PyTorch, on a GPU: every exchange, every head, the draws, other streams."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from qwen_megakernel.config import NUM_CODEBOOKS, GenerationParams, SamplingParams
from qwen_megakernel.decoding.kernel_backend import FrameDumps, MegakernelBackend
from qwen_megakernel.decoding.pages import runs_of
from qwen_megakernel.model.sampling import SamplingBatch, draw, gumbel_noise, process_logits, split_seed
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from kernel_twins import PHASES, Recorder, Twins, make_kernel

PAIRED = 4
"""Streams whose positions 0 and 1 of the predictor stand side by side (csrc/frame_schedule.cuh)."""

BUDGET = 1.25
"""Limit on the kernel's error against fp32, over that of PyTorch in bf16."""


@pytest.fixture(scope="module")
def twins():
    """Twins by shape and room. Only one set exists at a time, because the big ones take gigabytes."""
    kept: dict = {}

    def get(shape: str, max_positions: int = 512):
        if (shape, max_positions) not in kept:
            kept.clear()
            torch.cuda.empty_cache()
            kept[shape, max_positions] = Twins(shape, max_positions)
        return kept[shape, max_positions]

    return get


def relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.float() - truth).norm() / truth.norm())


def kernel_exchanges(t: Twins, dump: torch.Tensor, n: int):
    """The kernel's exchanges by PyTorch's order: (model, step, layer) -> exchange -> [n, t, values].

    PyTorch's first step of the predictor has positions 0 and 1. The kernel has them in one pass, side by
    side in its columns, or position 0 in a pass of its own.
    """
    sizes = {"talker": t.config.talker, "predictor": t.config.predictor}
    found: dict[tuple, dict[str, torch.Tensor]] = {}
    paired = not any(e.predictor_pass == 0 for e in t.kernel.exchanges(n))
    for index, exchange in enumerate(t.kernel.exchanges(n)):
        if exchange.step not in PHASES:
            continue
        c = sizes[exchange.model]
        width = {
            "qkv": (c.num_heads + 2 * c.num_kv_heads) * c.head_dim,
            "attention": c.num_heads * c.head_dim,
            "out": 2 * c.hidden_size,
            "gate_up": c.intermediate_size,
            "down": 2 * c.hidden_size,
        }[exchange.step]
        side_by_side = exchange.predictor_pass == 1 and paired
        columns = [list(range(n)), [PAIRED + s for s in range(n)]]
        values = dump[index, :width].T[torch.tensor(columns if side_by_side else columns[:1])]
        if exchange.step in ("out", "down"):  # parts of k: there may be only one
            values = values.unflatten(-1, (2, -1)).nan_to_num(0.0).sum(-2)
        step = max(exchange.predictor_pass - 1, 0)
        layer = found.setdefault((exchange.model, step, exchange.layer), {})
        before = [layer[exchange.step]] if exchange.step in layer else []
        layer[exchange.step] = torch.cat([*before, values.transpose(0, 1)], 1)
    return found


@pytest.mark.parametrize(
    ("shape", "n"),
    [
        *(("tiny", 1), ("tiny", 8), ("tiny", 9), ("tiny", 32), ("tiny-1.7b", 3), ("tiny-1.7b", 17)),
        *(("0.6b", 1), ("0.6b", 6), ("0.6b", 32), ("1.7b", 2), ("1.7b", 32)),
    ],
)
def test_every_exchange_is_as_close_to_fp32_as_bf16_pytorch(twins, shape, n, report):
    t = twins(shape)
    t.prefill([20 + s for s in range(n)], GenerationParams())
    codes, text = t.codes(n, 2), t.rows(n, seed=3)
    recorded = {}
    for name, backend in (("bf16", t.bf16), ("fp32", t.fp32)):
        with Recorder(t.talkers[name]) as recorder:
            backend.decode_frame(range(n), text, forced_codes=codes)
        recorded[name] = recorder.taken
    dump = t.kernel.exchange_dump()
    t.kernel.decode(range(n), text, forced_codes=codes, dumps=FrameDumps(exchanges=dump))
    worst = dict.fromkeys(PHASES, 0.0)
    for i, exchanges in enumerate(kernel_exchanges(t, dump, n).values()):
        for phase, values in exchanges.items():
            rows = values.shape[1]  # of position 0 the last layer makes none after its QKV
            truth, rounded = (recorded[name][phase][i][:n, -rows:].float() for name in ("fp32", "bf16"))
            ratio = relative(values, truth) / relative(rounded, truth)
            worst[phase] = max(worst[phase], ratio)
    t.release(n)
    report(
        f"{shape}, {n} streams, worst error over bf16 PyTorch's: "
        + ", ".join(f"{p} {r:.2f}" for p, r in worst.items())
    )
    assert max(worst.values()) <= BUDGET


def divergence(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """KL of softmaxed truth from softmaxed logits, by codebook: [n, c, vocab] -> [c]."""
    p = truth.float().log_softmax(-1)
    return (p.exp() * (p - logits.float().log_softmax(-1))).sum(-1).mean(0)


@pytest.mark.parametrize(
    ("shape", "n", "frames"),
    [
        ("tiny", 8, 32),
        ("tiny", 32, 8),
        ("0.6b", 8, 32),
        ("0.6b", 32, 8),
        ("1.7b", 8, 8),
        ("1.7b", 32, 2),
    ],
)
def test_teacher_forced_heads_are_as_close_to_fp32_as_bf16_pytorch(twins, shape, n, frames, report):
    t = twins(shape)
    t.prefill([12 + 3 * s for s in range(n)], GenerationParams())
    ours, theirs = torch.zeros(NUM_CODEBOOKS), torch.zeros(NUM_CODEBOOKS)
    vocab = t.config.predictor.vocab_size
    for frame in range(frames):
        codes, text = t.codes(n, 100 + frame), t.rows(n, seed=200 + frame)
        logits = torch.zeros(n, NUM_CODEBOOKS, t.config.talker.vocab_size, device="cuda")
        t.kernel.decode(range(n), text, forced_codes=codes, dumps=FrameDumps(logits=logits))
        truth, rounded = (b.decode_frame(range(n), text, forced_codes=codes) for b in (t.fp32, t.bf16))
        for sums, first, rest in (
            (ours, logits[:, :1], logits[:, 1:, :vocab]),
            (theirs, rounded.talker_logits[:, None], rounded.predictor_logits),
        ):
            sums[0] += divergence(first, truth.talker_logits[:, None]).cpu()[0]
            sums[1:] += divergence(rest, truth.predictor_logits).cpu()
    t.release(n)
    report(
        f"{shape}, {n * frames} frames: KL to fp32 over bf16 PyTorch's, worst codebook "
        f"{(ours / theirs).max():.2f}, mean {(ours / theirs).mean():.2f}; "
        f"mean KL {ours.mean() / frames:.1e}"
    )
    assert (ours <= BUDGET * theirs).all()


@pytest.mark.parametrize(
    ("shape", "n"), [("tiny", 8), ("tiny", 32), ("0.6b", 1), ("0.6b", 8), ("0.6b", 32), ("1.7b", 3)]
)
def test_with_injected_noise_codes_differ_only_where_rounding_decides(twins, shape, n, report):
    t = twins(shape)
    params = GenerationParams(
        talker=SamplingParams(0.9, 50, 1.0, 1.05), predictor=SamplingParams(0.9, 50, 1.0)
    )
    t.prefill([16] * n, params)
    vocab = {0: t.config.talker.vocab_size}
    different = total = 0
    for frame in range(6):
        generator = torch.Generator("cuda").manual_seed(frame)
        uniform = torch.rand(n, NUM_CODEBOOKS, vocab[0], device="cuda", generator=generator)
        noise = -(-uniform.clamp(1e-7, 1 - 1e-7).log()).log()
        forced, text = t.codes(n, frame), t.rows(n, seed=50 + frame)
        # The kernel's draws are judged by its own logits, given the forced history.
        logits = torch.zeros(n, NUM_CODEBOOKS, vocab[0], device="cuda")
        seen = t.fp32._seen[:n].clone()
        drawn = t.kernel.decode(
            range(n), text, noise, forced_codes=forced, dumps=FrameDumps(logits=logits)
        )
        truth = t.fp32.decode_frame(range(n), text, forced_codes=forced)
        rounded = t.bf16.decode_frame(range(n), text, forced_codes=forced)
        for codebook in range(NUM_CODEBOOKS):
            size = t.config.talker.vocab_size if codebook == 0 else t.config.predictor.vocab_size
            exact = truth.talker_logits if codebook == 0 else truth.predictor_logits[:, codebook - 1]
            coarse = (
                rounded.talker_logits if codebook == 0 else rounded.predictor_logits[:, codebook - 1]
            )
            error = (logits[:, codebook, :size] - exact).abs().amax(-1)
            assert (error <= 2 * (coarse.float() - exact).abs().amax(-1)).all()
            sampling = params.talker if codebook == 0 else params.predictor
            scores = []
            for values in (exact, logits[:, codebook, :size]):
                batch = SamplingBatch.gather([sampling] * n, size, values.device)
                suppress = None
                if codebook == 0:
                    suppress = t.fp32._suppress.expand(n, -1).clone()
                    suppress[:, t.config.talker.codec_eos_id] |= frame < params.min_frames
                scores.append(process_logits(values, batch, seen if codebook == 0 else None, suppress))
            races = [s + noise[:, codebook, :size] for s in scores]
            # The kernel's draw is exactly the draw from its own logits.
            assert torch.equal(drawn[:, codebook], races[1].argmax(-1).cpu())
            best = races[0].topk(2, dim=-1).values
            margin = best[:, 0] - best[:, 1]
            kth = scores[0].masked_fill(scores[0].isinf(), torch.inf).amin(-1)
            decided = margin > 2 * error / sampling.temperature
            edge = (scores[0] - kth[:, None]).abs().le(2 * error[:, None] / sampling.temperature).any(-1)
            equal = drawn[:, codebook].cuda() == races[0].argmax(-1)
            assert (equal | ~decided | edge).all()
            different += int((~equal).sum())
            total += n
    t.release(n)
    report(f"{shape}, {n} streams: {different} of {total} draws differ from fp32's, all within rounding")


def generate(
    kernel: MegakernelBackend, slots: list[int], prompts, text, frames: int, params
) -> torch.Tensor:
    for i, slot in enumerate(slots):
        kernel.prefill(slot, prompts[i], params[i])
    codes = torch.stack([kernel.decode(slots, text[frame, : len(slots)]) for frame in range(frames)])
    for slot in slots:
        kernel.release(slot)
    return codes


@pytest.mark.parametrize(("shape", "grids"), [("tiny", (None, 16, 8)), ("0.6b", (None, 64, 96))])
def test_codes_are_the_same_alone_in_company_in_any_slot_on_any_grid(shape, grids):
    config = shape_config(shape)
    talker = random_talker(config, "cuda")
    generator = torch.Generator("cuda").manual_seed(9)
    lengths = [300, 40, 3, 1, 77, 255, 256, 18] * 4
    prompts = [
        torch.randn(k, config.talker.hidden_size, device="cuda", generator=generator) for k in lengths
    ]
    text = torch.randn(4, len(lengths), config.talker.hidden_size, device="cuda", generator=generator)
    params = [GenerationParams(seed=seed) for seed in range(len(lengths))]
    expected = None
    for grid in grids:
        kernel = make_kernel(shape, talker, num_slots=40, grid=grid, max_positions=1024)
        together = generate(kernel, list(range(32)), prompts, text, 4, params)
        expected = together if expected is None else expected
        assert torch.equal(together, expected)
        for n in (1, 3, 4, 5, 8, 9, 17, 24):
            alone = generate(kernel, list(range(11, 11 + n)), prompts, text, 4, params)
            assert torch.equal(alone, expected[:, :n]), f"{n} streams"
    assert len(expected.unique()) > 100


@pytest.mark.parametrize("shape", ["tiny", "0.6b"])
def test_codes_do_not_depend_on_which_pages_a_slot_has(shape):
    """Prompts of one to four pages. Their last frames are the first rows of a new page."""
    config = shape_config(shape)
    talker = random_talker(config, "cuda")
    generator = torch.Generator("cuda").manual_seed(4)
    lengths = [765, 253, 509, 30]
    prompts = [
        torch.randn(k, config.talker.hidden_size, device="cuda", generator=generator) for k in lengths
    ]
    text = torch.randn(8, len(lengths), config.talker.hidden_size, device="cuda", generator=generator)
    params = [GenerationParams(seed=seed) for seed in range(len(lengths))]
    plain = make_kernel(shape, talker, num_slots=8, max_positions=1024)
    expected = generate(plain, [0, 1, 2, 3], prompts, text, 8, params)
    scarce = make_kernel(shape, talker, num_slots=8, max_positions=1024, num_pages=11)
    cache = scarce.kv_cache
    for slot in range(8):
        cache.reserve(slot, 1)
    for slot in (1, 3, 5, 7):
        cache.free(slot)
    cache.reserve(1, 300)
    cache.reserve(3, 600)
    for slot in (0, 2, 4, 6):
        cache.free(slot)
    for slot, length in ((5, 800), (7, 40)):
        cache.reserve(slot, length)
    assert len(runs_of(cache._pages.of(5))) > 1
    assert torch.equal(generate(scarce, [5, 1, 3, 7], prompts, text, 8, params), expected)


@pytest.mark.parametrize("shape", ["tiny", "0.6b"])
def test_a_long_context_is_as_close_to_fp32_as_bf16_pytorch(twins, shape, report):
    t = twins(shape, 2304)
    lengths = [2049, 1500, 1025, 513]
    t.prefill(lengths, GenerationParams())
    ratios = []
    for frame in range(2):
        codes, text = t.codes(4, frame), t.rows(4, seed=frame)
        logits = torch.zeros(4, NUM_CODEBOOKS, t.config.talker.vocab_size, device="cuda")
        t.kernel.decode(range(4), text, forced_codes=codes, dumps=FrameDumps(logits=logits))
        truth, rounded = (b.decode_frame(range(4), text, forced_codes=codes) for b in (t.fp32, t.bf16))
        for s in range(4):
            truth_s = truth.talker_logits[s]
            ratios.append(relative(logits[s, 0], truth_s) / relative(rounded.talker_logits[s], truth_s))
    t.release(4)
    report(f"{shape}, positions {lengths}: code 0 logits, error over bf16 PyTorch's {max(ratios):.2f}")
    assert max(ratios) <= BUDGET


def draws_of(t: Twins, settings, frame: int, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The codes that the torch backend draws from given logits, int64 [n, 16]."""
    seeds = torch.tensor([split_seed(p.seed) for p in settings], device="cuda")
    frames = torch.full((len(settings),), frame, device="cuda")
    codes = []
    for codebook in range(NUM_CODEBOOKS):
        vocab = t.config.predictor.vocab_size if codebook else t.config.talker.vocab_size
        batch = SamplingBatch.gather(
            [p.predictor if codebook else p.talker for p in settings], vocab, seeds.device
        )
        suppress = None
        if codebook == 0:
            suppress = t.fp32._suppress.expand(len(settings), -1).clone()
            suppress[:, t.config.talker.codec_eos_id] |= frame < settings[0].min_frames
        scores = process_logits(logits[:, codebook, :vocab], batch, None if codebook else seen, suppress)
        noise = gumbel_noise(seeds, frames, torch.tensor([codebook], device="cuda"), vocab)[:, 0]
        codes.append(draw(scores, batch.temperature, noise).cpu())
    return torch.stack(codes, dim=1)


def test_streams_sample_as_the_torch_backend_does(twins):
    """Penalty, suppression, minimum length, top-p, greedy: equal logits give the twin's codes."""
    t = twins("tiny")
    settings = [
        GenerationParams(seed=1),
        GenerationParams(
            talker=SamplingParams(0.0, 0, 1.0, 1.05), predictor=SamplingParams(0.0, 0, 1.0)
        ),
        GenerationParams(
            talker=SamplingParams(1.0, 0, 0.8, 1.2), predictor=SamplingParams(1.0, 30, 0.7), seed=2
        ),
        GenerationParams(
            talker=SamplingParams(5.0, 1, 1.0), predictor=SamplingParams(0.01, 2048, 1.0), seed=3
        ),
    ]
    n = len(settings)
    prompt = t.rows(30, seed=4)
    for slot, params in enumerate(settings):
        t.kernel.prefill(slot, prompt, params)
    seen = torch.zeros(n, t.config.talker.vocab_size, dtype=torch.bool, device="cuda")
    wrong = 0
    for frame in range(40):
        logits = torch.zeros(n, NUM_CODEBOOKS, t.config.talker.vocab_size, device="cuda")
        codes = t.kernel.decode(range(n), t.rows(n, seed=frame), dumps=FrameDumps(logits=logits))
        expected = draws_of(t, settings, frame, logits, seen)
        wrong += int((codes != expected).sum())
        seen[torch.arange(n), codes[:, 0].cuda()] = True
    for slot in range(n):
        t.kernel.release(slot)
    # Another order of the sums of probabilities may move one code across the limit of top-p.
    assert wrong <= 3


FAULT = """
import sys
import torch
from kernel_twins import make_kernel
from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.kernel_backend import KernelError
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

fault, n = sys.argv[1], int(sys.argv[2])
talker = random_talker(shape_config("tiny"), "cuda")
kernel = make_kernel("tiny", talker, max_spins=100_000, num_slots=32)
rows = torch.zeros(n, 128)
for slot in range(n):
    kernel.prefill(slot, torch.zeros(1, 128), GenerationParams())
if fault == "withheld":
    kernel._kernel.withhold(3)
else:
    rows[n // 2, 7] = float(fault)
try:
    kernel.decode(range(n), rows)
except KernelError as error:
    sys.exit(str(error))
"""


def error_of(fault: str, n: int) -> str:
    """What a frame of `n` streams says of a fault, in a process of its own: the CUDA context is lost."""
    child = subprocess.run(
        [sys.executable, "-c", FAULT, fault, str(n)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 1, child.stdout[-1000:] + child.stderr[-1000:]
    return child.stderr


@pytest.mark.parametrize("n", [1, 8, 9, 32])
def test_a_withheld_cta_is_an_error_that_names_frame_and_phase(n):
    assert re.search(r"frame 0 hung: CTA \d+ waited for \w+ in exchange \d+ \(", error_of("withheld", n))


@pytest.mark.parametrize("n", [9, 16, 32])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_a_number_is_an_error_and_no_wait(value, n):
    """Of a wide frame, whose words could not carry it."""
    said = error_of(value, n)
    assert "computed a value that is not a number" in said, said
