"""The codec's kernels: their parameters on the CPU, and their results and times on a GPU."""

from __future__ import annotations

import copy
import ctypes
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from codec_interpreter import Interpreter
from codec_weights import ODD, TINY, TRUE, WIDE, lively_decoder, random_codes
from torch import Tensor

from qwen_megakernel.build_tts import KNOWN_ARCHES, build, codec_library, detect_arch
from qwen_megakernel.codec import cuda_params
from qwen_megakernel.codec.cuda_launcher import check_sizes
from qwen_megakernel.codec.cuda_ops import Rows
from qwen_megakernel.codec.cuda_plan import CodecPlan
from qwen_megakernel.codec.cuda_stream import CudaCodecStream, batch_sizes
from qwen_megakernel.codec.decoder import CodecStream
from qwen_megakernel.config import HOP, CodecConfig
from qwen_megakernel.installation.cubin import read_cubin
from qwen_megakernel.installation.nvrtc import find_compiler
from qwen_megakernel.tools.machine_code import resources, system_calls

if torch.cuda.is_available():
    from kernel_twins import forms_here

ROOT = Path(__file__).parents[1]
C_TYPES = {
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "int64_t": ctypes.c_int64,
    "Rows": cuda_params.Rows,
}


@pytest.mark.parametrize("name", ["Rows", "Embed", "Gemm", "Attention", "DepthwiseNorm", "LastConv"])
def test_structures_are_mirrored(name):
    header = (ROOT / "csrc/codec_params.h").read_text()
    body = re.sub(r"//.*", "", re.search(rf"struct {name} {{(.*?)\n}};", header, re.DOTALL)[1])
    expected = []
    for type_name, names in re.findall(r"^\s*(?:const )?(\w+\*?) ([\w, ]+);", body, re.MULTILINE):
        c_type = ctypes.c_void_p if type_name.endswith("*") else C_TYPES[type_name]
        expected += [(field, c_type) for field in names.split(", ")]
    assert list(getattr(cuda_params, name)._fields_) == expected


@pytest.mark.slow
@pytest.mark.parametrize("arch", KNOWN_ARCHES)
def test_kernels_compile_without_spills(arch, shared_builds):
    if find_compiler() is None:
        pytest.skip("no CUDA compiler")
    product = build(codec_library(arch), arch)
    assert [kernel for kernel in resources(product) if kernel.spill_bytes] == []
    assert len(resources(product)) == 17
    assert system_calls(product) == []
    check_sizes(product, read_cubin(product).facts)


@pytest.mark.parametrize(
    ("max_streams", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (32, [1, 2, 4, 8, 16, 32])],
)
def test_graphs_end_with_the_first_that_holds_all_streams(max_streams, sizes):
    assert batch_sizes(max_streams) == sizes


# ---------------------------------------------------------------------------- on a GPU


def build_codec(form: str, arch: str | None = None) -> Path:
    arch = arch or detect_arch(torch.device("cuda"))
    return build(codec_library(arch, form), arch)


@pytest.fixture(scope="module")
def library() -> Path:
    return build_codec(os.environ.get("FRAME_KERNEL_FORM", "auto"))


def decode(stream: CudaCodecStream, slots: Sequence[int], codes: Tensor) -> Tensor:
    """`CodecStream.decode` by launches, each of one frame for at most `max_streams` slots."""
    slots, pcm = list(slots), torch.empty(*codes.shape[:2], HOP)
    for first in range(0, len(slots), stream.max_streams):
        part = slice(first, first + stream.max_streams)
        for frame in range(codes.shape[1]):
            launched = stream.launch(slots[part], codes[part, frame].cuda())
            pcm[part, frame] = torch.from_numpy(launched.samples())
    return pcm.flatten(1).cuda()


def written_by(op: object) -> Iterator[tuple[str, Tensor]]:
    for name in ("raw", "out", "kv", "squares_out", "pcm"):
        value = getattr(op, name, None)
        if value is not None:
            yield name, value.data if isinstance(value, Rows) else value


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TINY, ODD, WIDE], ids=["tiny", "odd", "wide"])
@torch.no_grad()
def test_every_launch_is_the_interpreter_s(config: CodecConfig, library: Path):
    slots, plan = [2, 0, 1], CodecPlan(lively_decoder(config), 3, max_streams=4)
    ours, interpreter = CudaCodecStream(lively_decoder(config).cuda(), 3, library), Interpreter(plan)
    ours._plan.state.zero_()
    for frame in range(2 * config.sliding_window if config is ODD else 12):
        codes = random_codes(1, frame, 3)[:, 0]
        interpreter.begin(slots, codes)
        ours._launcher.input[:3] = torch.cat((torch.tensor(slots)[:, None], codes), 1).int()
        ours._plan.frame_counts[:3] = plan.frame_counts[:3].cuda()
        for index, (mine, theirs) in enumerate(zip(ours._plan.ops, plan.ops, strict=True)):
            ours._launcher.launch(mine, 3)
            interpreter.run(theirs)
            for (name, a), (_, b) in zip(written_by(mine), written_by(theirs), strict=True):
                got, expected = a[:3].float().cpu(), b[:3].float()
                worst = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
                assert worst <= 0.01, f"frame {frame}, launch {index}, {type(mine).__name__}.{name}"
                a[:3].copy_(b[:3])  # the next launch starts equal


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.gpu
@torch.no_grad()
def test_true_shape_is_as_close_as_pytorch_s_bf16(library, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact, codes = lively_decoder(TRUE, "cuda"), random_codes(90, slots=3)
    truth = CodecStream(exact, 3).decode(range(3), codes)
    theirs = CodecStream(copy.deepcopy(exact).bfloat16(), 3).decode(range(3), codes)
    pcm = decode(CudaCodecStream(exact, 3, library), range(3), codes)
    edges = torch.arange(1, 90) * HOP
    error, jump = pcm - truth, (pcm - truth).diff()[:, edges - 1].abs().max().item()
    ratio = rms(error) / rms(theirs - truth)
    with capsys.disabled():
        print(f"\n  rms error {rms(error):.2g}, {ratio:.2f} of PyTorch's bf16; at borders {jump:.2g}")
    assert ratio <= 1
    assert jump <= 2 * error.abs().max().item()
    assert error.abs().max() <= 1.25 * (theirs - truth).abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TRUE, ODD], ids=["true", "odd"])
@torch.no_grad()
def test_splits_and_company_do_not_change_a_bit(config, library):
    """Slots that are frames apart, launches of all sizes in any order, beside a decode alone."""
    frames, num_slots, rng = 12, 40, random.Random(0)
    codes = random_codes(frames, slots=num_slots)
    decoder = lively_decoder(config, "cuda")
    stream = CudaCodecStream(decoder, num_slots, library, max_streams=32)
    alone = torch.cat([decode(stream, [slot], codes[slot : slot + 1]) for slot in range(num_slots)])
    for slot in range(num_slots):
        stream.reset(slot)
    together = decode(stream, range(num_slots), codes)  # more than one launch a frame
    assert torch.equal(together, alone)
    for slot in range(num_slots):
        stream.reset(slot)
    mixed, done = torch.zeros_like(alone), [0] * num_slots
    while min(done) < frames:
        waiting = [slot for slot in range(num_slots) if done[slot] < frames]
        slots = rng.sample(waiting, rng.randint(1, len(waiting)))
        count = min(rng.randint(1, 3), *(frames - done[slot] for slot in slots))
        part = decode(stream, slots, torch.stack([codes[s, done[s] : done[s] + count] for s in slots]))
        for slot, samples in zip(slots, part, strict=True):
            mixed[slot, done[slot] * HOP : (done[slot] + count) * HOP] = samples
            done[slot] += count
    assert torch.equal(mixed, alone)


@pytest.mark.gpu
@torch.no_grad()
def test_samples_are_the_same_in_every_form():
    """A form decides how the tiles are cut, and so how many streams' columns a CTA has."""
    codes, decoder = random_codes(20, slots=32), lively_decoder(TRUE, "cuda")
    heard = {}
    for arch, form in forms_here():
        stream = CudaCodecStream(decoder, 32, build_codec(form, arch))
        for streams in (1, 8, 32):
            samples = decode(stream, range(streams), codes[:streams])
            assert torch.equal(samples, heard.setdefault(streams, samples)), (arch, form, streams)
            assert samples.std() > 1e-3
            for slot in range(streams):
                stream.reset(slot)


@pytest.mark.gpu
def test_only_sizes_that_can_be_asked_for_are_captured(library):
    decoder = lively_decoder(TINY, "cuda")
    assert list(CudaCodecStream(decoder, 16, library, max_streams=8)._graphs) == [1, 2, 4, 8]
    assert list(CudaCodecStream(decoder, 2, library, max_streams=8)._graphs) == [1, 2]


@pytest.mark.gpu
def test_bad_input_moves_nothing(library):
    codes = random_codes(3)
    decoder = lively_decoder(TINY, "cuda")
    stream = CudaCodecStream(decoder, 3, library, max_streams=2)
    untouched = CudaCodecStream(decoder, 3, library)
    for slots in ([3], [0, 0], [], [0, 1, 2]):
        with pytest.raises(ValueError, match="allowed"):
            stream.launch(slots, codes[:, 0].expand(len(slots), -1).cuda())
    assert torch.equal(decode(stream, [0], codes), decode(untouched, [0], codes))


@pytest.mark.gpu
def test_a_code_out_of_range_counts_as_the_nearest(library):
    codes, decoder = random_codes(3), lively_decoder(TINY, "cuda")
    codes[0, 1, ::2], codes[0, 1, 1::2] = 5000, -1
    nearest = codes.clamp(0, TINY.codebook_size - 1)
    stream = CudaCodecStream(decoder, 2, library)
    assert torch.equal(decode(stream, [0], codes), decode(stream, [1], nearest))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TRUE, ODD], ids=["true", "odd"])
@torch.no_grad()
def test_a_slot_goes_on_from_a_prepared_state_bit_for_bit(config, library):
    """Longer than the window, beside a slot that is in the middle of its speech, more than once."""
    stream = CudaCodecStream(lively_decoder(config, "cuda"), 4, library, max_streams=3)
    reference, speech = random_codes(90, slots=1), random_codes(9, 5, slots=1)
    together = decode(stream, [3], torch.cat((reference, speech), 1))[:, 90 * HOP :]
    beside = random_codes(6, 7, slots=1)
    alone = decode(stream, [2], beside)
    stream.reset(2)
    begun = decode(stream, [2], beside[:, :3])
    state = stream.state_after(reference[0])
    assert state.num_frames == 90
    for slot in (0, 3, 1):
        stream.restore(slot, state)
    assert torch.equal(torch.cat((begun, decode(stream, [2], beside[:, 3:])), 1), alone)
    for slot in (0, 3):
        assert torch.equal(decode(stream, [slot], speech), together)
    stream.reset(0)
    fresh = decode(stream, [0], speech)
    assert not torch.equal(fresh, together)
    assert torch.equal(decode(stream, [1], speech), together), "the state was moved by its use"
