"""Launches of the frame kernel: its parameters on the host, checked against what was built.

The structures mirror csrc/params.h; tests/test_param_layout.py compares them field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_int, c_int64, c_uint, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_megakernel.cuda_driver import Launch, load_module
from qwen_megakernel.decoding.frame_schedule import Exchange, listed_exchanges

STREAM = np.dtype(
    [
        ("slot", "<i4"), ("position", "<i4"), ("first", "<i4"), ("frame", "<i4"),
        ("suppress_eos", "<i4"),
        ("seed", "<u4", 2), ("talker_temperature", "<f4"), ("talker_tail_mass", "<f4"),
        ("talker_penalty", "<f4"), ("predictor_temperature", "<f4"), ("predictor_tail_mass", "<f4"),
        ("talker_top_k", "<i4"), ("predictor_top_k", "<i4"),
    ]
)  # fmt: skip
"""`Stream` of csrc/params.h."""

_WEIGHTS = (
    "talker_layers", "talker_head", "predictor_layers", "predictor_heads",
)  # fmt: skip
_TABLES = (
    "talker_norm", "talker_qk_norms", "predictor_qk_norms", "talker_rope", "predictor_rope",
    "codec_embedding", "predictor_embeddings", "predictor_first_qkv", "projected_embeddings",
    "projection_bias", "k_cache", "v_cache", "page_table",
)  # fmt: skip
_OF_A_FRAME = (
    "predictor_kv", "text_rows", "next_rows", "seen", "noise", "codes", "dump_logits",
    "dump_exchanges", "stamps", "forced_codes", "noise_scratch", "packets", "watchdog",
)  # fmt: skip


@cache
def frame_params(max_columns: int) -> type[ctypes.Structure]:
    """`FrameParams` of csrc/params.h, for frames of so many streams at most."""

    def pointers(names: tuple[str, ...]) -> list[tuple[str, type]]:
        return [(name, c_void_p) for name in names]

    words = STREAM.itemsize // 4
    fields = [
        ("num_columns", c_int), ("prefill", c_int), ("epoch", c_uint32),
        *pointers(_WEIGHTS), ("predictor_kept_bytes", c_int64), *pointers(_TABLES),
        ("num_slots", c_int), ("num_pages", c_int), ("max_positions", c_int),
        *pointers(_OF_A_FRAME), ("max_spins", c_uint), ("withheld_cta", c_int),
        ("streams", c_uint32 * (max_columns * words)),
    ]  # fmt: skip
    return type("FrameParams", (ctypes.Structure,), {"_fields_": fields})


@dataclass(slots=True)
class FrameDumps:
    """Tensors on the device that a launch fills, for tests."""

    logits: Tensor | None = None
    """fp32 [n, 16, talker vocabulary]."""
    exchanges: Tensor | None = None
    """fp32 [exchanges, rows, max_batch], all published values; see `MegakernelBackend.exchange_dump`."""
    stamps: Tensor | None = None
    """int64 [`num_exchanges`]: the time in ns at which CTA 0 finished its part of each exchange."""


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, count: int, device: str) -> int:
    """A tensor's address, if it is what the kernel reads or writes. Raises `ValueError`."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.device.type != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if tensor.numel() != count:
        shape = list(tensor.shape)
        raise ValueError(f"{name} has {tensor.numel()} elements, expected {count}; its shape is {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
    return tensor.data_ptr()


class FrameKernelFile:
    """A built frame kernel, loaded on a GPU: its sizes, and the names of what it does."""

    def __init__(self, library: Path, device: torch.device) -> None:
        """Load it.

        Args:
            library: from `build_tts.build`.
            device: the GPU.

        Raises:
            ValueError: it was built from other sources than this package's.
            DriverError: the driver refuses it.
        """
        self.module = load_module(library, device)
        self.facts = self.module.facts
        mirrored = ctypes.sizeof(frame_params(self.facts.get("max_columns", 1)))
        for name, size in (("stream", STREAM.itemsize), ("params", mirrored)):
            if self.facts.get(f"{name}_bytes") != size:
                raise ValueError(
                    f"{library} was built from other sources than this package's: "
                    f"{name} have {self.facts.get(f'{name}_bytes')} bytes there, {size} here"
                )

    @property
    def phases(self) -> list[str]:
        """What a wait can be for, by the watchdog's number."""
        return self.module.cubin.text("phase_names").splitlines()

    def exchanges(self, num_streams: int) -> list[Exchange]:
        """The exchanges of a frame of so many streams, in the order of their tags."""
        return listed_exchanges(self.module.cubin, num_streams)

    def max_positions(self, grid: int) -> int:
        """Of a slot, that so many CTAs can attend to."""
        f = self.facts
        items = grid * (f["max_items"] - 1) // (f["narrow_columns"] * f["talker_kv_heads"])
        return f["split_positions"] * min(f["max_splits"], items)

    def expected_tensors(self, num_slots: int, max_positions: int, pages: int) -> dict[str, tuple]:
        """(dtype, elements) of every tensor that lasts, by its name."""
        f = self.facts
        bf16, fp32, int32 = torch.bfloat16, torch.float32, torch.int32
        fed, books = f["num_codebooks"] - 1, f["num_codebooks"]
        hidden, predictor_hidden = f["talker_hidden"], f["predictor_hidden"]
        projects = hidden != predictor_hidden
        page = f["talker_layers"] * f["talker_kv_heads"] * f["split_positions"] * f["talker_head_dim"]
        heads = 2 * f["predictor_kv_heads"] * f["predictor_head_dim"]
        columns, vocab = f["max_columns"], f["predictor_vocab"]
        return {
            "talker_layers": (bf16, f["talker_layers"] * f["talker_layer_bytes"] // 2),
            "talker_head": (bf16, f["talker_head_bytes"] // 2),
            "predictor_layers": (bf16, f["predictor_layers"] * f["predictor_layer_bytes"] // 2),
            "predictor_heads": (bf16, fed * f["predictor_head_bytes"] // 2),
            "talker_norm": (bf16, hidden),
            "talker_qk_norms": (bf16, f["talker_layers"] * 2 * f["talker_head_dim"]),
            "predictor_qk_norms": (bf16, f["predictor_layers"] * 2 * f["predictor_head_dim"]),
            "talker_rope": (fp32, max_positions * f["talker_head_dim"]),
            "predictor_rope": (fp32, books * f["predictor_head_dim"]),
            "codec_embedding": (bf16, f["talker_vocab"] * hidden),
            "predictor_embeddings": (bf16, fed * vocab * hidden),
            "predictor_first_qkv": (bf16, (fed - 1) * vocab * f["predictor_qkv_rows"]),
            "projected_embeddings": (bf16, fed * vocab * predictor_hidden if projects else 0),
            "projection_bias": (bf16, predictor_hidden if projects else 0),
            "k_cache": (bf16, pages * page),
            "v_cache": (bf16, pages * page),
            "page_table": (int32, num_slots * ceil(max_positions / f["split_positions"])),
            "predictor_kv": (bf16, f["predictor_layers"] * columns * heads * books),
            "next_rows": (fp32, num_slots * hidden),
            "seen": (int32, num_slots * (f["talker_vocab"] // 32)),
            "codes": (int32, columns * books),
            "noise_scratch": (fp32, columns * f["noise_floats"]),
            "packets": (torch.int64, f["num_packets"]),
            "watchdog": (int32, 4),
        }

    def num_pages(self, cache: Tensor) -> int:
        """Pages of `cache`, which holds the keys of all. Raises `ValueError`."""
        f = self.facts
        heads = f["talker_layers"] * f["talker_kv_heads"]
        pages = cache.numel() // (heads * f["split_positions"] * f["talker_head_dim"])
        if not 1 <= pages * heads < 2**31:
            raise ValueError(f"the cache has {pages} pages, allowed: 1 to {(2**31 - 1) // heads}")
        return pages


class FrameLauncher:
    """A frame kernel with the tensors that it works on."""

    def __init__(
        self,
        file: FrameKernelFile,
        tensors: Mapping[str, Tensor],
        *,
        num_slots: int,
        max_positions: int,
        grid: int,
        max_spins: int,
        predictor_kept_bytes: int,
    ) -> None:
        """Check the tensors, and prepare a launch of each kernel.

        Args:
            file: the kernel.
            tensors: one for every pointer of `FrameParams` that lasts, under the field's name; kept.
            num_slots, max_positions: what the tensors were made for.
            grid: CTAs of a launch.
            max_spins: polls after which a wait is given up.
            predictor_kept_bytes: of each of the predictor's layers that shall stay in L2.

        Raises:
            ValueError: a number out of range, or a tensor that is not as the kernel needs it.
            DriverError: the kernel cannot run here.
        """
        facts = self._facts = file.facts
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}, allowed: at least 1")
        if not facts["narrow_columns"] <= grid <= facts["max_grid"]:
            allowed = f"{facts['narrow_columns']} to {facts['max_grid']}"
            raise ValueError(f"grid is {grid}, allowed: {allowed}")
        most = file.max_positions(grid)
        if not 1 <= max_positions <= most:
            raise ValueError(f"max_positions is {max_positions}, allowed on {grid} CTAs: 1 to {most}")
        self._module, self._tensors = file.module, dict(tensors)
        if missing := {"k_cache"} - tensors.keys():
            raise ValueError(f"tensor {missing.pop()} is missing")
        self._params = frame_params(facts["max_columns"])()
        words = np.frombuffer(memoryview(self._params), dtype=np.uint8)
        at = type(self._params).streams.offset
        self._columns = words[at : at + facts["max_columns"] * STREAM.itemsize].view(STREAM)
        """`FrameParams::streams` as an array: [max_columns]."""
        pages = file.num_pages(tensors["k_cache"])
        self._set(
            num_slots=num_slots, max_positions=max_positions, num_pages=pages, max_spins=max_spins,
            withheld_cta=-1, predictor_kept_bytes=predictor_kept_bytes,
            **self._addresses(file.expected_tensors(num_slots, max_positions, pages)),
        )  # fmt: skip
        self._narrow, self._wide = (self._prepare(name, grid) for name in ("narrow", "wide"))

    def _set(self, **fields: int) -> None:
        for name, value in fields.items():
            setattr(self._params, name, value)

    def _addresses(self, expected: dict[str, tuple]) -> dict[str, int]:
        device = self._tensors["k_cache"].device
        found = {}
        for name, (dtype, count) in expected.items():
            if name not in self._tensors:
                raise ValueError(f"tensor {name} is missing")
            tensor = self._tensors[name]
            on = "cpu" if name == "watchdog" else "cuda"
            found[name] = check_tensor(name, tensor, dtype, count, on)
            if on == "cuda" and tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, k_cache on {device}")
        return found

    def _prepare(self, name: str, grid: int) -> Launch:
        threads = self._facts["threads"]
        shared_bytes = self._facts[f"frame_kernel_{name}_shared_bytes"]
        kernel = self._module.kernel(f"frame_kernel_{name}", shared_bytes)
        if self._module.ctas_an_sm(kernel, threads, shared_bytes) < 1:
            raise ValueError("an SM cannot hold one CTA of the kernel")
        return Launch(
            self._module, kernel, [self._params], grid=(grid, 1), threads=threads,
            shared_bytes=shared_bytes, cooperative=True,
        )  # fmt: skip

    def launch(
        self,
        columns: np.ndarray,
        text_rows: Tensor,
        *,
        prefill: bool,
        epoch: int,
        noise: Tensor | None,
        forced_codes: Tensor | None,
        dumps: FrameDumps | None,
        cuda_stream: int,
    ) -> None:
        """Put a frame, or a prefill, on a stream.

        Args:
            columns: `STREAM` [n].
            text_rows: fp32 [n, hidden] on the GPU.
            prefill: whether the columns are rows of one stream, for their keys and values alone.
            epoch: tag of the launch's first exchange.
            noise: fp32 [n, 16, talker vocabulary] instead of the draws.
            forced_codes: int32 [n, 16] to go on with.
            dumps: filled.
            cuda_stream: handle of the stream.

        Raises:
            ValueError: too many columns, or a tensor that is not as the kernel needs it.
            DriverError: the launch fails.
        """
        f, n = self._facts, len(columns)
        most = f["narrow_columns"] if prefill else f["max_columns"]
        if not 1 <= n <= most:
            raise ValueError(
                f"a {'prefill' if prefill else 'frame'} of {n} columns, allowed: 1 to {most}"
            )
        params = self._params
        self._columns[:n] = columns
        params.num_columns, params.prefill, params.epoch = n, prefill, epoch
        params.text_rows = check_tensor(
            "text_rows", text_rows, torch.float32, n * f["talker_hidden"], "cuda"
        )
        if noise is None and forced_codes is None and dumps is None:
            params.noise = params.forced_codes = None
            params.dump_logits = params.dump_exchanges = params.stamps = None
        else:
            self._set_tests(n, noise, forced_codes, dumps or FrameDumps())
        if n <= f["narrow_columns"]:
            self._narrow(cuda_stream)
            return
        self._module.fill(
            params.packets + 8 * f["dense_from"], f["cleared_byte"], 8 * f["dense_words"], cuda_stream
        )
        self._wide(cuda_stream)

    def _set_tests(
        self, n: int, noise: Tensor | None, forced_codes: Tensor | None, dumps: FrameDumps
    ) -> None:
        f = self._facts
        logits = n * f["num_codebooks"] * f["talker_vocab"]
        exchanges = f["num_tags"] * f["dump_rows"] * f["max_columns"]
        for name, tensor, dtype, count in (
            ("noise", noise, torch.float32, logits),
            ("forced_codes", forced_codes, torch.int32, n * f["num_codebooks"]),
            ("dump_logits", dumps.logits, torch.float32, logits),
            ("dump_exchanges", dumps.exchanges, torch.float32, exchanges),
            ("stamps", dumps.stamps, torch.int64, f["num_tags"]),
        ):
            given = tensor is not None
            address = check_tensor(name, tensor, dtype, count, "cuda") if given else None
            setattr(self._params, name, address)

    def withhold(self, cta: int) -> None:
        """Have a CTA take no part, as a test of the watchdog."""
        self._params.withheld_cta = cta
