"""The host's structures lie in memory as the kernels' do, field by field, as the GPU's compiler says."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen_megakernel.build_tts import SOURCES, codec_library, frame_library
from qwen_megakernel.codec import cuda_params
from qwen_megakernel.decoding.frame_launcher import STREAM, frame_params
from qwen_megakernel.installation import nvrtc
from qwen_megakernel.installation.cubin import read_cubin
from qwen_megakernel.synth.config import shape_config

if nvrtc.find_compiler() is None:
    pytestmark = pytest.mark.skip(reason="no CUDA compiler")

MAX_COLUMNS = 32
CODEC = (
    "Rows",
    "Gemm",
    "SegmentedGemm",
    "UnitLaunch",
    "Embed",
    "Attention",
    "DepthwiseNorm",
    "LastConv",
)


def fields_of(structure: type[ctypes.Structure]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every field, those of its base included."""
    for base in reversed(structure.__mro__):
        for name, _ in base.__dict__.get("_fields_", ()):
            field = getattr(structure, name)
            yield name, field.offset, field.size


def compiled_facts(folder: Path, header: str, includes: str, wanted: dict[str, str]) -> dict[str, int]:
    """Values of C++ expressions by name."""
    (folder / "geometry.h").write_text(header)
    lines = [f"QWEN_TTS_FACT({name}, {value});" for name, value in wanted.items()]
    source, product, log = folder / "facts.cu", folder / "facts.cubin", folder / "facts.log"
    source.write_text("\n".join([includes, '#include "facts.cuh"', *lines]))
    options = ["--gpu-architecture=sm_80", "-std=c++17", f"-I{folder}", f"-I{SOURCES}"]
    process = nvrtc.start(nvrtc.find_compiler(), source, product, options, log)
    assert process.wait(240) == 0, log.read_text()
    return read_cubin(product).facts


def layout(name: str, fields: list[tuple[str, int, int]], size: int) -> tuple[dict, dict]:
    """Expressions and values, by name, for the place and size of every field of a structure."""
    at, whole = f"{name}_".replace("::", "_"), f"(({name}*)0)"
    wanted, here = {f"{at}bytes": f"sizeof({name})"}, {f"{at}bytes": size}
    for field, offset, num_bytes in fields:
        wanted[f"{at}{field}_at"] = f"offsetof({name}, {field})"
        wanted[f"{at}{field}_size"] = f"sizeof({whole}->{field})"
        here[f"{at}{field}_at"], here[f"{at}{field}_size"] = offset, num_bytes
    return wanted, here


def test_the_frame_s_parameters(tmp_path):
    params = frame_params(MAX_COLUMNS)
    stream = [(name, at, part.itemsize) for name, (part, at) in STREAM.fields.items()]
    wanted, here = layout("qwen_tts::FrameParams", list(fields_of(params)), ctypes.sizeof(params))
    for mine, found in zip(
        (wanted, here), layout("qwen_tts::Stream", stream, STREAM.itemsize), strict=True
    ):
        mine.update(found)
    header = frame_library(shape_config("tiny"), "80").header
    assert compiled_facts(tmp_path, header, '#include "params.h"', wanted) == here
    assert len(here) > 2 * 40


def test_the_codec_s_parameters(tmp_path):
    wanted, here = {}, {}
    for name in CODEC:
        structure = getattr(cuda_params, name)
        found = layout(f"codec::{name}", list(fields_of(structure)), ctypes.sizeof(structure))
        wanted, here = wanted | found[0], here | found[1]
    includes = '#include "codec_unit.cuh"'
    assert compiled_facts(tmp_path, codec_library("80").header, includes, wanted) == here


def test_streams_lie_in_the_parameters_as_one_array():
    params = frame_params(MAX_COLUMNS)()
    at = type(params).streams.offset
    columns = np.frombuffer(params, np.uint8)[at : at + MAX_COLUMNS * STREAM.itemsize].view(STREAM)
    columns[3]["talker_top_k"] = 77
    columns[31]["predictor_top_k"] = 99
    words = STREAM.itemsize // 4
    assert params.streams[3 * words + words - 2] == 77
    assert params.streams[MAX_COLUMNS * words - 1] == 99
