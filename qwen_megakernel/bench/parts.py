"""The bench's second part: the time of a frame's decode and of its codec, each measured alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.codec.decoder import CodecDecoder
from qwen_megakernel.codec.interface import FrameCodec
from qwen_megakernel.config import GenerationParams
from qwen_megakernel.decoding.interface import DecoderBackend
from qwen_megakernel.engine.backends import Backends
from qwen_megakernel.model.talker import Talker

PROMPT_ROWS = 64
WARM_UP = 3
PREFILL_ROWS = (32, 128)

Report = Callable[[str], None]


def run(
    checkpoint: Checkpoint,
    backend: str,
    device: torch.device,
    *,
    streams: Sequence[int],
    frames: int,
    report: Report,
) -> dict[str, Any]:
    """Medians in milliseconds on the host's clock, as one entry of the bench's JSON.

    Args:
        checkpoint: opened.
        backend: as `TTSDecoder.load` takes it.
        device: where it runs, in bf16 on a GPU and in fp32 on a CPU.
        streams: how many decode together.
        frames: timed for each figure.
        report: told what is being done.

    Raises:
        CheckpointError: the backend cannot run here.
    """
    config = checkpoint.config
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backends = Backends(backend, config, device, dtype, report)
    with torch.device("meta"):
        talker, codec = Talker(config.talker, config.predictor), CodecDecoder(config.codec)
    checkpoint.load("talker.", talker, dtype=dtype, device=device)
    checkpoint.load("decoder.", codec, dtype=dtype, device=device)
    slots = max(streams)
    most = max(PROMPT_ROWS, *PREFILL_ROWS) + frames + WARM_UP + 1
    decoder = backends.make_decoder(talker, num_slots=slots, max_positions=most)
    sound = backends.make_codec(codec, slots, slots)
    rows = torch.randn(max(PREFILL_ROWS), config.talker.hidden_size).to(device, dtype)
    return {
        "backend": backend,
        "runs": backends.description,
        "prefill_ms": {str(n): _prefill_ms(decoder, rows[:n], device) for n in PREFILL_ROWS},
        "streams": {str(n): _frame_ms(decoder, sound, rows, n, frames) for n in streams},
    }


def _prefill_ms(decoder: DecoderBackend, rows: torch.Tensor, device: torch.device) -> float:
    """Time the prefill of prompt rows [p, hidden] into an empty slot."""

    def prefill() -> None:
        decoder.prefill(0, rows, GenerationParams())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        decoder.release(0)

    return _median_ms(prefill, 10)


def _frame_ms(
    decoder: DecoderBackend, sound: FrameCodec, rows: torch.Tensor, streams: int, frames: int
) -> dict[str, float]:
    """Time a frame until its codes are in host memory, and until its samples are in host memory."""
    slots = range(streams)
    for slot in slots:
        sound.reset(slot)
        decoder.prefill(slot, rows[:PROMPT_ROWS], GenerationParams(seed=slot))
    text = torch.zeros(streams, rows.shape[1]).to(rows)
    codes = decoder.launch(slots, text).codes()
    figures = {
        "decode_ms": _median_ms(lambda: decoder.launch(slots, text).codes(), frames),
        "codec_ms": _median_ms(lambda: sound.launch(slots, codes).samples(), frames),
    }
    for slot in slots:
        decoder.release(slot)
    return figures


def _median_ms(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[WARM_UP:]))
