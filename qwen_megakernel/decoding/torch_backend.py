"""The decoder backend in plain PyTorch: the frame kernel's specification and its reference in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_megakernel.config import (
    NUM_CODEBOOKS,
    NUM_CONTROL_CODES,
    GenerationParams,
    PredictorConfig,
    TalkerConfig,
)
from qwen_megakernel.decoding.interface import (
    LaunchedFrame,
    check_decode,
    check_max_positions,
    check_prefill,
)
from qwen_megakernel.decoding.kv_cache import CachedRows, KvCache, ScatteredRows
from qwen_megakernel.decoding.prefix_cache import PrefixCache
from qwen_megakernel.model.fused_layers import JoinedLayers, joined_rope
from qwen_megakernel.model.sampling import Draws, SamplingBatch, draw, gather_sampling, process_logits
from qwen_megakernel.model.talker import Attend, Talker, causal_attention, mrope_tables, rope_tables
from qwen_megakernel.prompt.shared_rows import SharedRows


@dataclass(slots=True)
class Frame:
    """All that a frame computes, for tests and comparisons. `launch` returns only the codes."""

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
    """The live state of a slot, without its sampling history."""

    params: GenerationParams
    position: int
    """Rows in the KV cache."""
    frame: int
    """Frames decoded."""
    next_row: Tensor
    """[hidden], the next frame's input row before its text row is added."""
    cached: CachedRows | ScatteredRows
    draws: Draws


class TorchBackend:
    """Talker and predictor in PyTorch, fp32 or bf16, CPU or CUDA.

    A stream's codes do not depend on the other streams of a frame (see `linear_by_stream`): on a GPU
    every frame has `max_batch` rows, whatever the number of streams, and attention runs slot by slot
    over that slot's own length.
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
    ) -> None:
        """Join the weights and allocate the cache.

        Args:
            talker: of either dtype, on any device; its weights are kept.
            talker_config, predictor_config: of the same checkpoint.
            num_slots: streams that can be live; None is `max_batch`.
            max_positions: prompt rows plus frames of a stream.
            max_batch: the most streams that one frame decodes. On a GPU every frame takes as long as a
                full one.
            num_pages: of the cache; None is as many as all slots can need.

        Raises:
            ValueError: a number is out of range.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}, allowed: at least 1")
        num_slots = max_batch if num_slots is None else num_slots
        check_max_positions(num_slots, max_positions, talker_config.max_positions)
        self.num_slots, self.max_positions, self.max_batch = num_slots, max_positions, max_batch
        self._talker, self._config, self._predictor_config = talker, talker_config, predictor_config
        weight = talker.codec_head.weight
        self._device, self._dtype = weight.device, weight.dtype
        predictor = talker.code_predictor
        self._layers = JoinedLayers(talker.model.layers, talker.model.norm.weight, talker_config)
        self._predictor_layers = JoinedLayers(
            predictor.model.layers, predictor.model.norm.weight, predictor_config
        )
        self._embeddings = [
            table.weight.detach()
            for table in (talker.model.codec_embedding, *predictor.model.codec_embedding)
        ]
        self.kv_cache = KvCache(
            talker_config,
            num_slots,
            max_positions,
            dtype=self._dtype,
            device=self._device,
            num_pages=num_pages,
        )
        self._prefixes = PrefixCache(self.kv_cache)
        self._predictor_keys, self._predictor_values = self._reserve_predictor()
        axes = torch.arange(max_positions, device=self._device).expand(3, -1)
        self._cos, self._sin = joined_rope(*mrope_tables(talker_config, axes), self._dtype)
        positions = torch.arange(NUM_CODEBOOKS, device=self._device)
        tables = joined_rope(*rope_tables(predictor_config, positions), self._dtype)
        passes = [slice(0, 2), *(slice(i, i + 1) for i in range(2, NUM_CODEBOOKS))]
        self._predictor_ropes = [tuple(table[None, rows] for table in tables) for rows in passes]
        vocab = talker_config.vocab_size
        self._suppress = torch.zeros(1, vocab, dtype=torch.bool, device=self._device)
        self._suppress[:, vocab - NUM_CONTROL_CODES :] = True
        self._suppress[:, talker_config.codec_eos_id] = False
        self._seen = torch.zeros(num_slots, vocab, dtype=torch.bool, device=self._device)
        self._streams: dict[int, _Stream] = {}

    def _reserve_predictor(self) -> tuple[Tensor, Tensor]:
        """Scratch of one frame: keys and values, [layers, max_batch, kv_heads, 16, head_dim] each."""
        c = self._predictor_config
        shape = (c.num_layers, self.max_batch, c.num_kv_heads, NUM_CODEBOOKS, c.head_dim)
        keys, values = (torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        return keys, values

    @torch.inference_mode()
    def prefill(
        self, slot: int, rows: Tensor, params: GenerationParams, shared: SharedRows | None = None
    ) -> None:
        """See `DecoderBackend.prefill`. Raises `ValueError` for a slot in use or a bad length."""
        check_prefill(self, slot, slot in self._streams, rows, self._config.hidden_size, shared)
        self.kv_cache.begin_stream(slot)
        rows = rows.to(self._device, self._dtype)
        begin = self._prefixes.begin(
            slot, shared, lambda count: self._prefill_rows(slot, rows[:count], 0)
        )
        self._prefill_rows(slot, rows[begin:-1], begin)
        self._seen[slot] = False
        self._streams[slot] = _Stream(
            params=params,
            position=len(rows) - 1,
            frame=0,
            next_row=rows[-1].clone(),
            cached=self.kv_cache.slot(slot),
            draws=Draws(
                params.seed, self._config.vocab_size, self._predictor_config.vocab_size, self._device
            ),
        )

    def _prefill_rows(self, slot: int, rows: Tensor, begin: int) -> None:
        """Rows [p, hidden] through the talker, the first at position `begin`."""
        if not len(rows):
            return
        end = begin + len(rows)
        rope = self._cos[None, begin:end], self._sin[None, begin:end]
        self._layers(rows[None], rope, _attend(self.kv_cache.slot(slot), begin))

    def release(self, slot: int) -> None:
        """See `DecoderBackend.release`. Raises `ValueError` for a slot that is not live."""
        if self._streams.pop(slot, None) is None:
            raise ValueError(f"slot {slot} is not in use")
        self.kv_cache.end_stream(slot)

    def launch(
        self, slots: Sequence[int], text_rows: Tensor, noise: Tensor | None = None
    ) -> LaunchedFrame:
        """See `DecoderBackend.launch`."""
        codes = self.decode_frame(slots, text_rows, noise).codes
        return LaunchedFrame(codes, codes.cpu)

    def decode(self, slots: Sequence[int], text_rows: Tensor, noise: Tensor | None = None) -> Tensor:
        """`launch`, and wait for its codes: int64 [n, 16] on the CPU."""
        return self.launch(slots, text_rows, noise).codes()

    @torch.inference_mode()
    def decode_frame(
        self,
        slots: Sequence[int],
        text_rows: Tensor,
        noise: Tensor | None = None,
        forced_codes: Tensor | None = None,
    ) -> Frame:
        """`decode`, returning everything that the frame computes.

        Args:
            slots, text_rows, noise: see `DecoderBackend.launch`.
            forced_codes: int64 [n, 16], used instead of the drawn codes (teacher forcing).

        Raises:
            ValueError: slots not live, repeated, too many or full.
        """
        check_decode(self, slots, self._streams, text_rows, self._config.hidden_size)
        streams = [self._streams[slot] for slot in slots]
        n = len(streams)
        num_rows = n if self._device.type == "cpu" else self.max_batch
        rows = torch.zeros(num_rows, self._config.hidden_size, dtype=self._dtype, device=self._device)
        rows[:n] = torch.stack([s.next_row for s in streams]) + text_rows.to(rows)
        hidden = self._talker_step(streams, rows)
        talker_logits = self._talker.codec_head(hidden)[:n].float()
        if noise is None:
            noises = _joined([s.draws.of(s.frame) for s in streams])
        else:
            noises = noise[:, 0].to(self._device), noise[:, 1:].to(self._device)
        ids = torch.tensor(slots, device=self._device)
        code0 = self._sample_code0(ids, streams, talker_logits, noises[0])
        forced = None if forced_codes is None else forced_codes.to(self._device)
        if forced is not None:
            code0 = forced[:, 0]
        batch = gather_sampling(
            tuple(s.params.predictor for s in streams), self._predictor_config.vocab_size, self._device
        )
        codes, next_rows, predictor_logits = self._predict(hidden, code0, batch, noises[1], forced)
        self._seen[ids, codes[:, 0]] = True
        for i, stream in enumerate(streams):
            stream.next_row = next_rows[i]
            stream.position += 1
            stream.frame += 1
        return Frame(codes, hidden[:n], talker_logits, predictor_logits)

    def _talker_step(self, streams: list[_Stream], rows: Tensor) -> Tensor:
        """Rows [n or max_batch, hidden] -> normed hidden states of the same shape."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            outputs = [
                _attend(s.cached, s.position)(layer, *(x.narrow(0, i, 1) for x in (q, k, v)))
                for i, s in enumerate(streams)
            ]
            if len(outputs) < len(q):
                outputs.append(torch.zeros_like(q[len(outputs) :]))
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

        spare = [0] * (len(rows) - len(streams))
        positions = torch.tensor([*(s.position for s in streams), *spare], device=self._device)
        rope = self._cos[positions, None], self._sin[positions, None]
        return self._layers(rows[:, None], rope, attend)[:, 0]

    def _sample_code0(
        self, slots: Tensor, streams: list[_Stream], logits: Tensor, noise: Tensor
    ) -> Tensor:
        """Code 0 of each stream, int64 [n], from logits and noise [n, vocabulary]."""
        batch = gather_sampling(tuple(s.params.talker for s in streams), logits.shape[-1], self._device)
        suppress = self._suppress
        if young := [i for i, s in enumerate(streams) if s.frame < s.params.min_frames]:
            suppress = suppress.repeat(len(streams), 1)
            suppress[young, self._config.codec_eos_id] = True
        scores = process_logits(logits, batch, self._seen[slots], suppress)
        return draw(scores, batch.temperature, noise)

    def _predict(
        self,
        hidden: Tensor,
        code0: Tensor,
        batch: SamplingBatch,
        noise: Tensor,
        forced_codes: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the predictor's 15 passes.

        Args:
            hidden: [n or max_batch, hidden].
            code0: int64 [n].
            batch: the n streams' sampling parameters.
            noise: fp32 [n, 15, vocabulary or more].
            forced_codes: see `decode_frame`.

        Returns:
            Codes int64 [n, 16]; the sum of their embeddings [n, hidden]; logits fp32
            [n, 15, vocabulary].
        """
        n, predictor = len(code0), self._talker.code_predictor
        vocab = self._predictor_config.vocab_size
        cached = CachedRows(
            [
                (
                    self._predictor_keys[layer, : len(hidden)],
                    self._predictor_values[layer, : len(hidden)],
                )
                for layer in range(self._predictor_config.num_layers)
            ]
        )
        codes, logits, position = [code0], [], 0
        embedded = [self._embed(0, code0, len(hidden))]
        rows = torch.stack([hidden, embedded[0]], dim=1)
        for rope, head in zip(self._predictor_ropes, predictor.lm_head, strict=True):
            x = predictor.small_to_mtp_projection(rows)
            x = self._predictor_layers(x, rope, _attend(cached, position))
            position += rows.shape[1]
            logits.append(head(x[:, -1])[:n].float())
            if forced_codes is None:
                scores = process_logits(logits[-1], batch)
                codes.append(draw(scores, batch.temperature, noise[:, len(codes) - 1, :vocab]))
            else:
                codes.append(forced_codes[:, len(codes)])
            embedded.append(self._embed(len(codes) - 1, codes[-1], len(hidden)))
            rows = embedded[-1][:, None]
        sums = torch.stack(embedded, dim=1).sum(1)
        return torch.stack(codes, dim=1), sums[:n], torch.stack(logits, dim=1)

    def _embed(self, codebook: int, codes: Tensor, num_rows: int) -> Tensor:
        """Embeddings [num_rows, hidden] of a codebook's codes int64 [n]. Rows after n are padding."""
        codes = F.pad(codes, (0, num_rows - len(codes))) if len(codes) < num_rows else codes
        return self._embeddings[codebook].index_select(0, codes)


def _attend(cached: CachedRows | ScatteredRows, position: int) -> Attend:
    """Attention of rows from `position` on over all rows up to them. Stores their keys and values."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, *cached.extend(layer, position, k, v))

    return attend


def _joined(noises: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The streams' noise, stacked along n."""
    if len(noises) == 1:
        return noises[0]
    talker, predictor = zip(*noises, strict=True)
    return torch.cat(talker), torch.cat(predictor)
