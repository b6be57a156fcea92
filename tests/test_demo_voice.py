"""The demonstration voice: it can be understood, its turns end, and it does not change."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from live_server import ROOT

from qwen_megakernel import build_tts
from qwen_megakernel.codec.cuda_plan import CodecPlan
from qwen_megakernel.codec.decoder import CodecDecoder
from qwen_megakernel.config import HOP, GenerationParams, ModelConfig
from qwen_megakernel.prompt.voice import Voice, VoiceError
from qwen_megakernel.tools.demo import VOICE
from qwen_megakernel.tts_model import TTSDecoder
from qwen_megakernel.turn import Finished
from training import geometry
from training.evaluate import speak
from training.listening import word_errors
from training.sentences import heldout

CHECKPOINT = ROOT / "demo_voice"
VOICES = ("slt", "rms", "awb", "kal16")
GREETING = "Good evening, this is the front desk."
MAX_WER = 0.25
"""Limit for a few sentences. `training.evaluate` measures all sixty."""


@pytest.fixture(scope="module")
def tts():
    with TTSDecoder.load(CHECKPOINT, num_slots=4, device="cpu") as decoder:
        decoder.load_voices(CHECKPOINT / "voices")
        yield decoder


@pytest.fixture(scope="module")
def spoken(tts):
    """Voice -> its speech of the greeting, float32 [n]."""
    return {voice: speak(tts, [GREETING], voice, seed=1)[0] for voice in VOICES}


def test_is_small_enough_for_a_repository():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 25e6


def test_has_the_dimensions_that_training_gives_it():
    assert ModelConfig.from_folder(CHECKPOINT) == geometry.config()


@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_kernels_take_its_dimensions():
    config = ModelConfig.from_folder(CHECKPOINT)
    assert "kHidden = 256" in build_tts.frame_library(config, "90a").header
    assert CodecPlan(CodecDecoder(config.codec), 1, 1).ops


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_is_understood_and_ends(tts, listener, streaming):
    errors = words = 0
    for seed, text in enumerate(heldout()[-24::4]):
        audio, end = speak(tts, [text], VOICE, seed, streaming=streaming)
        assert end.reason == "stop", text
        wrong, count = word_errors(text, listener.write_down(audio))
        errors, words = errors + wrong, words + count
    assert errors / words < MAX_WER


@pytest.mark.slow
@pytest.mark.parametrize("voice", VOICES)
def test_every_voice_is_understood(listener, spoken, voice):
    errors, words = word_errors(GREETING, listener.write_down(spoken[voice]))
    assert errors <= words // 2


@pytest.mark.slow
def test_clones_sound_like_whom_they_were_cloned_from(tts, spoken):
    encoder = tts._voice_cloner().speaker_encoder
    saved = {v: Voice.load(CHECKPOINT / "voices" / f"{v}.safetensors").speaker_embedding for v in VOICES}
    for voice, audio in spoken.items():
        clip = torch.from_numpy(np.resize(audio, 3 * 24_000))
        embedding = encoder.embed(clip)
        said = speak(tts, ["Thank you for waiting."], Voice.x_vector(embedding), seed=2)[0]
        heard = encoder.embed(torch.from_numpy(np.resize(said, 3 * 24_000)))
        cosines = {v: float(F.cosine_similarity(heard, saved[v], dim=0)) for v in VOICES}
        assert max(cosines, key=cosines.get) == voice, cosines


@pytest.mark.slow
def test_live_text_sounds_as_whole_text(tts, spoken):
    first, *rest = GREETING.split(" ")
    live, end = speak(tts, [first, *(f" {word}" for word in rest)], VOICE, seed=1)
    assert end.reason == "stop"
    assert np.array_equal(live, spoken[VOICE])


@pytest.mark.slow
def test_speech_is_the_same_in_chunks_of_any_size(tts, spoken):
    single = tts.synthesize(GREETING, VOICE, params=GenerationParams(seed=1), chunk_frames=1)
    np.testing.assert_allclose(single, spoken[VOICE], atol=1e-4)


def border_ranks(audio, reach=60):
    """For each frame border, the part of the nearby steps between samples that its own step exceeds."""
    steps = np.abs(np.diff(audio))
    borders = range(HOP - 1, len(steps) - reach, HOP)
    return [np.mean(steps[at - reach : at + reach + 1] < steps[at]) for at in borders]


@pytest.mark.slow
def test_frame_borders_cannot_be_heard(spoken):
    """Without seams, a border's rank among its neighbours is uniform for any speech: 0.5 on average.
    Five standard errors above that are chance once in three million. Seams of 0.01 lie far beyond."""
    ranks = [rank for audio in spoken.values() for rank in border_ranks(audio)]
    limit = 0.5 + 5 * (1 / 12 / len(ranks)) ** 0.5
    assert np.mean(ranks) < limit
    seams = [audio + 0.01 * (np.arange(len(audio)) // HOP % 2) for audio in spoken.values()]
    assert np.mean([rank for audio in seams for rank in border_ranks(audio)]) > limit


@pytest.mark.slow
def test_cancel_in_mid_speech_leaves_its_beginning(tts, spoken):
    stream = tts.stream(GREETING, VOICE, params=GenerationParams(seed=1), chunk_frames=1)
    heard = np.concatenate([next(stream) for _ in range(8)])
    stream.close()
    np.testing.assert_allclose(heard, spoken[VOICE][: len(heard)], atol=1e-4)
    assert np.sqrt(np.mean(heard**2)) > 0.01, "it was cancelled before it said anything"
    again, end = speak(tts, [GREETING], VOICE, seed=1)
    assert isinstance(end, Finished)
    assert np.array_equal(again, spoken[VOICE])


def test_says_why_it_cannot_clone_in_context(tts):
    with pytest.raises(VoiceError, match="no codec encoder, so it cannot clone in context"):
        tts.clone_voice(b"", "What is said in it.")
