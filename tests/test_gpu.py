"""The torch path on a CUDA GPU against itself on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_megakernel import GenerationParams, SamplingParams, TTSDecoder
from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.codec import CodecDecoder, CodecStream

pytestmark = pytest.mark.gpu

TEXT = "Hello there, how are you doing today? It is fine weather."
GREEDY = SamplingParams(0.0, 0, 1.0, 1.05)


@pytest.fixture(scope="module")
def on_gpu(tiny_base):
    with TTSDecoder.load(tiny_base, device="cuda", dtype="fp32") as tts:
        yield tts


def test_fp32_speech_equals_the_cpu_s(on_gpu, tiny_base):
    params = GenerationParams(talker=GREEDY, predictor=GREEDY, max_frames=24)
    with TTSDecoder.load(tiny_base, device="cpu", dtype="fp32") as on_cpu:
        expected = on_cpu.synthesize(TEXT, params=params)
    np.testing.assert_allclose(on_gpu.synthesize(TEXT, params=params), expected, atol=1e-3)


def test_draws_equal_the_cpu_s(on_gpu, tiny_base):
    params = GenerationParams(seed=7, max_frames=24)
    with TTSDecoder.load(tiny_base, device="cpu", dtype="fp32") as on_cpu:
        expected = on_cpu.synthesize(TEXT, params=params)
    np.testing.assert_allclose(on_gpu.synthesize(TEXT, params=params), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_codes_do_not_depend_on_company(tiny_base, dtype):
    with TTSDecoder.load(tiny_base, device="cuda", dtype=dtype) as tts:
        backend = tts._engine._backend
        rows = torch.randn(10, tts.config.talker.hidden_size)
        zeros = torch.zeros(8, tts.config.talker.hidden_size)
        for slot, seed in enumerate([5, 1, 2, 3, 4, 6, 7, 5]):
            backend.prefill(slot, rows, GenerationParams(seed=seed))
        together = torch.stack([backend.decode(range(8), zeros) for _ in range(24)])
        backend.release(0)
        backend.prefill(0, rows, GenerationParams(seed=5))
        alone = torch.stack([backend.decode([0], zeros[:1])[0] for _ in range(24)])
        assert torch.equal(together[:, 0], alone)
        assert torch.equal(together[:, 7], alone)
        assert not torch.equal(together[:, 1], alone)


def test_codec_equals_the_cpu_s_in_any_split(tiny_base, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    checkpoint = Checkpoint(tiny_base)
    codes = torch.randint(0, 2048, (2, 30, 16), generator=torch.Generator().manual_seed(0))
    sound = {}
    for device in ("cpu", "cuda"):
        with torch.device("meta"):
            decoder = CodecDecoder(checkpoint.config.codec)
        checkpoint.load("decoder.", decoder, dtype=torch.float32, device=device)
        stream = CodecStream(decoder, 4)
        parts = [stream.decode([3, 1], part) for part in codes.split([1, 2, 7, 20], dim=1)]
        sound[device] = torch.cat([part.cpu() for part in parts], dim=1)
    torch.testing.assert_close(sound["cuda"], sound["cpu"], rtol=0, atol=1e-4)
