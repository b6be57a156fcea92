"""The backend with fixed shapes draws the codes of `TorchBackend`. On a CPU it runs without graphs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch
from cached_rows import fill_with_nan
from listener import TEXT, Listener
from slow_cases import slow_after
from torch import Tensor

from qwen_megakernel import TTSDecoder
from qwen_megakernel.codec.graph_stream import GraphCodecStream
from qwen_megakernel.config import GenerationParams, SamplingParams
from qwen_megakernel.decoding import graph_backend
from qwen_megakernel.decoding.graph_backend import GraphBackend
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.engine import backends
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.shared_rows import SharedRows
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

GREEDY = SamplingParams(0.0, 0, 1.0)
USUAL = GenerationParams(min_frames=3)
SAMPLINGS = {
    "greedy": GenerationParams(talker=GREEDY, predictor=GREEDY),
    "usual": USUAL,
    "every": GenerationParams(
        talker=SamplingParams(1.0, 100, 0.9, 1.2), predictor=SamplingParams(0.8, 0, 0.7)
    ),
}
NUM_SLOTS = 10


class Pair:
    """Both backends with the same prompts and frames. Their codes are compared frame by frame."""

    def __init__(self, shape: str, max_positions: int, device: str = "cpu") -> None:
        self.config = shape_config(shape)
        talkers = [random_talker(self.config, device) for _ in range(2)]
        for talker in talkers:
            for parameter in talker.parameters():
                if not parameter.is_meta:
                    parameter.data = parameter.data.float()
        shapes = self.config.talker, self.config.predictor
        sizes = {"num_slots": NUM_SLOTS, "max_positions": max_positions}
        self.said: list[str] = []
        self.eager = TorchBackend(talkers[0], *shapes, **sizes)
        self.graphs = GraphBackend(talkers[1], *shapes, **sizes, progress=self.said.append)
        fill_with_nan(self.eager.kv_cache)
        for tensor in self.graphs.kv_cache.tensors.values():
            tensor.fill_(100.0)  # rows of earlier streams must have no weight
        self._random = torch.Generator().manual_seed(3)

    @property
    def both(self) -> tuple[TorchBackend, GraphBackend]:
        return self.eager, self.graphs

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.config.talker.hidden_size, generator=self._random)

    def prefill(self, slot: int, num_rows: int, params: GenerationParams) -> None:
        rows = self.rows(num_rows)
        for backend in self.both:
            backend.prefill(slot, rows, params)

    def decode(self, slots: Iterable[int], num_frames: int) -> Tensor:
        """Codes [num_frames, n, 16] on which both agree."""
        slots, made = list(slots), []
        for text in 0.1 * self.rows(num_frames, len(slots)):
            expected, codes = (backend.decode(slots, text) for backend in self.both)
            assert torch.equal(codes, expected), f"frame {len(made)} of slots {slots}"
            made.append(codes)
        return torch.stack(made)

    def release(self, slots: Iterable[int]) -> None:
        for slot in slots:
            for backend in self.both:
                backend.release(slot)


@pytest.fixture(scope="module", params=slow_after(1, ["tiny", "tiny-1.7b"]))
def pair(request) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_backend, "REACHES", (16, 64))
        return Pair(request.param, max_positions=600)


@pytest.mark.parametrize(
    ("sampling", "streams"), slow_after(2, [("greedy", 3), ("every", 8), ("usual", 1), ("usual", 8)])
)
def test_codes_are_those_of_the_eager_backend(pair, sampling, streams):
    params = SAMPLINGS[sampling]
    slots = [7, 0, 9, 2, 5, 1, 8, 3][:streams]
    for i, slot in enumerate(slots):
        pair.prefill(slot, 5 + 3 * i, replace(params, seed=100 + i))
    codes = pair.decode(slots, 8)  # streams cross 16 positions one after the other
    pair.release(slots)
    assert len(codes.unique()) > 50


def test_streams_come_and_go(pair):
    """Streams with other parameters and lengths use the slots again, beside other streams."""
    pair.prefill(4, 60, replace(USUAL, seed=1))
    pair.decode([4], 3)
    pair.prefill(2, 9, replace(SAMPLINGS["every"], seed=2))
    pair.decode([4, 2], 3)  # slot 4 crosses 64 positions
    pair.decode([2], 2)
    pair.prefill(6, 130, SAMPLINGS["greedy"])
    pair.decode([6, 2, 4], 2)
    pair.release([2])
    pair.prefill(2, 3, replace(USUAL, seed=3))
    pair.decode([2, 6], 4)
    pair.release([2, 4, 6])


def test_a_stream_s_codes_do_not_depend_on_how_long_others_are(pair):
    prompt, params = pair.rows(6), replace(USUAL, seed=5)
    others = {1: pair.rows(40), 2: pair.rows(300)}
    text, found = 0.1 * pair.rows(6, 3), []
    for company in ([], [1], [1, 2]):
        pair.graphs.prefill(0, prompt, params)
        for slot in company:
            pair.graphs.prefill(slot, others[slot], USUAL)
        slots = [*company, 0]
        found.append(torch.stack([pair.graphs.decode(slots, row[: len(slots)] * 0)[-1] for row in text]))
        for slot in slots:
            pair.graphs.release(slot)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_prompts_longer_than_the_prefill_graphs_reach(pair):
    pair.prefill(3, 590, replace(USUAL, seed=8))
    pair.decode([3], 5)
    pair.release([3])


def test_shared_rows_are_prefilled_once(pair):
    rows, found = pair.rows(30), []
    for slot in (1, 2):
        pair.graphs.prefill(slot, rows, USUAL, SharedRows(7, 20))
        found.append(torch.stack([pair.graphs.decode([slot], pair.rows(1) * 0) for _ in range(4)]))
    pair.graphs.release(1)
    pair.graphs.release(2)
    assert torch.equal(*found)


def test_a_frame_s_values_are_those_of_the_eager_backend(pair):
    """With injected noise and forced codes, as the kernel's tests call it."""
    slots, vocab = [5, 1, 3], pair.config.talker.vocab_size
    for slot in slots:
        pair.prefill(slot, 4 + slot, replace(USUAL, seed=slot))
    noise = torch.randn(3, 16, vocab, generator=torch.Generator().manual_seed(0))
    forced = torch.randint(0, 2048, (3, 16), generator=torch.Generator().manual_seed(1))
    for arguments in ({"noise": noise}, {"forced_codes": forced}, {}):
        text = pair.rows(3)
        expected, made = (backend.decode_frame(slots, text, **arguments) for backend in pair.both)
        assert torch.equal(made.codes, expected.codes)
        for name in ("hidden", "talker_logits", "predictor_logits"):
            ours, theirs = getattr(made, name), getattr(expected, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    pair.release(slots)


def test_eos_waits_for_the_minimum_length(pair):
    eos, keeps_all = pair.config.talker.codec_eos_id, SamplingParams(1.0, 0, 1.0)
    noise = torch.zeros(2, 16, pair.config.talker.vocab_size)
    noise[:, 0, eos] = 1e4
    for slot, min_frames in enumerate((0, 2)):
        pair.prefill(slot, 5, GenerationParams(talker=keeps_all, min_frames=min_frames))
    text, drawn = pair.rows(2) * 0, []
    for _ in range(3):
        expected, codes = (backend.decode([0, 1], text, noise) for backend in pair.both)
        assert torch.equal(codes, expected)
        drawn.append((codes[:, 0] == eos).tolist())
    pair.release([0, 1])
    assert drawn == [[True, False], [True, False], [True, True]]


def test_wrong_arguments_change_nothing(pair):
    pair.prefill(0, 598, USUAL)
    zeros = pair.rows(1) * 0
    for slots, complaint in (([1], "not in use"), ([0, 0], "repeat"), ([], "0 slots")):
        with pytest.raises(ValueError, match=complaint):
            pair.graphs.launch(slots, zeros)
    pair.decode([0], 3)  # to the last position
    with pytest.raises(ValueError, match="full: 600 positions"):
        pair.graphs.launch([0], zeros)
    pair.release([0])


def test_a_frame_runs_the_shortest_graphs_that_do(pair, monkeypatch):
    taken = []
    for runs in (pair.graphs._talker_runs, pair.graphs._code_runs):
        for key, run in runs.items():
            monkeypatch.setitem(runs, key, lambda key=key, run=run: (taken.append(key), run()))
    pair.prefill(0, 15, USUAL)
    pair.prefill(1, 65, SAMPLINGS["every"])
    for slots in ([0], [0], [0], [0, 1]):
        pair.decode(slots, 1)
    pair.release([0, 1])
    assert taken == [16, True, 16, True, 64, True, 600, False]


def test_nothing_in_a_frame_depends_on_a_value():
    """Meta tensors have no values: an operation that asks for one fails here as in a capture."""
    config = shape_config("tiny-1.7b")
    with torch.device("meta"):
        talker = Talker(config.talker, config.predictor)
    backend = GraphBackend(talker, config.talker, config.predictor, max_positions=600)
    for run in (backend._draw_noise, *backend._talker_runs.values(), *backend._code_runs.values()):
        with torch.inference_mode():
            run()


@pytest.mark.slow
def test_whole_turns_sound_as_with_the_eager_backend(brief_base, monkeypatch):
    """Three at once, in an engine of two slots."""
    spoken = []
    for fixed_shapes in (False, True):
        if fixed_shapes:
            monkeypatch.setattr(backends, "TorchBackend", GraphBackend)
            monkeypatch.setattr(backends, "CodecStream", GraphCodecStream)
        listeners = [Listener() for _ in range(3)]
        with TTSDecoder.load(brief_base, device="cpu", num_slots=2, max_positions=200) as tts:
            for seed, listener in enumerate(listeners):
                params = GenerationParams(seed=seed, min_frames=6, max_frames=12)
                tts.open_turn(TEXT, sink=listener, ended=True, params=params)
            assert all(listener.wait().reason != "error" for listener in listeners)
        spoken.append([listener.samples for listener in listeners])
    for eager, ours in zip(*spoken, strict=True):
        np.testing.assert_allclose(ours, eager, atol=1e-4)


# ---------------------------------------------------------------------------- on a GPU

LENGTHS = {1: [2042], 3: [250, 508, 1020], 8: [250, 508, 1020, 2042, 5, 100, 600, 1500]}
"""Prompt rows by number of streams. Eight frames later the longest streams are beyond the next reach."""


@pytest.fixture(scope="module")
def on_gpu() -> Pair:
    return Pair("tiny", max_positions=2112, device="cuda")


def assert_graphs_draw_the_eager_codes(pair: Pair, params: GenerationParams, streams: int) -> None:
    slots = [7, 0, 9, 2, 5, 1, 8, 3][:streams]
    for i, (slot, length) in enumerate(zip(slots, LENGTHS[streams], strict=True)):
        pair.prefill(slot, length, replace(params, seed=100 + i))
    pair.decode(slots, 8)
    pair.release(slots)


@pytest.mark.gpu
@pytest.mark.parametrize("streams", LENGTHS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_graphs_draw_the_eager_codes(on_gpu, sampling, streams):
    assert_graphs_draw_the_eager_codes(on_gpu, SAMPLINGS[sampling], streams)


@pytest.mark.gpu
def test_graphs_draw_the_eager_codes_at_the_true_shape():
    assert_graphs_draw_the_eager_codes(Pair("0.6b", max_positions=2112, device="cuda"), USUAL, 8)


@pytest.mark.gpu
def test_captured_values_are_those_of_the_same_functions_without_graphs(on_gpu):
    """Bit for bit, and with the graphs for rare sampling too."""
    graphs, found = on_gpu.graphs, []
    captured = graphs._draw_noise, graphs._talker_runs, graphs._code_runs
    prompts = [on_gpu.rows(length) for length in (9, 300)]
    for eagerly in (False, True):
        if eagerly:
            graphs._draw_noise = graphs._compute_noise
            graphs._talker_runs = {r: partial(graphs._run_talker, r) for r in graphs._talker_runs}
            graphs._code_runs = {u: partial(graphs._draw_codes, u) for u in graphs._code_runs}
        for slot, sampling in enumerate(("usual", "every")):
            graphs.prefill(slot, prompts[slot], replace(SAMPLINGS[sampling], seed=slot))
        text = torch.zeros(2, on_gpu.config.talker.hidden_size)
        found.append([graphs.decode_frame(s, text[: len(s)]) for s in ([0], [0], [0, 1], [1, 0])])
        on_gpu.graphs.release(0)
        on_gpu.graphs.release(1)
    graphs._draw_noise, graphs._talker_runs, graphs._code_runs = captured
    for replayed, run in zip(*found, strict=True):
        for name in ("codes", "hidden", "talker_logits", "predictor_logits"):
            assert torch.equal(getattr(replayed, name), getattr(run, name)), name


@pytest.mark.gpu
def test_a_frame_takes_at_most_18_ms_and_the_capture_less_than_20_s():
    """At the 0.6B shape in bf16, on an H200; `-s` shows the figures."""
    config = shape_config("0.6b")
    talker = random_talker(config, "cuda")
    started = time.monotonic()
    graphs = GraphBackend(talker, config.talker, config.predictor, progress=print)
    captured_s = time.monotonic() - started
    rows = torch.randn(2000, config.talker.hidden_size, device="cuda").bfloat16()
    figures = {}
    for position in (200, 2000):
        for streams in (1, 2, 4, 8):
            slots, text = range(streams), torch.zeros(streams, config.talker.hidden_size).cuda()
            for slot in slots:
                graphs.prefill(slot, rows[: position - 10], GenerationParams(seed=slot))
            times = []
            for _ in range(20):
                begin = time.perf_counter()
                graphs.decode(slots, text)
                times.append(1000 * (time.perf_counter() - begin))
            figures[position, streams] = median(times)
            for slot in slots:
                graphs.release(slot)
    print(f"\ncapture {captured_s:.1f} s; ms a frame by (position, streams): {figures}")
    assert captured_s < 20
    assert max(ms for (position, _), ms in figures.items() if position == 200) <= 18
