"""The decoder backend that runs one persistent CUDA kernel a frame (csrc/kernel_tts.cu).

Between frames the device holds a stream's state in its slot: keys and values, the codes that the
stream has produced, and the sum of its last frame's embeddings. The host keeps each stream's position,
frame count and sampling parameters, and passes them with every launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen_megakernel.config import NUM_CODEBOOKS, GenerationParams, PredictorConfig, TalkerConfig
from qwen_megakernel.decoding.frame_launcher import STREAM, FrameDumps, FrameKernelFile, FrameLauncher
from qwen_megakernel.decoding.frame_schedule import Exchange
from qwen_megakernel.decoding.interface import (
    LaunchedFrame,
    check_decode,
    check_max_positions,
    check_prefill,
)
from qwen_megakernel.decoding.kv_cache import KvCache, swizzled
from qwen_megakernel.decoding.prefill_graph import ROWS, TalkerPrefill
from qwen_megakernel.decoding.prefix_cache import PrefixCache
from qwen_megakernel.decoding.weight_packing import (
    known_qkv,
    pack_layers,
    pack_product,
    pack_qk_norms,
    pack_rope,
    with_norm,
)
from qwen_megakernel.installation.kernel_tuning import DEFAULT_L2_SHARE, Setting
from qwen_megakernel.model.copy_events import CopyEvents
from qwen_megakernel.model.sampling import split_seed
from qwen_megakernel.model.talker import Talker, mrope_tables, rope_tables
from qwen_megakernel.prompt.shared_rows import SharedRows

MAX_POSITIONS = 8192
"""Positions that the kernel's attention can split (kMaxSplits in csrc/params.h)."""
_LONG_PROMPT = 49
"""A prompt of at least this many rows goes through PyTorch, which takes 2.9 ms for up to 128 rows. The
kernel takes 0.46 ms for every eight rows (H200, 0.6B shape; docs/experiments.md)."""
_NOT_A_NUMBER = 2
"""The watchdog's state after a value that an exchange cannot carry (csrc/dense_words.cuh)."""
_FIRST_EPOCH = 2
"""Cleared packets have the tag 0, and a wide frame's first rows the tag before its epoch."""
_MAX_SPINS = 4_000_000
"""Polls, about half a microsecond each, after which a wait inside the kernel is an error."""


class KernelError(RuntimeError):
    """A frame that the GPU did not finish. The CUDA context is lost: restart the process."""


@dataclass(slots=True)
class _Stream:
    """A live slot's state on the host."""

    params: GenerationParams
    position: int
    frame: int


class MegakernelBackend:
    """`DecoderBackend` on one CUDA GPU; weights and caches in bf16, sums in fp32.

    A stream's codes are the same, bit for bit, in every slot, for every grid, and whichever other
    streams run beside it. The CTAs of a frame wait for each other, so each launch is cooperative: it
    begins once all of its CTAs have room. Several instances, of one process or of several, may therefore
    share a GPU; `tests/test_shared_gpu.py` runs them side by side.
    """

    def __init__(
        self,
        talker: Talker,
        talker_config: TalkerConfig,
        predictor_config: PredictorConfig,
        *,
        library: Path,
        num_slots: int | None = None,
        max_positions: int = 3072,
        num_pages: int | None = None,
        grid: int | None = None,
        l2_share: float | None = None,
        max_spins: int = _MAX_SPINS,
    ) -> None:
        """Pack the weights and reserve the caches.

        Args:
            talker: bf16, on the GPU; read here; the layers' weights are also kept, for long prompts.
            talker_config, predictor_config: the shapes that `library` was built for.
            library: from `build_tts.build`.
            num_slots: streams that can be live; None is `max_batch`.
            max_positions: prompt rows plus frames of a stream, at most MAX_POSITIONS.
            num_pages: of the cache; None is as many as all slots can need.
            grid: CTAs of a launch, from 8 to one an SM; None is as many as there are SMs.
                Fewer than 64 hold shorter streams: 8 CTAs hold 1024 positions.
            l2_share: part of L2 that keeps weights of the predictor; None is `DEFAULT_L2_SHARE`.
            max_spins: polls after which a wait inside the kernel is an error.

        Raises:
            ValueError: a number out of range, or a kernel of other sources.
            RuntimeError: the driver refuses the kernel.
        """
        self._device = talker.codec_head.weight.device
        self._file = FrameKernelFile(library, self._device)
        self.max_batch = self._file.facts["max_columns"]
        self._prefill_rows_at_once = self._file.facts["narrow_columns"]
        num_slots = self.max_batch if num_slots is None else num_slots
        check_max_positions(num_slots, max_positions, min(MAX_POSITIONS, talker_config.max_positions))
        self.num_slots, self.max_positions = num_slots, max_positions
        self._config, self._predictor_config = talker_config, predictor_config
        self._streams: dict[int, _Stream] = {}
        self._stream_params = np.zeros(num_slots, dtype=STREAM)
        """By slot; each launch fills in position, first, frame and suppress_eos."""
        self._choose_grid(grid)  # refused before weights are packed
        packed = self._pack(talker)
        self.kv_cache = KvCache(
            talker_config,
            num_slots,
            max_positions,
            dtype=torch.bfloat16,
            device=self._device,
            layout=swizzled,
            num_pages=num_pages,
        )
        self._tensors = packed | self.kv_cache.tensors | self._reserve()
        self._prefixes = PrefixCache(self.kv_cache)
        self._long_prompts = TalkerPrefill(talker, talker_config, self.kv_cache)
        self._max_spins = max_spins
        self._epoch, self._num_tags = _FIRST_EPOCH, self._file.facts["num_tags"]
        self._codes_host = torch.zeros(self.max_batch, NUM_CODEBOOKS, dtype=torch.int32, pin_memory=True)
        self._copied = CopyEvents()
        """When the codes of a frame are on the host."""
        self.load_kernel(library, Setting(grid=grid, l2_share=l2_share))

    def load_kernel(self, library: Path, setting: Setting) -> None:
        """Use another build for all later frames. Weights, caches and live slots stay.

        Args:
            library: built for the same shape and form, with the setting's `ring_slots`.
            setting: how it is launched.

        Raises:
            ValueError: a grid out of range.
        """
        self._file = FrameKernelFile(library, self._device)
        share = DEFAULT_L2_SHARE if setting.l2_share is None else setting.l2_share
        l2_bytes = torch.cuda.get_device_properties(self._device).L2_cache_size
        with torch.cuda.device(self._device):
            self._kernel = FrameLauncher(
                self._file,
                self._tensors,
                num_slots=self.num_slots,
                max_positions=self.max_positions,
                grid=self._choose_grid(setting.grid),
                max_spins=self._max_spins,
                predictor_kept_bytes=int(l2_bytes * share) // self._predictor_config.num_layers,
            )

    @property
    def max_grid(self) -> int:
        """CTAs of the largest launch: one on each SM, limited by the work that the shape has."""
        sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        return min(sms, self._file.facts["max_grid"])

    def _choose_grid(self, grid: int | None) -> int:
        most = self.max_grid
        if grid is None:
            return most
        least = self._prefill_rows_at_once  # each stream of a narrow frame has a CTA that draws for it
        if not least <= grid <= most:
            raise ValueError(f"grid is {grid}, allowed: {least} to {most}")
        return grid

    @torch.no_grad()
    def _pack(self, talker: Talker) -> dict[str, Tensor]:
        """The weights, under the kernel's names."""
        predictor = talker.code_predictor
        tables = torch.stack([e.weight for e in predictor.model.codec_embedding])
        norm, predictor_norm = talker.model.norm, predictor.model.norm
        head = [pack_product(with_norm(talker.codec_head.weight, norm))]
        none = torch.zeros(0, dtype=torch.bfloat16, device=self._device)
        projected, bias = none, none
        projection = predictor.small_to_mtp_projection
        if isinstance(projection, torch.nn.Linear):
            head.append(pack_product(projection.weight))
            bias = projection.bias.to(torch.bfloat16)
            first = talker.model.codec_embedding.weight[: self._predictor_config.vocab_size]
            rows = torch.cat([first[None], tables[:-1]]).float()
            projected = (rows @ projection.weight.float().T + projection.bias.float()).to(torch.bfloat16)
        fed = projected[1:] if len(projected) else tables[:-1]  # of codes 1 to 14
        first_layer = predictor.model.layers[0]
        axes = torch.arange(self.max_positions, device=self._device).expand(3, -1)
        positions = torch.arange(NUM_CODEBOOKS, device=self._device)
        packed = {
            "talker_layers": pack_layers(talker.model.layers),
            "talker_head": torch.cat(head),
            "predictor_layers": pack_layers(predictor.model.layers),
            "predictor_heads": torch.cat(
                [pack_product(with_norm(head.weight, predictor_norm)) for head in predictor.lm_head]
            ),
            "talker_norm": norm.weight.detach(),
            "talker_qk_norms": pack_qk_norms(talker.model.layers),
            # Codebook by codebook: what is computed is fp32.
            "predictor_first_qkv": torch.stack([known_qkv(first_layer, rows) for rows in fed]),
            "predictor_qk_norms": pack_qk_norms(predictor.model.layers),
            "codec_embedding": talker.model.codec_embedding.weight.detach(),
            "predictor_embeddings": tables,
            "projected_embeddings": projected,
            "projection_bias": bias,
        }
        if wrong := [name for name, tensor in packed.items() if tensor.dtype != torch.bfloat16]:
            raise ValueError(f"the kernel needs bf16 weights; {wrong[0]} is {packed[wrong[0]].dtype}")
        return packed | {
            "talker_rope": pack_rope(*mrope_tables(self._config, axes)),
            "predictor_rope": pack_rope(*rope_tables(self._predictor_config, positions)),
        }

    def _reserve(self) -> dict[str, Tensor]:
        """State, scratch and exchange buffers, under the kernel's names."""
        c, p, facts = self._config, self._predictor_config, self._file.facts
        scratch = (p.num_layers, self.max_batch, p.num_kv_heads, 2, NUM_CODEBOOKS, p.head_dim)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        return {
            "predictor_kv": zeros(*scratch, dtype=torch.bfloat16),
            "page_table": self.kv_cache.page_table,
            "next_rows": zeros(self.num_slots, c.hidden_size, dtype=torch.float32),
            "seen": zeros(self.num_slots, c.vocab_size // 32, dtype=torch.int32),
            "codes": zeros(self.max_batch, NUM_CODEBOOKS, dtype=torch.int32),
            "noise_scratch": zeros(self.max_batch, facts["noise_floats"], dtype=torch.float32),
            "packets": zeros(facts["num_packets"], dtype=torch.int64),
            "watchdog": torch.zeros(4, dtype=torch.int32, pin_memory=True),
        }

    @torch.inference_mode()
    def prefill(
        self, slot: int, rows: Tensor, params: GenerationParams, shared: SharedRows | None = None
    ) -> None:
        """See `DecoderBackend.prefill`. Raises `ValueError` for a slot in use or a bad length."""
        check_prefill(self, slot, slot in self._streams, rows, self._config.hidden_size, shared)
        self.kv_cache.begin_stream(slot)
        rows = rows.to(self._device, torch.float32)
        self._stream_params[slot] = self._params_of(slot, params)
        with self._named(0):
            begin = self._prefixes.begin(
                slot, shared, lambda count: self._prefill_rows(slot, rows[:count], 0)
            )
            self._prefill_rows(slot, rows[begin:-1], begin)
            self._tensors["next_rows"][slot] = rows[-1]
            self._tensors["seen"][slot] = 0
        self._streams[slot] = _Stream(params, position=len(rows) - 1, frame=0)

    def _prefill_rows(self, slot: int, rows: Tensor, begin: int) -> None:
        """Rows [p, hidden] through the talker's layers, the first at `begin`."""
        while len(rows) >= _LONG_PROMPT and self._long_prompts.fits(begin):
            self._long_prompts.run(slot, rows[:ROWS], begin)
            begin += len(rows[:ROWS])
            rows = rows[ROWS:]
        at_once = self._prefill_rows_at_once
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            columns = self._stream_params[[slot] * len(part)]
            columns["position"] = begin + first + np.arange(len(part))
            self._launch(columns, part, prefill=True)

    def release(self, slot: int) -> None:
        """See `DecoderBackend.release`. Raises `ValueError` for a slot that is not live."""
        if self._streams.pop(slot, None) is None:
            raise ValueError(f"slot {slot} is not in use")
        self.kv_cache.end_stream(slot)

    def decode(
        self, slots: Sequence[int], text_rows: Tensor, noise: Tensor | None = None, **tests: object
    ) -> Tensor:
        """`launch`, and wait for its codes: int64 [n, 16] on the CPU."""
        return self.launch(slots, text_rows, noise, **tests).codes()

    @torch.inference_mode()
    def launch(
        self,
        slots: Sequence[int],
        text_rows: Tensor,
        noise: Tensor | None = None,
        forced_codes: Tensor | None = None,
        dumps: FrameDumps | None = None,
    ) -> LaunchedFrame:
        """See `DecoderBackend.launch`.

        Args:
            slots, text_rows, noise: see `DecoderBackend.launch`.
            forced_codes: int64 [n, 16] that the frame goes on with; returned are the drawn ones (tests).
            dumps: filled with values that the frame computes (tests).

        Raises:
            ValueError: slots not live, repeated, too many or full.
            KernelError: also from `LaunchedFrame.codes`: the frame was not finished.
        """
        check_decode(self, slots, self._streams, text_rows, self._config.hidden_size)
        streams = [self._streams[slot] for slot in slots]
        columns = self._stream_params[list(slots)]
        columns["position"] = [s.position for s in streams]
        columns["first"] = np.arange(len(streams))
        columns["frame"] = [s.frame for s in streams]
        columns["suppress_eos"] = [s.frame < s.params.min_frames for s in streams]
        codes, host = self._tensors["codes"][: len(slots)], self._codes_host[: len(slots)]
        frame = streams[0].frame
        with self._named(frame, len(slots)):
            self._launch(
                columns,
                text_rows.to(self._device, torch.float32).contiguous(),
                noise=None if noise is None else noise.to(self._device, torch.float32).contiguous(),
                forced_codes=None
                if forced_codes is None
                else forced_codes.to(self._device, torch.int32).contiguous(),
                dumps=dumps,
            )
            host.copy_(codes, non_blocking=True)
            copied = self._copied.choose(len(slots))
            copied.record(torch.cuda.current_stream(self._device))
        for stream in streams:
            stream.position += 1
            stream.frame += 1

        def wait() -> Tensor:
            with self._named(frame, len(slots)):
                copied.synchronize()
            return host.to(torch.int64)

        return LaunchedFrame(codes, wait)

    @property
    def num_exchanges(self) -> int:
        """The most exchanges that a frame of any number of streams has."""
        return self._num_tags

    def exchange_dump(self) -> Tensor:
        """A tensor for `FrameDumps.exchanges`, fp32 [exchanges, rows, max_batch]: not-a-number."""
        shape = (self._num_tags, self._file.facts["dump_rows"], self.max_batch)
        return torch.full(shape, torch.nan, device=self._device)

    def _params_of(self, slot: int, params: GenerationParams) -> np.ndarray:
        """A stream's parameters that do not change from frame to frame."""
        stream = np.zeros((), dtype=STREAM)
        stream["slot"], stream["seed"] = slot, split_seed(params.seed)
        vocab = {"talker": self._config.vocab_size, "predictor": self._predictor_config.vocab_size}
        for name, sampling in (("talker", params.talker), ("predictor", params.predictor)):
            stream[f"{name}_temperature"] = sampling.temperature
            stream[f"{name}_tail_mass"] = 1.0 - sampling.top_p
            stream[f"{name}_top_k"] = min(sampling.top_k, vocab[name]) or vocab[name]
        stream["talker_penalty"] = params.talker.repetition_penalty
        return stream

    def _launch(
        self,
        columns: np.ndarray,
        text_rows: Tensor,
        *,
        prefill: bool = False,
        noise: Tensor | None = None,
        forced_codes: Tensor | None = None,
        dumps: FrameDumps | None = None,
    ) -> None:
        if self._epoch + self._num_tags >= 2**32:  # tags start again: no old one may be left
            self._tensors["packets"].zero_()
            self._epoch = _FIRST_EPOCH
        self._kernel.launch(
            columns,
            text_rows,
            prefill=prefill,
            epoch=self._epoch,
            noise=noise,
            forced_codes=forced_codes,
            dumps=dumps,
            cuda_stream=torch.cuda.current_stream(self._device).cuda_stream,
        )
        self._epoch += self._num_tags

    @contextmanager
    def _named(self, frame: int, num_streams: int = 1) -> Iterator[None]:
        """Turn the device's errors into ones that name the frame and, for a hang, the phase."""
        try:
            with torch.cuda.device(self._device):
                yield
        except RuntimeError as error:
            state, cta, phase, exchange = self._tensors["watchdog"].tolist()
            if not state:
                raise KernelError(f"the GPU failed in frame {frame}: {error}") from error
            where = f"in exchange {exchange} ({self._describe(exchange, num_streams)})"
            if state == _NOT_A_NUMBER:
                raise KernelError(
                    f"frame {frame} failed: CTA {cta} computed a value that is not a number or above "
                    f"2^32 {where}"
                ) from error
            waited_for = self._file.phases[phase]
            raise KernelError(
                f"frame {frame} hung: CTA {cta} waited for {waited_for} {where}"
            ) from error

    def exchanges(self, num_streams: int) -> list[Exchange]:
        """The exchanges of a frame of so many streams, in the order of `FrameDumps`."""
        return self._file.exchanges(num_streams)

    def _describe(self, exchange: int, num_streams: int) -> str:
        """The place of an exchange in the frame."""
        known = self.exchanges(num_streams)
        return str(known[exchange]) if exchange < len(known) else "after the frame"
