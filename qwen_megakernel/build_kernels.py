"""`python -m qwen_megakernel build`: compile the kernels ahead of time, also where there is no GPU."""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qwen_megakernel.build_tts import (
    KNOWN_ARCHES,
    MIN_ARCH,
    BuildError,
    Library,
    build,
    cache_folder,
    detect_arch,
    frame_library,
)
from qwen_megakernel.checkpoint import CheckpointError, resolve
from qwen_megakernel.codec_cuda import LIBRARY as CODEC_LIBRARY
from qwen_megakernel.config import ConfigError, ModelConfig
from qwen_megakernel.machine_code import resources
from qwen_megakernel.synth_config import SHAPES, shape_config


def find_config(model: str) -> ModelConfig:
    """The configuration of a shape's name, a folder, or a Hugging Face id that is in the cache.

    Raises:
        CheckpointError, ConfigError: there is none.
    """
    if model in SHAPES and not Path(model).exists():
        return shape_config(model)
    return ModelConfig.from_folder(resolve(model, offline=True))


def find_arches(named: list[str] | None) -> list[str]:
    """The architectures to build for; the GPU's own where none is named. Raises `BuildError`."""
    if named:
        return list(dict.fromkeys(named))
    if not torch.cuda.is_available():
        raise BuildError(f"torch finds no CUDA GPU: name one, --arch {' '.join(KNOWN_ARCHES)}")
    return [detect_arch(torch.device("cuda"))]


def build_all(config: ModelConfig, arches: list[str]) -> int:
    """Build both libraries for each architecture, side by side, telling of each; how many failed."""
    jobs = [
        (library, arch) for arch in arches for library in (frame_library(config, arch), CODEC_LIBRARY)
    ]
    with ThreadPoolExecutor(len(jobs)) as threads:
        return sum(threads.map(lambda job: not _build(*job), jobs))


def _build(library: Library, arch: str) -> bool:
    started, name, done = time.monotonic(), f"{library.name} sm_{arch}", threading.Event()

    def tell(line: str) -> None:
        print(f"{name:14}{time.monotonic() - started:5.1f} s  {line}", flush=True)

    def tick() -> None:
        while not done.wait(10):
            tell("...")

    threading.Thread(target=tick, daemon=True).start()
    try:
        product = build(library, arch, tell)
    except (BuildError, OSError) as error:
        tell(f"failed: {error}")
        return False
    finally:
        done.set()
    used = resources(product)
    most, spilled = max(r.registers for r in used), sum(r.spill_bytes for r in used)
    tell(f"{product} ({len(used)} kernels, at most {most} registers, {spilled} bytes of spills)")
    return True


def _arch(text: str) -> str:
    match = re.fullmatch(r"(?:sm_)?(\d{2,3})a?", text)
    if match is None or int(match[1]) < MIN_ARCH:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected sm_{MIN_ARCH}a or newer, such as " + " or ".join(KNOWN_ARCHES)
        )
    return f"{match[1]}a"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m qwen_megakernel build`."""
    parser.add_argument(
        "--arch", nargs="+", type=_arch, metavar="ARCH",
        help="GPU architectures, such as sm_90a sm_120a (default: this machine's GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--model", default="0.6b", metavar="NAME",
        help=f"{', '.join(SHAPES)}, a checkpoint on disk, or a Hugging Face id in the cache "
        "(default: 0.6b)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Build; 1 if something failed."""
    try:
        config, arches = find_config(args.model), find_arches(args.arch)
        print(f"kernels of {args.model} go to {cache_folder()}", flush=True)
        failed = build_all(config, arches)
    except (BuildError, CheckpointError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if failed:
        print(f"error: {failed} of {2 * len(arches)} could not be built", file=sys.stderr)
    return 1 if failed else 0
