"""The PyTorch backend as CUDA graphs: the decoder of a GPU that the frame kernel cannot serve.

`TorchBackend` launches thousands of operations a frame, and the host takes far longer to launch them
than the GPU takes to run them. Here no shape and no address depends on the streams. A frame is three
graphs:

    noise     the Philox draws of the frame
    talker    one row of each stream through the layers, and the head; a graph for each reach
    codes     16 draws with the predictor's passes between them, and the next rows; a graph for usual
              sampling, and one for every sampling

Without a GPU the same functions run directly, so tests need no GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_megakernel.config import (
    NUM_CODEBOOKS,
    GenerationParams,
    PredictorConfig,
    SamplingParams,
    TalkerConfig,
)
from qwen_megakernel.decoding.interface import LaunchedFrame, check_decode
from qwen_megakernel.decoding.prefill_graph import ROWS, TalkerPrefill
from qwen_megakernel.decoding.torch_backend import Frame, TorchBackend
from qwen_megakernel.model.cuda_graphs import capture
from qwen_megakernel.model.sampling import (
    SamplingBatch,
    draw,
    gather_sampling,
    gumbel_noise,
    process_logits,
    split_seed,
)
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.shared_rows import SharedRows

REACHES = (256, 512, 1024, 2048)
"""Positions over which each talker graph attends. One more graph covers all positions of a slot. A frame
takes the shortest graph that covers its longest stream."""
USUAL_TOP_K = 64
"""The graph for usual sampling keeps at most so many codes by top-k, or all codes, and has no top-p. The
other graph sorts the whole vocabulary."""


class GraphBackend(TorchBackend):
    """`TorchBackend` with fixed shapes: on a GPU, CUDA graphs. It draws the same codes.

    Every frame has `max_batch` rows. Rows without a stream repeat the first stream: they compute and
    store the same values again. A row's results do not depend on the other rows.
    """

    def __init__(
        self,
        talker: Talker,
        talker_config: TalkerConfig,
        predictor_config: PredictorConfig,
        *,
        num_slots: int | None = None,
        max_positions: int = 3072,
        max_batch: int = 8,
        num_pages: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Join the weights, allocate everything and, on a GPU, capture the graphs.

        Args:
            talker, talker_config, predictor_config, num_slots, max_positions, max_batch, num_pages: see
                `TorchBackend`.
            progress: called with a line that says how long the capture took.

        Raises:
            ValueError: a number is out of range.
            RuntimeError: CUDA cannot capture an operation.
        """
        super().__init__(
            talker,
            talker_config,
            predictor_config,
            num_slots=num_slots,
            max_positions=max_positions,
            max_batch=max_batch,
            num_pages=num_pages,
        )
        self._on_gpu = self._device.type == "cuda"
        started = time.monotonic()
        tell = progress or (lambda line: None)
        tell("capturing the decoder's CUDA graphs")
        self._reserve_frame()
        num_graphs = self._capture()
        tell(f"captured {num_graphs} CUDA graphs of the decoder in {time.monotonic() - started:.1f} s")

    @torch.inference_mode()
    def _reserve_frame(self) -> None:
        """Allocate what a frame reads and writes. The graphs hold these addresses."""
        for tensor in self.kv_cache.tensors.values():
            tensor.zero_()  # unwritten rows are multiplied by zero, so they must be finite
        n, hidden = self.max_batch, self._config.hidden_size
        sizes = self._config.vocab_size, self._predictor_config.vocab_size

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._state = zeros(6, n, dtype=torch.int64)
        """Each row's slot, position, frame, frames without EOS, and the seed's low and high word."""
        self._text = zeros(n, hidden, dtype=self._dtype)
        self._next_rows = zeros(self.num_slots, hidden, dtype=self._dtype)
        """The input row of each slot's next frame, before the text row is added."""
        self._noises = zeros(n, sizes[0]), zeros(n, NUM_CODEBOOKS - 1, sizes[1])
        self._hidden = zeros(n, hidden, dtype=self._dtype)
        self._logits = zeros(n, sizes[0])
        self._predictor_logits = zeros(n, NUM_CODEBOOKS - 1, sizes[1])
        self._codes = zeros(n, NUM_CODEBOOKS, dtype=torch.int64)
        self._codebooks = torch.arange(NUM_CODEBOOKS, device=self._device)
        self._axes = torch.arange(self.max_positions, device=self._device)
        self._true = torch.ones((), dtype=torch.bool, device=self._device)
        self._is_eos = torch.zeros_like(self._suppress)
        self._is_eos[:, self._config.codec_eos_id] = True
        usual = [SamplingParams(repetition_penalty=2.0)] * n
        self._sampling = tuple(
            replace(
                SamplingBatch.gather(usual, size, self._device),
                keeps_all=zeros(n, 1, dtype=torch.bool),
                max_top_k=min(USUAL_TOP_K, size),
            )
            for size in sizes
        )
        """Parameters of talker and predictor, overwritten when a frame's differ from the last ones."""
        self._sampled: tuple[tuple[SamplingParams, ...], ...] = ()

    @torch.inference_mode()
    def _capture(self) -> int:
        """Capture what a frame runs. Returns the number of graphs."""
        pool = torch.cuda.graph_pool_handle() if self._on_gpu else None

        def captured(run: Callable[[], None]) -> Callable[[], None]:
            return capture(run, self._device, pool).replay if self._on_gpu else run

        most = self.max_positions
        reaches = [*(reach for reach in REACHES if reach < most), most]
        self._prompts = TalkerPrefill(self._talker, self._config, self.kv_cache, self._layers.layers)
        self._draw_noise = captured(self._compute_noise)
        self._talker_runs = {reach: captured(partial(self._run_talker, reach)) for reach in reaches}
        self._code_runs = {usual: captured(partial(self._draw_codes, usual)) for usual in (True, False)}
        return 1 + len(self._talker_runs) + len(self._code_runs)

    # --- the frame, on tensors only -------------------------------------------------------------

    def _compute_noise(self) -> None:
        seeds, frames = self._state[4:].T, self._state[2]
        parts = self._codebooks.split((1, NUM_CODEBOOKS - 1))
        for noise, part in zip(self._noises, parts, strict=True):
            noise.copy_(gumbel_noise(seeds, frames, part, noise.shape[-1]).view_as(noise))

    def _run_talker(self, reach: int) -> None:
        slots, positions = self._state[0], self._state[1]
        cached = self.kv_cache.batch(slots, positions, reach)
        mask = torch.zeros(self.max_batch, reach, dtype=self._dtype, device=self._device)
        mask.masked_fill_(self._axes[:reach] > positions[:, None], -torch.inf)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _attend_to_all(q, *cached.extend(layer, k, v), mask[:, None, None])

        rows = self._next_rows.index_select(0, slots) + self._text
        rope = tuple(table.index_select(0, positions)[:, None] for table in (self._cos, self._sin))
        with _same_attention(self._device):
            self._hidden.copy_(self._layers(rows[:, None], rope, attend)[:, 0])
        self._logits.copy_(self._talker.codec_head(self._hidden))

    def _draw_codes(self, usual: bool, forced_codes: Tensor | None = None) -> None:
        """forced_codes: int64 [max_batch, 16], see `decode_frame`."""
        batches = self._sampling if usual else tuple(map(_every_sampling, self._sampling, self._noises))
        slots, frames, min_frames = self._state[0], self._state[2], self._state[3]
        suppress = self._suppress | (self._is_eos & (frames < min_frames)[:, None])
        seen = self._seen.index_select(0, slots)
        scores = process_logits(self._logits, batches[0], seen, suppress)
        code0 = draw(scores, batches[0].temperature, self._noises[0])
        if forced_codes is not None:
            code0 = forced_codes[:, 0]
        codes, next_rows, logits = self._predict(
            self._hidden, code0, batches[1], self._noises[1], forced_codes
        )
        self._codes.copy_(codes)
        self._predictor_logits.copy_(logits)
        self._next_rows.index_copy_(0, slots, next_rows)
        self._seen.index_put_((slots, code0), self._true)

    # --- the backend ----------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self, slot: int, rows: Tensor, params: GenerationParams, shared: SharedRows | None = None
    ) -> None:
        """See `DecoderBackend.prefill`. Raises `ValueError` for a slot in use or a bad length."""
        super().prefill(slot, rows, params, shared)
        self._next_rows[slot] = self._streams[slot].next_row

    def _prefill_rows(self, slot: int, rows: Tensor, begin: int) -> None:
        while len(rows) and self._prompts.fits(begin):
            self._prompts.run(slot, rows[:ROWS], begin)
            begin += len(rows[:ROWS])
            rows = rows[ROWS:]
        super()._prefill_rows(slot, rows, begin)

    @torch.inference_mode()
    def launch(
        self, slots: Sequence[int], text_rows: Tensor, noise: Tensor | None = None
    ) -> LaunchedFrame:
        """See `DecoderBackend.launch`."""
        self._run(slots, text_rows, noise)
        codes = self._codes[: len(slots)]
        if not self._on_gpu:
            return LaunchedFrame(codes, codes.clone)
        host = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True)
        host.copy_(codes, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return LaunchedFrame(codes, wait)

    @torch.inference_mode()
    def decode_frame(
        self,
        slots: Sequence[int],
        text_rows: Tensor,
        noise: Tensor | None = None,
        forced_codes: Tensor | None = None,
    ) -> Frame:
        """See `TorchBackend.decode_frame`. Forced codes are drawn without a graph."""
        self._run(slots, text_rows, noise, forced_codes)
        made = self._codes, self._hidden, self._logits, self._predictor_logits
        return Frame(*(tensor[: len(slots)].clone() for tensor in made))

    def _run(
        self,
        slots: Sequence[int],
        text_rows: Tensor,
        noise: Tensor | None,
        forced_codes: Tensor | None = None,
    ) -> None:
        """Run one frame: from the arguments of `decode_frame` to the tensors of `_reserve_frame`."""
        check_decode(self, slots, self._streams, text_rows, self._config.hidden_size)
        streams = [self._streams[slot] for slot in slots]
        state = [
            (slot, s.position, s.frame, s.params.min_frames, *split_seed(s.params.seed))
            for slot, s in zip(slots, streams, strict=True)
        ]
        state += state[:1] * (self.max_batch - len(state))
        self._state.copy_(self._to_device(torch.tensor(state).T.contiguous()))
        self._fill(self._text, text_rows)
        params = tuple(s.params for s in streams)
        self._load_sampling(params)
        if noise is None:
            self._draw_noise()
        else:
            self._fill(self._noises[0], noise[:, 0])
            self._fill(self._noises[1], noise[:, 1:, : self._predictor_config.vocab_size])
        longest = max(s.position for s in streams)
        next(run for reach, run in self._talker_runs.items() if reach > longest)()
        usual = all(map(self._is_usual, params))
        if forced_codes is None:
            self._code_runs[usual]()
        else:
            self._draw_codes(usual, self._fill(torch.empty_like(self._codes), forced_codes))
        for stream in streams:
            stream.position += 1
            stream.frame += 1

    def _fill(self, buffer: Tensor, rows: Tensor) -> Tensor:
        """Copy rows to the front of a buffer of `max_batch` rows, and the first row to the rest."""
        rows = self._to_device(rows)
        buffer[: len(rows)].copy_(rows)
        buffer[len(rows) :].copy_(rows[:1].expand(len(buffer) - len(rows), *rows.shape[1:]))
        return buffer

    def _to_device(self, rows: Tensor) -> Tensor:
        if self._on_gpu and rows.device.type == "cpu":
            rows = rows.pin_memory()  # a copy from pageable memory would wait for the running frame
        return rows.to(self._device, non_blocking=True)

    def _load_sampling(self, params: tuple[GenerationParams, ...]) -> None:
        """Copy the sampling parameters of a frame's streams, if they have changed."""
        of_parts = (tuple(p.talker for p in params), tuple(p.predictor for p in params))
        if of_parts == self._sampled:
            return
        for static, part, noise in zip(self._sampling, of_parts, self._noises, strict=True):
            batch = gather_sampling(part, noise.shape[-1], self._device)
            for name in ("temperature", "divisor", "tail_mass", "repetition_penalty"):
                self._fill(getattr(static, name), getattr(batch, name))
            keeps_all = batch.keeps_all
            if keeps_all is None:
                keeps_all = torch.zeros_like(batch.kth, dtype=torch.bool)
            self._fill(static.keeps_all, keeps_all)
            self._fill(static.kth, batch.kth.masked_fill(keeps_all, 0))
        self._sampled = of_parts

    def _is_usual(self, params: GenerationParams) -> bool:
        """Whether the usual graph draws a stream's codes."""
        pairs = zip((params.talker, params.predictor), self._noises, strict=True)
        return all(
            p.top_p == 1.0 and (p.top_k <= USUAL_TOP_K or p.top_k >= noise.shape[-1])
            for p, noise in pairs
        )


def _every_sampling(batch: SamplingBatch, noise: Tensor) -> SamplingBatch:
    """The same parameters for any top-p, and any top-k up to the vocabulary (noise's last dimension)."""
    return replace(batch, max_top_k=noise.shape[-1], uses_top_p=True)


def _attend_to_all(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one row of each stream.

    Args:
        q: [n, 1, heads, head_dim].
        keys, values: [n, kv_heads, reach, head_dim].
        mask: [n, 1, 1, reach], added to the scores.

    Returns:
        The shape of q.
    """
    # The query heads of a group share their keys, so attention can take them as positions.
    grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
    mask = mask.expand(-1, keys.shape[1], grouped.shape[2], -1)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(q.shape)


def _same_attention(device: torch.device) -> sdpa_kernel | nullcontext:
    """On a GPU, select attention that takes keys in order, block by block.

    Keys after a stream's own then add zeros, and its result is the same for every reach: it does not
    depend on the length of the other streams. A kernel that divides the keys among blocks would round
    differently for each reach.
    """
    if device.type == "cpu":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
