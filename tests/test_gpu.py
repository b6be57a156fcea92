"""Whole turns on a CUDA GPU: PyTorch against itself on the CPU, the kernels against themselves.

It runs without the other tests' fixtures: `python -m pytest --noconftest tests/test_gpu.py`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from listener import LONG, TEXT, Listener, speak
from prompt_text import give_text

from qwen_megakernel import GenerationParams, SamplingParams, TTSDecoder
from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.codec.cuda_stream import CudaCodecStream
from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream
from qwen_megakernel.config import HOP, Guards
from qwen_megakernel.decoding.kernel_backend import MegakernelBackend
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.synth.checkpoint import write_checkpoint
from qwen_megakernel.turn import Audio

pytestmark = pytest.mark.gpu

DEMO = Path(__file__).parents[1] / "demo_voice"
GREEDY = SamplingParams(0.0, 0, 1.0, 1.05)
PARAMS = GenerationParams(seed=7, min_frames=40, max_frames=40, guards=Guards(repeat_frames=0))


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(folder, shape="tiny", mode="base")
    return folder


@pytest.fixture(scope="module")
def on_gpu(tiny_base):
    with TTSDecoder.load(tiny_base, device="cuda", dtype="fp32") as tts:
        yield tts


@pytest.fixture(scope="module")
def kernels(tiny_base):
    with TTSDecoder.load(tiny_base, num_slots=16, max_positions=512) as tts:
        yield tts


# ---------------------------------------------------------------------------- PyTorch


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
    with TTSDecoder.load(tiny_base, backend="torch", device="cuda", dtype=dtype) as tts:
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


# ---------------------------------------------------------------------------- the kernels


def test_auto_takes_the_kernels(kernels):
    assert kernels.description["backend"] == "megakernel"
    assert kernels.description["codec"] == "kernels"
    assert "note" not in kernels.description
    assert isinstance(kernels._engine._backend, MegakernelBackend)
    assert isinstance(kernels._engine._codec, CudaCodecStream)


def test_the_demonstration_voice_is_spoken_by_the_kernels():
    """Its predictor has one layer, which no other checkpoint of the tests has."""
    voice = Voice.load(DEMO / "voices" / "slt.safetensors")
    with TTSDecoder.load(DEMO, num_slots=16, max_positions=512) as tts:
        assert tts.description["backend"] == "megakernel", tts.description
        listeners = [Listener() for _ in range(12)]
        for listener in listeners:
            tts.open_turn(TEXT, sink=listener, ended=True, voice=voice, params=PARAMS)
        assert {listener.wait().reason for listener in listeners} == {"length"}
        alone = Listener()
        tts.open_turn(TEXT, sink=alone, ended=True, voice=voice, params=PARAMS)
        alone.wait()
    for listener in listeners:
        np.testing.assert_array_equal(listener.samples, alone.samples)


def test_a_turn_is_what_kernel_and_codec_give_step_by_step(kernels):
    """The engine's frames in flight against a loop that waits for everything."""
    spoken = speak(kernels, params=PARAMS)
    assert spoken.events[-1].num_frames == 40
    prompt = kernels._prompts.open(kernels._find_voice(None))
    give_text(kernels._prompts, prompt, TEXT)
    backend, codec, slot = kernels._engine._backend, kernels._engine._codec, 15
    codec.reset(slot)
    backend.prefill(slot, prompt.rows(), PARAMS)
    row, samples = torch.zeros_like(kernels._prompts.pad_row), []
    for _ in range(40):
        codes = backend.decode([slot], row[None])
        samples.append(codec.launch([slot], codes).samples()[0])
        row = prompt.next_text_row()
        prompt.advance()
    backend.release(slot)
    assert np.array_equal(spoken.samples, np.concatenate(samples))
    assert spoken.samples.std() > 1e-3


def test_a_turn_is_the_same_in_changing_company(kernels):
    alone = speak(kernels, params=PARAMS).samples
    listeners = [Listener() for _ in range(24)]  # more than slots, and than streams of a frame
    for i, listener in enumerate(listeners):
        same = i % 5 == 0
        params = PARAMS if same else GenerationParams(seed=i, max_frames=5 + 3 * i)
        kernels.open_turn(TEXT, sink=listener, ended=True, params=params, chunk_frames=1 + i % 4)
    for listener in listeners:
        assert listener.wait().reason != "error"
    for listener in listeners[::5]:
        assert np.array_equal(listener.samples, alone)
    assert not np.array_equal(listeners[1].samples, alone[: len(listeners[1].samples)])


def test_a_cancel_leaves_nothing_behind(kernels):
    expected = speak(kernels, params=PARAMS).samples
    for _ in range(20):
        listener = Listener()
        turn = kernels.open_turn(TEXT, sink=listener, ended=True, params=LONG)
        listener.wait_for_audio()
        turn.cancel()
        assert listener.wait(5).reason == "cancelled"
        assert np.array_equal(speak(kernels, params=PARAMS).samples, expected)


def test_sound_comes_frame_by_frame(kernels):
    listener = speak(kernels, params=PARAMS)
    sizes = [len(e.samples) // HOP for e in listener.events if isinstance(e, Audio)]
    assert sizes[:4] == [1, 1, 2, 4]
    assert np.abs(listener.samples).max() <= 1.0


HANG = """
import sys, time
from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.turn import Finished, RequestError
tts = TTSDecoder.load(sys.argv[1], num_slots=2, max_positions=256)
tts.synthesize("Hello there.", params=GenerationParams(max_frames=20))  # noise would be cut off
tts._engine._backend._kernel.withhold(1)
said = []
tts.open_turn("Hello there.", sink=said.append, ended=True)
while not any(isinstance(event, Finished) for event in said):
    time.sleep(0.01)
print(said[-1].reason, "|", said[-1].error, "|", type(tts.error).__name__, "|", tts.error)
try:
    tts.open_turn("Hello.", sink=said.append, ended=True)
except RequestError as error:
    print(error)
"""


def test_a_hang_ends_the_engine_and_names_frame_and_phase(tiny_base):
    """In a process of its own, because nothing can run on the GPU in that process afterwards."""
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", HANG, str(tiny_base)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    first, second = result.stdout.splitlines()
    assert first.startswith(
        "error | the decoder has failed; the process must be restarted | KernelError"
    )
    assert "frame 0 hung: CTA" in first
    assert "waited for" in first
    assert "must be restarted" in second
