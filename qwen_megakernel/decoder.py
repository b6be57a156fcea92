"""The decoder seam, and its PyTorch backend.

All decode state of a stream lives in a numbered slot: KV cache, position, sampling state, draw
key and the codes fed back. A backend knows nothing of text, voices, turns or audio:

    prefill(slot, rows, params)      the prompt goes in; the slot is live
    launch(slots, text_rows)         begin one frame for each of them -> its codes, once they are there
    release(slot)                    the slot is free

A row is fed before it is decoded: `prefill` runs all rows but the last, and every `launch`
runs one row, which is the last prompt row at first and the sum of the 16 code embeddings of
the previous frame after that, plus the text row that the caller passes. So a stream whose next
text is late is simply left out of `launch`, and a frame is always talker, then predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen_megakernel.config import (
    NUM_CODEBOOKS,
    NUM_CONTROL_CODES,
    GenerationParams,
    PredictorConfig,
    TalkerConfig,
    TransformerConfig,
)
from qwen_megakernel.model import Attend, Talker, causal_attention, mrope_tables, rope_tables
from qwen_megakernel.prefix_cache import PrefixCache, SharedRows
from qwen_megakernel.sampling import SamplingBatch, draw, gumbel_noise, process_logits, split_seed

MAX_BATCH = 8
"""Streams a frame can decode at once, on every backend."""


@dataclass(frozen=True, slots=True)
class LaunchedFrame:
    """A frame that the device may still be at."""

    device_codes: Tensor
    """Integers [n, 16] where the backend computes, for what is queued on the current stream behind
    this frame and before the next."""
    codes: Callable[[], Tensor]
    """Waits for the frame: int64 [n, 16] on the CPU. To be called before the next launch."""


class DecoderBackend(Protocol):
    """What the engine drives; `TorchBackend` is the specification.

    Work is done in the order of the calls. On a GPU `prefill` and `launch` may return before it is.
    """

    num_slots: int
    max_positions: int
    """Prompt rows plus frames that a slot can hold."""

    def prefill(
        self, slot: int, rows: Tensor, params: GenerationParams, shared: SharedRows | None = None
    ) -> None:
        """Start a stream in a free slot.

        Args:
            slot: 0 .. num_slots - 1.
            rows: [p, hidden] prompt rows in the model's dtype, 1 <= p < max_positions.
            params: sampling of talker and predictor, seed, minimum length.
            shared: the rows' beginning that other prompts share, at most p - 1 rows.
        """

    def launch(
        self, slots: Sequence[int], text_rows: Tensor, noise: Tensor | None = None
    ) -> LaunchedFrame:
        """Begin one frame of each slot. Where its code 0 is EOS it is the end, not sound.

        Args:
            slots: 1 to 8 different live slots.
            text_rows: [n, hidden], added to the rows fed now; zeros for a slot's first frame.
            noise: fp32 [n, 16, talker vocabulary] to use instead of the slots' own draws (tests).
        """

    def release(self, slot: int) -> None:
        """Free a slot; its next `prefill` sees nothing of this stream. A frame may still be running."""


def check_max_positions(num_slots: int, max_positions: int, limit: int) -> None:
    """Sizes of a backend. Raises `ValueError`."""
    if num_slots < 1:
        raise ValueError(f"num_slots is {num_slots}, allowed: at least 1")
    if not 2 <= max_positions <= limit:
        raise ValueError(f"max_positions is {max_positions}, allowed: 2 to {limit}")


def check_prefill(
    backend: DecoderBackend,
    slot: int,
    in_use: bool,
    rows: Tensor,
    hidden: int,
    shared: SharedRows | None,
) -> None:
    """What `DecoderBackend.prefill` may be given. Raises `ValueError`."""
    if not 0 <= slot < backend.num_slots:
        raise ValueError(f"slot is {slot}, allowed: 0 to {backend.num_slots - 1}")
    if in_use:
        raise ValueError(f"slot {slot} is in use")
    if rows.ndim != 2 or rows.shape[1] != hidden:
        raise ValueError(f"rows is {list(rows.shape)}, expected [p, {hidden}]")
    if not 1 <= rows.shape[0] < backend.max_positions:
        raise ValueError(
            f"the prompt has {rows.shape[0]} rows, allowed: 1 to {backend.max_positions - 1}"
        )
    if shared and not 0 <= shared.count < rows.shape[0]:
        raise ValueError(f"{shared.count} rows are shared, allowed: 0 to {rows.shape[0] - 1}")


class HasPosition(Protocol):
    """A live stream."""

    position: int
    """Rows in its KV cache."""


def check_decode(
    backend: DecoderBackend,
    slots: Sequence[int],
    streams: Mapping[int, HasPosition],
    text_rows: Tensor,
    hidden: int,
) -> None:
    """What `DecoderBackend.launch` may be given; `streams` by live slot. Raises `ValueError`."""
    if not 1 <= len(slots) <= MAX_BATCH:
        raise ValueError(f"{len(slots)} slots in a frame, allowed: 1 to {MAX_BATCH}")
    if len(set(slots)) != len(slots):
        raise ValueError(f"slots {list(slots)} repeat")
    for slot in slots:
        if slot not in streams:
            raise ValueError(f"slot {slot} is not in use")
        if streams[slot].position >= backend.max_positions:
            raise ValueError(f"slot {slot} is full: {backend.max_positions} positions")
    expected = (len(slots), hidden)
    if tuple(text_rows.shape) != expected:
        raise ValueError(f"text_rows is {list(text_rows.shape)}, expected {list(expected)}")


@dataclass(slots=True)
class Frame:
    """All a frame computes, for tests and comparisons; `launch` gives the codes alone."""

    codes: Tensor
    """int64 [n, 16]."""
    hidden: Tensor
    """[n, hidden], the talker's normed hidden row that the predictor starts from."""
    talker_logits: Tensor
    """fp32 [n, talker vocabulary], before any processing."""
    predictor_logits: Tensor
    """fp32 [n, 15, predictor vocabulary]."""


@dataclass(slots=True)
class _Stream:
    """The live state of a slot outside the caches."""

    params: GenerationParams
    position: int
    """Rows in the KV cache."""
    frame: int
    """Frames decoded."""
    next_row: Tensor
    """[hidden], what the next frame is fed, less its text row."""


class TorchBackend:
    """Talker and predictor in PyTorch, fp32 or bf16, CPU or CUDA.

    A stream's codes do not depend on its company (see `StreamLinear`): on a GPU every frame has
    MAX_BATCH rows, whatever the number of streams, and attention runs slot by slot over that
    slot's own length.
    """

    def __init__(
        self,
        talker: Talker,
        talker_config: TalkerConfig,
        predictor_config: PredictorConfig,
        *,
        num_slots: int = MAX_BATCH,
        max_positions: int = 3072,
    ) -> None:
        check_max_positions(num_slots, max_positions, talker_config.max_positions)
        self.num_slots, self.max_positions = num_slots, max_positions
        self._talker, self._config, self._predictor_config = talker, talker_config, predictor_config
        weight = talker.codec_head.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._k_cache, self._v_cache = self._caches(talker_config, num_slots, max_positions)
        self._prefixes = PrefixCache(self._k_cache, self._v_cache)
        self._predictor_caches = self._caches(predictor_config, MAX_BATCH, NUM_CODEBOOKS)
        axes = torch.arange(max_positions, device=self._device).expand(3, -1)
        self._cos, self._sin = mrope_tables(talker_config, axes)
        self._predictor_cos, self._predictor_sin = rope_tables(
            predictor_config, torch.arange(NUM_CODEBOOKS, device=self._device)
        )
        vocab = talker_config.vocab_size
        self._suppress = torch.zeros(1, vocab, dtype=torch.bool, device=self._device)
        self._suppress[:, vocab - NUM_CONTROL_CODES :] = True
        self._suppress[:, talker_config.codec_eos_id] = False
        self._seen = torch.zeros(num_slots, vocab, dtype=torch.bool, device=self._device)
        self._streams: dict[int, _Stream] = {}

    def _caches(self, config: TransformerConfig, batch: int, positions: int) -> tuple[Tensor, Tensor]:
        """K and V, each [layers, batch, kv_heads, positions, head_dim]."""
        shape = (config.num_layers, batch, config.num_kv_heads, positions, config.head_dim)
        return (
            torch.empty(shape, dtype=self._dtype, device=self._device),
            torch.empty(shape, dtype=self._dtype, device=self._device),
        )

    @torch.inference_mode()
    def prefill(
        self, slot: int, rows: Tensor, params: GenerationParams, shared: SharedRows | None = None
    ) -> None:
        """See `DecoderBackend.prefill`. Raises `ValueError` for a slot in use or a bad length."""
        check_prefill(self, slot, slot in self._streams, rows, self._config.hidden_size, shared)
        rows = rows.to(self._device, self._dtype)
        begin = self._prefixes.begin(
            slot, shared, lambda count: self._prefill_rows(slot, rows[:count], 0)
        )
        self._prefill_rows(slot, rows[begin:-1], begin)
        self._seen[slot] = False
        self._streams[slot] = _Stream(params, position=len(rows) - 1, frame=0, next_row=rows[-1].clone())

    def _prefill_rows(self, slot: int, rows: Tensor, begin: int) -> None:
        """Rows [p, hidden] through the talker, the first at position `begin`."""
        if not len(rows):
            return
        end = begin + len(rows)
        cos, sin = self._cos[None, begin:end], self._sin[None, begin:end]
        self._talker(rows[None], cos, sin, self._attend_prompt(slot, begin))

    def release(self, slot: int) -> None:
        """See `DecoderBackend.release`. Raises `ValueError` for a slot that is not live."""
        if self._streams.pop(slot, None) is None:
            raise ValueError(f"slot {slot} is not in use")

    def launch(
        self, slots: Sequence[int], text_rows: Tensor, noise: Tensor | None = None
    ) -> LaunchedFrame:
        """See `DecoderBackend.launch`."""
        codes = self.decode_frame(slots, text_rows, noise).codes
        return LaunchedFrame(codes, codes.cpu)

    def decode(self, slots: Sequence[int], text_rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """`launch`, waited for: int64 [n, 16] on the CPU."""
        return self.launch(slots, text_rows, noise).codes()

    @torch.inference_mode()
    def decode_frame(
        self,
        slots: Sequence[int],
        text_rows: Tensor,
        noise: Tensor | None = None,
        forced_codes: Tensor | None = None,
    ) -> Frame:
        """`decode` with everything it computes.

        Args:
            slots, text_rows, noise: see `DecoderBackend.launch`.
            forced_codes: int64 [n, 16] to take instead of the drawn codes (teacher forcing).

        Raises:
            ValueError: slots not live, repeated, too many or full.
        """
        check_decode(self, slots, self._streams, text_rows, self._config.hidden_size)
        streams = [self._streams[slot] for slot in slots]
        n = len(streams)
        num_rows = n if self._device.type == "cpu" else MAX_BATCH
        rows = torch.zeros(num_rows, self._config.hidden_size, dtype=self._dtype, device=self._device)
        rows[:n] = torch.stack([s.next_row for s in streams]) + text_rows.to(rows)
        hidden = self._talker_step(slots, streams, rows)
        talker_logits = self._talker.codec_head(hidden)[:n].float()
        draws = _Draws(streams, self._device, noise)
        code0 = self._sample_code0(slots, streams, talker_logits, draws)
        if forced_codes is not None:
            code0 = forced_codes[:, 0].to(self._device)
        codes, predictor_logits = self._predict(hidden, code0, streams, draws, forced_codes)
        self._advance(slots, streams, codes)
        return Frame(codes[:n], hidden[:n], talker_logits, predictor_logits)

    def _attend_prompt(self, slot: int, begin: int) -> Attend:
        """Attention of prompt rows from position `begin` on."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            end = begin + q.shape[1]
            self._k_cache[layer, slot, :, begin:end] = k[0].transpose(0, 1)
            self._v_cache[layer, slot, :, begin:end] = v[0].transpose(0, 1)
            cache = (slice(slot, slot + 1), slice(None), slice(end))
            return causal_attention(q, self._k_cache[layer][cache], self._v_cache[layer][cache])

        return attend

    def _talker_step(self, slots: Sequence[int], streams: list[_Stream], rows: Tensor) -> Tensor:
        """Rows [n or MAX_BATCH, hidden] -> normed hidden states of the same shape."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.zeros_like(q)
            for i, (slot, stream) in enumerate(zip(slots, streams, strict=True)):
                self._k_cache[layer, slot, :, stream.position] = k[i, 0]
                self._v_cache[layer, slot, :, stream.position] = v[i, 0]
                cache = (slice(slot, slot + 1), slice(None), slice(stream.position + 1))
                out[i] = causal_attention(
                    q[i : i + 1], self._k_cache[layer][cache], self._v_cache[layer][cache]
                )[0]
            return out

        positions = torch.zeros(len(rows), dtype=torch.int64, device=self._device)
        positions[: len(streams)] = torch.tensor([s.position for s in streams])
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        return self._talker(rows[:, None], cos, sin, attend)[:, 0]

    def _sample_code0(
        self, slots: Sequence[int], streams: list[_Stream], logits: Tensor, draws: _Draws
    ) -> Tensor:
        """Code 0 of each stream, int64 [n]."""
        batch = SamplingBatch.gather([s.params.talker for s in streams], logits.shape[-1], self._device)
        suppress = self._suppress.expand(len(streams), -1).clone()
        for i, stream in enumerate(streams):
            if stream.frame < stream.params.min_frames:
                suppress[i, self._config.codec_eos_id] = True
        scores = process_logits(logits, batch, self._seen[list(slots)], suppress)
        return draw(scores, batch.temperature, draws.talker(logits.shape[-1]))

    def _predict(
        self,
        hidden: Tensor,
        code0: Tensor,
        streams: list[_Stream],
        draws: _Draws,
        forced_codes: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Codes int64 [n or MAX_BATCH, 16] and logits fp32 [n, 15, vocabulary] of the 15 passes."""
        n, predictor = len(streams), self._talker.code_predictor
        vocab = self._predictor_config.vocab_size
        batch = SamplingBatch.gather([s.params.predictor for s in streams], vocab, self._device)
        noise = draws.predictor(vocab)
        codes = torch.zeros(len(hidden), NUM_CODEBOOKS, dtype=torch.int64, device=self._device)
        codes[:n, 0] = code0
        rows = torch.stack([hidden, self._talker.model.codec_embedding(codes[:, 0])], dim=1)
        position, logits = 0, []
        for codebook in range(1, NUM_CODEBOOKS):
            end = position + rows.shape[1]
            cos, sin = self._predictor_cos[None, position:end], self._predictor_sin[None, position:end]
            x = predictor(rows, cos, sin, self._attend_predictor(position))
            logits.append(predictor.lm_head[codebook - 1](x[:, -1])[:n].float())
            if forced_codes is None:
                scores = process_logits(logits[-1], batch)
                codes[:n, codebook] = draw(scores, batch.temperature, noise[:, codebook - 1])
            else:
                codes[:n, codebook] = forced_codes[:, codebook].to(self._device)
            rows = predictor.model.codec_embedding[codebook - 1](codes[:, codebook])[:, None]
            position = end
        return codes, torch.stack(logits, dim=1)

    def _attend_predictor(self, position: int) -> Attend:
        """Attention of the rows at `position` of this frame's predictor sequence."""
        k_cache, v_cache = self._predictor_caches

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            end = position + q.shape[1]
            n = len(q)
            k_cache[layer, :n, :, position:end] = k.transpose(1, 2)
            v_cache[layer, :n, :, position:end] = v.transpose(1, 2)
            return causal_attention(q, k_cache[layer, :n, :, :end], v_cache[layer, :n, :, :end])

        return attend

    def _advance(self, slots: Sequence[int], streams: list[_Stream], codes: Tensor) -> None:
        """Count the frame and leave its codes' embeddings for the next one."""
        # An EOS is not a code of the predictor's tables; the row of an ended stream is not used.
        rows = self._talker.code_rows(codes)
        for i, (slot, stream) in enumerate(zip(slots, streams, strict=True)):
            self._seen[slot, codes[i, 0]] = True
            stream.next_row = rows[i]
            stream.position += 1
            stream.frame += 1


class _Draws:
    """The noise of one frame: counted draws of each stream, or what a test injects."""

    def __init__(self, streams: list[_Stream], device: torch.device, injected: Tensor | None) -> None:
        self._device, self._injected = device, injected
        words = [split_seed(s.params.seed) for s in streams]
        self._seeds = torch.tensor(words, dtype=torch.int64, device=device)
        self._frames = torch.tensor([s.frame for s in streams], dtype=torch.int64, device=device)

    def talker(self, vocab_size: int) -> Tensor:
        """fp32 [n, vocabulary] for code 0."""
        return self._noise(0, 1, vocab_size)[:, 0]

    def predictor(self, vocab_size: int) -> Tensor:
        """fp32 [n, 15, vocabulary] for codes 1..15."""
        return self._noise(1, NUM_CODEBOOKS, vocab_size)

    def _noise(self, first: int, end: int, vocab_size: int) -> Tensor:
        if self._injected is not None:
            return self._injected[:, first:end, :vocab_size].to(self._device)
        codebooks = torch.arange(first, end, device=self._device)
        return gumbel_noise(self._seeds, self._frames, codebooks, vocab_size)
