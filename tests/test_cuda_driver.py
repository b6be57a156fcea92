"""What reaches the driver: the shapes, attributes and parameters of launches; and its errors, told."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from codec_weights import TINY, lively_decoder

from qwen_megakernel import cuda_driver
from qwen_megakernel.build_tts import build, codec_library
from qwen_megakernel.codec import cuda_launcher
from qwen_megakernel.codec.cuda_ops import EmbedOp, GemmOp, LastConvOp
from qwen_megakernel.codec.cuda_plan import CodecPlan
from qwen_megakernel.cuda_driver import DriverError, Launch, Module
from qwen_megakernel.decoding import frame_launcher
from qwen_megakernel.decoding.frame_launcher import STREAM, FrameDumps, FrameKernelFile, FrameLauncher
from qwen_megakernel.installation import nvrtc
from qwen_megakernel.installation.cubin import Cubin, read_cubin

SOURCE = Path(__file__).with_name("recording_driver.c")
GCC = shutil.which("gcc")
COMPILER = nvrtc.find_compiler()

pytestmark = pytest.mark.skipif(
    GCC is None or COMPILER is None or not (COMPILER.headers / "cuda.h").is_file(),
    reason="no C compiler, or no header of the driver",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [GCC, "-shared", "-fPIC", "-Wall", "-Werror", f"-I{COMPILER.headers}", SOURCE, "-o", path]
    subprocess.run(command, check=True, timeout=240)
    return path


@pytest.fixture
def record(library, monkeypatch) -> ctypes.CDLL:
    """The driver's record; everything is launched on it."""
    recorded = ctypes.CDLL(str(library))
    for name in ("launch_stream", "function", "current", "filled", "filled_bytes", "fill_stream"):
        getattr(recorded, name).restype = ctypes.c_size_t
    recorded.params.restype = ctypes.POINTER(ctypes.c_ubyte)
    driver = cuda_driver._Driver(str(library))
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    recorded.refuse_cubins(0)
    return recorded


def say_param_bytes(record: ctypes.CDLL, *sizes: int) -> None:
    told = (ctypes.c_size_t * 4).in_dll(record, "param_bytes")
    told[:] = [*sizes, *[0] * (4 - len(sizes))]


def recorded_params(record: ctypes.CDLL, structure: type[ctypes.Structure]) -> ctypes.Structure:
    return structure.from_buffer_copy(bytes(record.params()[: ctypes.sizeof(structure)]))


@pytest.fixture
def product(tmp_path) -> Path:
    path = tmp_path / "frame.cubin"
    path.write_bytes(b"\x7fELF")
    return path


def make_module(product: Path, facts: dict[str, int] | None = None, device: int = 0) -> Module:
    values = {f"fact_{name}": value.to_bytes(8, "little") for name, value in (facts or {}).items()}
    return Module(product, Cubin({}, (), values), device)


def test_a_launch_has_the_shape_that_was_prepared(record, product):
    module = make_module(product, device=1)
    params = [ctypes.c_uint64(2**40 + 1), ctypes.c_int64(-5), ctypes.c_uint64(7)]
    say_param_bytes(record, 8, 8, 8)
    kernel = module.kernel("k", 1000)
    launch = Launch(module, kernel, params, grid=(12, 3), threads=256, shared_bytes=1000, early=True)
    launch(0x1234)
    assert (record.grid_x(), record.grid_y(), record.grid_z()) == (12, 3, 1)
    assert (record.block_x(), record.block_yz(), record.shared_bytes()) == (256, 1, 1000)
    assert (record.launch_stream(), record.function(), record.current()) == (0x1234, 300 + ord("k"), 101)
    assert (record.num_attributes(), record.is_early(), record.is_cooperative()) == (1, 1, 0)
    assert np.frombuffer(bytes(record.params()[:24]), np.int64).tolist() == [2**40 + 1, -5, 7]
    params[1].value = 6
    launch(0)  # the default stream
    assert record.launch_stream() == 0
    assert np.frombuffer(bytes(record.params()[:24]), np.int64).tolist() == [2**40 + 1, 6, 7]


def test_attributes_are_those_of_the_driver_s_header(record, product):
    module = make_module(product)
    say_param_bytes(record)
    kernel = module.kernel("k")
    Launch(module, kernel, [], grid=(8, 1), threads=32, cluster=8, early=True)(0)
    assert (record.num_attributes(), record.cluster(), record.is_early()) == (2, 8, 1)
    Launch(module, kernel, [], grid=(8, 1), threads=32, cooperative=True)(0)
    assert (record.num_attributes(), record.cluster(), record.is_cooperative()) == (1, 0, 1)
    Launch(module, kernel, [], grid=(8, 1), threads=32)(0)
    assert record.num_attributes() == 0


def test_a_kernel_s_shared_memory_grows_and_never_shrinks(record, product):
    module = make_module(product)
    for wanted, granted in ((50_000, 50_000), (9, 50_000), (60_000, 60_000)):
        module.kernel("k", wanted)
        assert record.dynamic_bytes() == granted
    before = record.calls()
    module.limit_shared_memory("k", 200_000)
    assert record.calls() == before, "the GPU has no more than that"
    module.limit_shared_memory("k", 102_400)
    assert record.carveout() == 51


def test_errors_name_the_call(record, product):
    module = make_module(product)
    with pytest.raises(DriverError, match="cuModuleGetFunction: CUDA error 500"):
        module.kernel("missing")
    launch = Launch(module, module.kernel("k"), [], grid=(1, 1), threads=32)
    ctypes.c_int.in_dll(record, "next_error").value = 1
    said = r"the kernel cannot be launched: CUDA_ERROR_INVALID_VALUE \(invalid argument\)"
    with pytest.raises(DriverError, match=said):
        launch(0)
    launch(0)


def test_ptx_is_taken_where_the_cubin_is_of_another_gpu(record, product):
    record.refuse_cubins(1)
    with pytest.raises(DriverError, match=r"frame.cubin: cuModuleLoadData: CUDA error 209"):
        make_module(product)
    product.with_suffix(".ptx").write_text(".version 9.0")
    make_module(product)


def test_a_missing_driver_is_named():
    with pytest.raises(DriverError, match=r"the NVIDIA driver's library cannot be loaded: nowhere.so"):
        cuda_driver._Driver("nowhere.so")


# ---------------------------------------------------------------------------- the frame kernel

FACTS = {
    "max_columns": 32, "narrow_columns": 8, "stream_bytes": STREAM.itemsize, "threads": 640,
    "params_bytes": ctypes.sizeof(frame_launcher.frame_params(32)), "max_grid": 192,
    "frame_kernel_narrow_shared_bytes": 98_400, "frame_kernel_wide_shared_bytes": 99_664,
    "split_positions": 256, "max_splits": 32, "max_items": 33, "num_codebooks": 16,
    "talker_hidden": 64, "talker_layers": 2, "talker_kv_heads": 2, "talker_head_dim": 64,
    "talker_vocab": 96, "talker_layer_bytes": 4096, "talker_head_bytes": 2048,
    "predictor_hidden": 32, "predictor_layers": 1, "predictor_kv_heads": 2, "predictor_head_dim": 64,
    "predictor_vocab": 64, "predictor_layer_bytes": 1024, "predictor_head_bytes": 512,
    "predictor_qkv_rows": 256, "num_packets": 4096, "dense_from": 1024, "dense_words": 512,
    "cleared_byte": 255, "noise_floats": 384, "dump_rows": 256, "num_tags": 9,
}  # fmt: skip
PAGES, SLOTS, POSITIONS = 3, 5, 300


@pytest.fixture
def launcher(record, product, monkeypatch) -> FrameLauncher:
    """On tensors of the CPU, whose place alone is not checked."""

    def address(name, tensor, dtype, count, device):
        assert (tensor.dtype, tensor.numel(), tensor.is_contiguous()) == (dtype, count, True), name
        return tensor.data_ptr()

    module = make_module(product, FACTS)
    monkeypatch.setattr(frame_launcher, "load_module", lambda library, device: module)
    file = FrameKernelFile(product, torch.device("cuda"))
    expected = file.expected_tensors(SLOTS, POSITIONS, PAGES)
    tensors = {name: torch.zeros(count, dtype=dtype) for name, (dtype, count) in expected.items()}
    monkeypatch.setattr(frame_launcher, "check_tensor", address)
    return FrameLauncher(
        file, tensors, num_slots=SLOTS, max_positions=POSITIONS, grid=100, max_spins=2**31 + 5,
        predictor_kept_bytes=2**33,
    )  # fmt: skip


def frame(launcher: FrameLauncher, n: int, **changes: object) -> np.ndarray:
    columns = np.zeros(n, STREAM)
    columns["slot"], columns["seed"] = np.arange(n), [2**32 - 1, 3]
    options = {"prefill": False, "epoch": 2**32 - 9, "noise": None, "forced_codes": None, "dumps": None}
    launcher.launch(columns, torch.zeros(n, 64), cuda_stream=77, **(options | changes))
    return columns


@pytest.mark.parametrize(("n", "kernel", "shared"), [(8, "w", 98_400), (9, "e", 99_664)])
def test_a_frame_s_launch(launcher, record, n, kernel, shared):
    """`narrow` ends with w, `wide` with e."""
    structure = frame_launcher.frame_params(32)
    say_param_bytes(record, ctypes.sizeof(structure))
    columns = frame(launcher, n)
    params = recorded_params(record, structure)
    assert (record.function(), record.shared_bytes()) == (300 + ord(kernel), shared)
    assert (record.grid_x(), record.grid_y(), record.block_x()) == (100, 1, 640)
    assert (record.is_cooperative(), record.launch_stream()) == (1, 77)
    assert (params.num_columns, params.prefill, params.epoch) == (n, 0, 2**32 - 9)
    assert bytes(params.streams)[: columns.nbytes] == columns.tobytes()
    assert (params.num_slots, params.num_pages, params.max_positions) == (SLOTS, PAGES, POSITIONS)
    assert (params.max_spins, params.withheld_cta) == (2**31 + 5, -1)
    assert params.predictor_kept_bytes == 2**33
    for name, tensor in launcher._tensors.items():
        assert getattr(params, name) == tensor.data_ptr(), name
    assert (params.noise, params.forced_codes, params.stamps) == (None, None, None)
    if n > 8:
        assert record.filled() == params.packets + 8 * 1024
        assert (record.filled_bytes(), record.filled_with(), record.fill_stream()) == (8 * 512, 255, 77)


def test_what_a_test_gives_lasts_for_its_launch(launcher, record):
    structure = frame_launcher.frame_params(32)
    say_param_bytes(record, ctypes.sizeof(structure))
    stamps, codes = torch.zeros(9, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int32)
    frame(launcher, 2, dumps=FrameDumps(stamps=stamps), forced_codes=codes, prefill=True)
    params = recorded_params(record, structure)
    assert (params.stamps, params.forced_codes) == (stamps.data_ptr(), codes.data_ptr())
    assert (params.noise, params.dump_logits, params.prefill) == (None, None, 1)
    launcher.withhold(3)
    frame(launcher, 2)
    params = recorded_params(record, structure)
    assert (params.stamps, params.forced_codes, params.withheld_cta) == (None, None, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grid": 7}, "grid is 7, allowed: 8 to 192"),
        ({"grid": 8, "max_positions": 8192}, "max_positions is 8192, allowed on 8 CTAs: 1 to 4096"),
        ({"num_slots": 0}, "num_slots is 0, allowed: at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(launcher, product, changes, said):
    file = FrameKernelFile(product, torch.device("cuda"))
    numbers = {"num_slots": SLOTS, "max_positions": POSITIONS, "grid": 100} | changes
    with pytest.raises(ValueError, match=said):
        FrameLauncher(file, launcher._tensors, max_spins=1, predictor_kept_bytes=0, **numbers)
    with pytest.raises(ValueError, match="a frame of 33 columns, allowed: 1 to 32"):
        frame(launcher, 33)
    with pytest.raises(ValueError, match="a prefill of 9 columns, allowed: 1 to 8"):
        frame(launcher, 9, prefill=True)


def test_a_tensor_that_the_kernel_does_not_take_is_named():
    check = frame_launcher.check_tensor
    rows = torch.zeros(4, 8)
    assert check("rows", rows, torch.float32, 32, "cpu") == rows.data_ptr()
    for changes, said in (
        ({"dtype": torch.int32}, "rows is torch.float32, expected torch.int32"),
        ({"count": 33}, r"rows has 32 elements, expected 33; its shape is \[4, 8\]"),
        ({"device": "cuda"}, "rows is on cpu, expected cuda"),
        ({"tensor": rows.T}, "rows is not contiguous"),
    ):
        given = {"tensor": rows, "dtype": torch.float32, "count": 32, "device": "cpu"} | changes
        with pytest.raises(ValueError, match=said):
            check("rows", **given)


def test_a_kernel_of_other_sources_is_refused(record, product, monkeypatch):
    module = make_module(product, FACTS | {"params_bytes": 8})
    monkeypatch.setattr(frame_launcher, "load_module", lambda library, device: module)
    with pytest.raises(ValueError, match="from other sources than this package's: params have 8 bytes"):
        FrameKernelFile(product, torch.device("cuda"))


# ---------------------------------------------------------------------------- the codec's kernels


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "120a"])
def test_the_codec_s_launches(arch, record, monkeypatch, shared_builds):
    """Every launch of a plan, by the facts of a real build."""
    module = Module(built := build(codec_library(arch), arch), read_cubin(built), 0)
    monkeypatch.setattr(cuda_launcher, "load_module", lambda library, device: module)
    gpu = SimpleNamespace(multi_processor_count=170)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    plan, hopper = CodecPlan(lively_decoder(TINY), 3, max_streams=4), arch == "120a"
    launcher = cuda_launcher.Launcher(plan, built)
    assert record.carveout() == 100 * module.facts["sm_shared_bytes"] // 200_000
    for op in plan.ops:
        say_param_bytes(record, 8)  # the first field of all is a pointer
        launcher.launch(op, 3)
        assert record.launch_stream() == 5
        assert (record.is_early(), record.is_cooperative()) == (hopper, 0)
        assert record.shared_bytes() <= max(module._granted.values(), default=0)
        assert record.shared_bytes() <= module.facts["sm_shared_bytes"] - 1024
        if isinstance(op, EmbedOp):
            assert (record.grid_x(), record.grid_y(), record.block_x()) == (3, 1, 128)
        elif isinstance(op, LastConvOp):
            assert (record.grid_x(), record.grid_y()) == (-(-op.source.rows // 64), 3)
        elif isinstance(op, GemmOp) and not op.middle:
            segments, columns = op.segments, 3 * op.source.rows
            assert record.grid_x() == segments * -(-op.m // 64)
            assert record.grid_y() * 128 >= columns
            assert record.cluster() == (segments if hopper and segments > 1 else 0)
            first = np.frombuffer(bytes(record.params()[:8]), np.int64)[0]
            assert first == op.weights.data_ptr()
