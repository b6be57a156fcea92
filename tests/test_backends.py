"""Which backend runs, and the reason if no kernels can. Stand-ins replace GPU and compiler."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stand_in_compiler import MAKES_JUNK, put_compiler, run_instead

from qwen_megakernel import build_tts
from qwen_megakernel.__main__ import main
from qwen_megakernel.build_tts import ARCHES, BuildError, build, detect_arch, frame_library
from qwen_megakernel.checkpoint import CheckpointError
from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream
from qwen_megakernel.codec.graph_stream import GraphCodecStream
from qwen_megakernel.config import ModelConfig
from qwen_megakernel.decoding.graph_backend import GraphBackend
from qwen_megakernel.decoding.torch_backend import TorchBackend
from qwen_megakernel.engine import backends as backends_module
from qwen_megakernel.engine.backends import Backends, memory_refusal
from qwen_megakernel.engine.memory import DEFAULT_BYTES, choose_sizes
from qwen_megakernel.installation import build_environment, nvrtc
from qwen_megakernel.installation.kernel_tuning import Setting, Tuning
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.synth.checkpoint import random_talker
from qwen_megakernel.synth.config import shape_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
REAL_PROCESS = nvrtc._PROCESS
PTXAS = """ptxas info : Compiling entry function '_Z1fv' for 'sm_90a'
0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
Used 96 registers"""


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return shape_config("tiny")


@pytest.fixture(scope="module")
def talker(config) -> Talker:
    return random_talker(config, "cpu")


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """An H100 as torch would describe it, an empty cache, no compiler."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(nvrtc, "USUAL_HOME", tmp_path / "nowhere")
    monkeypatch.setattr(nvrtc, "_pip_folders", lambda: [])
    monkeypatch.setenv("QWEN_MEGAKERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))


@pytest.fixture
def compiler(hopper, tmp_path, monkeypatch):
    """A compiler that does what is asked: `compiler(body of a shell script)`; gives its library."""

    def make(body: str) -> Path:
        run_instead(monkeypatch, tmp_path / "compiler.sh", body)
        return put_compiler(tmp_path)

    return make


def make_both(name: str, config: ModelConfig, talker: Talker, dtype=BF16, device=GPU, sms=None):
    """Decoder, codec, description and progress of a backend choice; the weights are on the CPU."""
    lines: list[str] = []
    backends = Backends(name, config, device, dtype, lines.append, sms)
    decoder = backends.make_decoder(talker, num_slots=2, max_positions=64)
    codec = backends.make_codec(CodecDecoder(config.codec), 2, 2)
    return decoder, codec, backends.description, lines


def assert_falls_back(config, talker, reason, dtype=BF16, device=GPU):
    decoder, codec, description, lines = make_both("auto", config, talker, dtype, device)
    assert isinstance(decoder, TorchBackend)
    assert isinstance(codec, CodecStream)
    runs = "torch" if device == CPU else "torch, CUDA graphs"
    assert (description["backend"], description["codec"]) == (runs, runs)
    assert isinstance(decoder, GraphBackend) is isinstance(codec, GraphCodecStream) is (device == GPU)
    assert reason in description["note"]
    assert any(reason in line for line in lines)
    assert "\n" not in description["note"]
    with pytest.raises(CheckpointError, match="backend megakernel cannot run: ") as caught:
        make_both("megakernel", config, talker, dtype, device)
    assert reason in str(caught.value)


def test_without_a_gpu(config, talker):
    assert_falls_back(config, talker, "the kernels need a CUDA GPU", device=CPU)


def test_in_another_dtype(config, talker, hopper):
    assert_falls_back(config, talker, "in bf16, not in float32", dtype=torch.float32)


def test_on_an_older_gpu(config, talker, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert_falls_back(config, talker, "Tesla T4 is sm_75, the kernels need sm_80 or newer")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "80"), ((8, 6), "86"), ((8, 9), "89"), ((9, 0), "90a"), ((12, 1), "121a")],
)
def test_each_gpu_has_its_architecture(capability, arch, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert detect_arch(GPU) == arch


def test_a_gpu_may_run_older_kernels(hopper, monkeypatch):
    for named, expected in (("90a", "90a"), ("86", "86"), ("80", "80"), ("", "90a")):
        monkeypatch.setenv("QWEN_MEGAKERNEL_ARCH", named)
        assert detect_arch(GPU) == expected
    for named in ("90", "120a", "75", "sm_86", "100"):
        monkeypatch.setenv("QWEN_MEGAKERNEL_ARCH", named)
        with pytest.raises(
            BuildError, match=f"QWEN_MEGAKERNEL_ARCH is '{named}', allowed on this GPU: 80"
        ):
            detect_arch(GPU)


def test_without_a_compiler(config, talker, hopper):
    assert_falls_back(config, talker, "no CUDA compiler is found")


def test_with_a_compiler_that_does_not_run(config, talker, compiler, monkeypatch):
    compiler("exit 1")
    monkeypatch.setattr(nvrtc, "_PROCESS", REAL_PROCESS)
    assert_falls_back(config, talker, "libnvrtc.so.13: file too short): reinstall it, or set CUDA_HOME")


def test_when_a_source_does_not_compile(config, talker, compiler):
    compiler("echo 'csrc/layer.cuh(12): error: no such thing'; exit 2")
    assert_falls_back(config, talker, "csrc/layer.cuh(12): error: no such thing")


def test_when_the_library_cannot_be_loaded(config, talker, compiler):
    compiler(MAKES_JUNK)
    assert_falls_back(config, talker, "frame.cubin is no cubin")


def test_a_long_compilation_shows_that_it_goes_on(config, talker, compiler, monkeypatch):
    monkeypatch.setattr(backends_module, "_TELL_EVERY_S", 0.1)
    compiler("/bin/sleep 0.5; exit 1")
    *_, lines = make_both("auto", config, talker)
    assert sum(line.startswith("compiling the megakernel, 0 s more") for line in lines) >= 2


def test_a_shape_the_kernel_does_not_know(config, talker, compiler):
    compiler(MAKES_JUNK)
    odd = replace(config, predictor=replace(config.predictor, vocab_size=2047))
    lines: list[str] = []
    backends = Backends("auto", odd, GPU, BF16, lines.append)
    backends._config = config  # the weights' own, for PyTorch
    assert isinstance(backends.make_decoder(talker, num_slots=2, max_positions=64), TorchBackend)
    assert "vocab_size is 2047, the kernel needs a multiple of 32" in backends.description["note"]


def keep_tuning(config: ModelConfig, **changes: str) -> Tuning:
    target = replace(backends_module.tuning_target(config, GPU), **changes)
    tuning = Tuning(target, Setting(ring_slots=14, l2_share=0.25, grid=128), {"1": (0.95, 0.96)})
    tuning.save()
    return tuning


@pytest.fixture
def made(monkeypatch) -> list[dict]:
    """What the frame kernel is made with; PyTorch stands in for it."""
    options_of_all: list[dict] = []

    def make(*shape, **options):
        options_of_all.append(options)
        return TorchBackend(*shape, num_slots=2, max_positions=64)

    monkeypatch.setattr(backends_module, "MegakernelBackend", make)
    monkeypatch.setattr(backends_module, "_forget_layers", lambda talker: None)
    return options_of_all


def test_the_kernel_takes_the_sms_that_were_chosen(config, talker, compiler, made):
    compiler(MAKES_JUNK)
    keep_tuning(config)
    _, _, description, _ = make_both("auto", config, talker, sms=66)
    assert (made[0]["grid"], made[0]["l2_share"]) == (66, 0.25)
    assert description["sms"] == "a frame takes 66 of 132"
    assert "expect" not in description


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("auto", CPU, "the kernels need a CUDA GPU"),
        ("torch", GPU, "backend is torch"),
        ("auto", GPU, "no CUDA compiler"),
    ],
)
def test_sms_without_the_frame_kernel_are_an_error(name, device, reason, config, talker, hopper):
    with pytest.raises(CheckpointError, match="sms is 66, and only the frame kernel") as error:
        make_both(name, config, talker, device=device, sms=66)
    assert reason in str(error.value)


def test_sms_that_the_gpu_does_not_have_are_an_error(config, talker, compiler, monkeypatch):
    def refuse(*_, grid, **options):
        raise ValueError(f"grid is {grid}, allowed: 8 to 132")

    compiler(MAKES_JUNK)
    monkeypatch.setattr(backends_module, "MegakernelBackend", refuse)
    with pytest.raises(CheckpointError, match=r"sms is 133, .*: grid is 133, allowed: 8 to 132"):
        make_both("auto", config, talker, sms=133)


def test_a_tuning_is_used_and_named(config, talker, compiler, made):
    compiler(MAKES_JUNK)
    tuning = keep_tuning(config)
    _, _, description, _ = make_both("auto", config, talker)
    assert description["tuning"] == str(tuning)
    assert (made[0]["grid"], made[0]["l2_share"]) == (128, 0.25)
    header = (made[0]["library"].parent / "geometry.h").read_text()
    assert header == tuning.target.geometry + "#define QWEN_TTS_RING_SLOTS 14\n"


def test_a_tuning_of_other_kernels_is_not_used(config, talker, compiler):
    compiler(MAKES_JUNK)
    keep_tuning(config, digest="of kernels before")
    _, _, description, lines = make_both("auto", config, talker)
    assert "tuning" not in description
    assert sum("is ignored: it is of other kernels; tune again" in line for line in lines) == 1
    (folder,) = build_environment.cache_folder().glob("frame-sm_90a-*/")
    assert "RING_SLOTS" not in (folder / "geometry.h").read_text()


def test_torch_is_asked_for_and_needs_no_excuse(config, talker, hopper):
    decoder, codec, description, lines = make_both("torch", config, talker)
    assert isinstance(decoder, GraphBackend)
    assert isinstance(codec, GraphCodecStream)
    assert description == {"backend": "torch, CUDA graphs", "codec": "torch, CUDA graphs"}
    assert [line.split(" in ")[0] for line in lines] == [
        "capturing the decoder's CUDA graphs",
        "captured 4 CUDA graphs of the decoder",
        "capturing the codec's CUDA graphs",
        "captured 2 CUDA graphs of the codec",
    ]


def test_torch_on_a_cpu_captures_nothing(config, talker):
    decoder, codec, description, lines = make_both("torch", config, talker, device=CPU)
    assert (type(decoder), type(codec)) == (TorchBackend, CodecStream)
    assert description == {"backend": "torch", "codec": "torch"}
    assert lines == []


def test_a_failed_capture_leaves_eager_pytorch_and_a_note(config, talker, hopper, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(backends_module, "GraphBackend", fail)
    decoder, codec, description, lines = make_both("torch", config, talker)
    assert type(decoder) is TorchBackend
    assert isinstance(codec, GraphCodecStream)
    note = "eager PyTorch instead of CUDA graphs: operation not permitted when stream is capturing"
    assert description == {"backend": "torch", "codec": "torch, CUDA graphs", "note": note}
    assert note in lines


def test_too_little_memory_for_the_graphs_is_not_an_excuse(config, talker, hopper, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backends_module, "GraphBackend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        make_both("torch", config, talker)


def test_no_such_backend(config):
    with pytest.raises(CheckpointError, match="'jax', allowed: auto, torch, megakernel"):
        Backends("jax", config, CPU, BF16, print)


def test_memory_is_named_in_gigabytes(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200_000_000, 8_000_000_000))
    sizes = choose_sizes(shape_config("0.6b"), BF16, max_positions=3072, num_slots=16)
    said = memory_refusal(GPU, sizes)
    assert "0.2 of 8.0 GB are left, and the caches take 5.8 GB" in said
    assert "--memory" in said


@pytest.mark.parametrize("shape", ["0.6b", "1.7b"])
def test_slots_and_pages_are_what_fits(shape):
    config, full = shape_config(shape), 12  # pages of a turn of 3072 positions
    sizes = partial(choose_sizes, config, BF16, max_positions=3072)
    assert (sizes(num_slots=16).num_slots, sizes(num_slots=16).num_pages) == (16, 16 * full)
    assert sizes(num_slots=4).num_pages == 4 * full, "no more than all slots can need"
    by_memory = sizes()
    assert 80 <= by_memory.num_slots <= 100
    assert by_memory.num_pages >= 2 * by_memory.num_slots
    assert DEFAULT_BYTES - by_memory.page_bytes < by_memory.num_bytes <= DEFAULT_BYTES
    many = sizes(num_slots=512, memory=40 * 10**9)
    assert many.num_pages >= 2 * 512, "512 turns of 512 positions, codec state included"
    assert many.num_bytes <= 40 * 10**9
    assert sizes(on_cpu=True).num_slots == 16
    assert sizes(on_cpu=True, memory=10**9).num_slots < 16
    with pytest.raises(ValueError, match=r"512 slots and one turn of 3072 positions need 4\.86 GB, and"):
        sizes(num_slots=512, memory=4 * 10**9)


def test_small_models_get_no_thousands_of_slots():
    assert choose_sizes(shape_config("tiny"), BF16, max_positions=3072).num_slots == 256


# ---------------------------------------------------------------------------- builds


def test_a_kept_build_needs_no_compiler(config, compiler):
    library, path = frame_library(config, "90a"), compiler(MAKES_JUNK)
    product = build(library, "90a")
    assert product.name == "frame.cubin"
    path.unlink()
    assert build(library, "90a") == product
    with pytest.raises(BuildError, match="no CUDA compiler is found"):
        build(frame_library(config, "120a"), "120a")


def test_a_build_belongs_to_its_own_sources(config, compiler, tmp_path, monkeypatch):
    """An edit of what a library includes is another build; an edit beside it is not."""
    compiler(MAKES_JUNK)
    for path in build_tts.SOURCES.glob("*.*"):
        (tmp_path / "csrc").mkdir(exist_ok=True)
        (tmp_path / "csrc" / path.name).write_text(path.read_text())
    monkeypatch.setattr(build_tts, "SOURCES", tmp_path / "csrc")
    library = frame_library(config, "90a")
    first = build(library, "90a")
    for name, same in (("codec_unit.cuh", True), ("params.h", False)):
        with (tmp_path / "csrc" / name).open("a") as file:
            file.write("\n// another line\n")
        assert (build(library, "90a") == first) is same


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "sm_75"], "expected sm_80 or newer"),
        (["--arch", "90a", "--model", "/nowhere"], "error: /nowhere"),
        ([], "name one, --arch 80 86 89 90a 100a 120a 121a"),
    ],
)
def test_build_command_refuses(arguments, said, hopper, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = main(["build", *arguments])
    except SystemExit as ended:
        status = ended.code
    assert status
    assert said in capsys.readouterr().err


def test_build_command_builds_both_for_each(compiler, capsys):
    compiler(f'{MAKES_JUNK}\necho "{PTXAS}"')
    assert main(["build", "--model", "tiny", "--arch", "sm_90a", "120", "sm_86"]) == 0
    said = capsys.readouterr().out
    for name in ("frame sm_90a", "codec sm_90a", "frame sm_120a", "codec sm_120a", "frame sm_86"):
        assert name in said
    assert said.count("1 kernels, at most 96 registers, 12 bytes of spills") == 6


def test_build_command_fills_a_folder_with_all_kernels(compiler, capsys, tmp_path):
    compiler(f'{MAKES_JUNK}\necho "{PTXAS}"')
    assert main(["build", "--all", "--out", str(tmp_path / "kernels")]) == 0
    assert "kernels of all shapes go to" in capsys.readouterr().out
    made = sorted(path.parent.name.split("-")[:2] for path in (tmp_path / "kernels").glob("*/*.cubin"))
    archs = [f"sm_{arch}" for arch in sorted(ARCHES)]
    assert made == [["codec", a] for a in archs] + [["frame", a] for a in archs for _ in range(2)]
    assert not list((tmp_path / "kernels").glob("*/*.log"))
    assert main(["build", "--all", "--arch", "90a"]) == 1
    assert "leave out --arch" in capsys.readouterr().err


def test_build_command_fails_when_a_compiler_does(compiler, capsys):
    compiler("echo 'kernel_tts.cu(1): error: bad'; exit 2")
    assert main(["build", "--model", "tiny", "--arch", "90a"]) == 1
    captured = capsys.readouterr()
    assert (
        "failed: the kernel does not compile: kernel_tts.cu: kernel_tts.cu(1): error: bad"
        in captured.out
    )
    assert "2 of 2 could not be built" in captured.err
