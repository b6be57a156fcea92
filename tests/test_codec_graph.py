"""The codec of fixed shapes makes the samples of `CodecStream`: on a CPU without graphs."""

from __future__ import annotations

import random
import time
from statistics import median

import pytest
import torch
from codec_weights import ODD, TINY, TRUE, lively_decoder, random_codes, shared_decoder

from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream
from qwen_megakernel.codec.graph_stream import GraphCodecStream
from qwen_megakernel.config import CodecConfig

NUM_SLOTS, NUM_FRAMES = 5, 12


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_samples_are_those_of_the_eager_codec_in_any_company(config: CodecConfig):
    rng, codes = random.Random(0), random_codes(NUM_FRAMES, slots=NUM_SLOTS)
    eager = CodecStream(shared_decoder(config), NUM_SLOTS)
    graphs = GraphCodecStream(shared_decoder(config), NUM_SLOTS, max_streams=3)
    done = [0] * NUM_SLOTS
    while min(done) < NUM_FRAMES:
        waiting = [slot for slot in range(NUM_SLOTS) if done[slot] < NUM_FRAMES]
        slots = rng.sample(waiting, rng.randint(1, min(3, len(waiting))))
        due = torch.stack([codes[slot, done[slot]] for slot in slots])
        expected, made = (stream.launch(slots, due).samples() for stream in (eager, graphs))
        torch.testing.assert_close(torch.tensor(made), torch.tensor(expected), rtol=0, atol=1e-5)
        for slot in slots:
            done[slot] += 1


def test_a_slot_begins_anew_after_a_reset():
    graphs = GraphCodecStream(shared_decoder(TINY), 2)
    codes = random_codes(1)[:, 0]
    first = graphs.launch([1], codes).samples()
    assert (graphs.launch([1], codes).samples() != first).any()
    graphs.reset(1)
    assert (graphs.launch([1], codes).samples() == first).all()


def test_codes_beyond_the_codebook_still_make_samples():
    graphs = GraphCodecStream(shared_decoder(TINY), 1)
    beyond = graphs.launch([0], torch.full((1, 16), 2150, dtype=torch.int32)).samples()
    graphs.reset(0)
    last = graphs.launch([0], torch.full((1, 16), TINY.codebook_size - 1)).samples()
    assert (beyond == last).all()


def test_wrong_slots_are_refused():
    graphs = GraphCodecStream(shared_decoder(TINY), 3, max_streams=2)
    codes = random_codes(1, slots=3)[:, 0]
    for slots, complaint in (([0, 1, 2], "3 slots"), ([3], "slot is 3"), ([1, 1], "each once")):
        with pytest.raises(ValueError, match=complaint):
            graphs.launch(slots, codes[: len(slots)])
    with pytest.raises(ValueError, match="slot is 3"):
        graphs.reset(3)  # that of the rows without a stream
    with pytest.raises(ValueError, match="num_slots is 0"):
        GraphCodecStream(shared_decoder(TINY), 0)


def test_nothing_in_a_frame_depends_on_a_value():
    """Meta tensors have no values: an operation that asks for one fails here as in a capture."""
    with torch.device("meta"):
        decoder = CodecDecoder(TINY)
    graphs = GraphCodecStream(decoder, 4)
    for run in graphs._runs.values():
        with torch.no_grad():
            run()


@pytest.mark.gpu
def test_graphs_make_the_eager_samples(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    codes, decoder = random_codes(10, slots=8).cuda(), lively_decoder(TINY, "cuda")
    eager, graphs = CodecStream(decoder, 8), GraphCodecStream(decoder, 8)
    for frame in range(10):
        slots = range(8)[frame % 3 :][: 1 + frame % 8]
        made = graphs.launch(slots, codes[list(slots), frame]).samples()
        expected = eager.launch(slots, codes[list(slots), frame]).samples()
        torch.testing.assert_close(torch.tensor(made), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_time_of_a_frame_at_the_true_shape():
    """More than a tenth of a frame's sound is what eager PyTorch takes; `-s` shows the figures."""
    decoder, figures = lively_decoder(TRUE, "cuda").bfloat16(), {}
    graphs = GraphCodecStream(decoder, 8, progress=print)
    for streams in (1, 2, 4, 8):
        codes, times = random_codes(1, slots=streams)[:, 0].cuda(), []
        for _ in range(20):
            begin = time.perf_counter()
            graphs.launch(range(streams), codes).samples()
            times.append(1000 * (time.perf_counter() - begin))
        figures[streams] = median(times)
    print(f"\nms of the codec by streams: {figures}")
    assert figures[1] < 8
