"""The trainer and the package agree on prompts, codes and the codec's layers."""

import random
import re

import numpy as np
import pytest
import torch
from prompt_text import give_text

from qwen_megakernel.codec.decoder import CodecDecoder, CodecStream
from qwen_megakernel.prompt.builder import PromptBuilder
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.synth.tokenizer import write_tokenizer
from training import batches, corpus, geometry, ordinary
from training.codec_model import TrainedCodec, decode_latents
from training.listening import word_errors
from training.rows import Layout, Utterance
from training.sentences import heldout, key
from training.train_talker import input_rows, new_talker

TEXT = "Good morning, how are you?"


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tiny=True)
    config = geometry.config()
    return PromptBuilder(new_talker(config), config, load_tokenizer(folder))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("language", ["auto", "english"])
@torch.no_grad()
def test_talker_is_trained_on_the_prompts_that_are_spoken(builder, streaming, language):
    config, talker = geometry.config(), builder._talker
    tokens = np.array(builder.tokenizer.encode(TEXT))
    frames = np.random.default_rng(0).integers(0, geometry.CODEBOOK_SIZE, (len(tokens) + 4, 16))
    speaker = torch.randn(config.talker.hidden_size)

    prompt = builder.open(Voice.x_vector(speaker), language, streaming=streaming)
    give_text(builder, prompt, TEXT)
    spoken = list(prompt.rows())
    for codes in torch.from_numpy(frames):
        spoken.append(talker.code_rows(codes[None])[0] + prompt.next_text_row())
        prompt.advance()

    layout = Layout(config, [config.im_start_id, *builder.tokenizer.encode("assistant\n")])
    rows = layout.rows(Utterance(tokens, frames, 0), streaming=streaming, language=language)
    batch = {
        "text": torch.from_numpy(rows.text)[None],
        "control": torch.from_numpy(rows.control)[None],
        "codes": torch.from_numpy(rows.codes)[None],
        "speaker": torch.tensor([rows.speaker]),
    }
    trained = input_rows(talker, batch, speaker[None])[0]
    torch.testing.assert_close(trained, torch.stack(spoken), rtol=1e-5, atol=1e-5)
    assert rows.first == len(spoken) - len(frames) - 1


def _random_codec():
    torch.manual_seed(0)
    codec = TrainedCodec(geometry.config().codec).train()
    with torch.no_grad():  # codebooks follow the data
        codec.quantizer(codec.encoder(torch.randn(2, 40 * 1920) * 0.1))
    codec.eval().publish()
    return codec


@torch.no_grad()
def test_decoder_makes_of_codes_what_training_made_of_latents():
    codec = _random_codec()
    latents = codec.encoder(torch.randn(1, 12 * 1920) * 0.1)
    x, codes, _ = codec.quantizer(latents)
    trained = decode_latents(codec.decoder, x).clamp(-1, 1)
    spoken = CodecStream(codec.decoder, 1).decode([0], codes)
    torch.testing.assert_close(trained, spoken, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_context_makes_a_window_sound_as_in_its_stream():
    decoder = CodecDecoder(geometry.config().codec)
    x = torch.randn(1, 12, geometry.config().codec.codebook_dim)
    settled = slice(480, None)  # the fast layers have no context, so their first 20 ms are wrong
    whole = decode_latents(decoder, x)[:, 8 * 1920 :][:, settled]
    window = torch.arange(4, 12)
    with_context = decode_latents(decoder, x, window, context=4)[:, settled]
    without = decode_latents(decoder, x, window[4:])[:, settled]
    assert (with_context - whole).abs().max() < 0.02 * (without - whole).abs().max()


def test_codes_are_read_as_they_come(tmp_path):
    codes = {i: torch.full((4 + i, 16), i, dtype=torch.uint8) for i in (5, 1, 3, 9)}
    reader = corpus.Codes(tmp_path)
    assert reader.take() == {}
    corpus.write_codes(tmp_path, {i: codes[i] for i in (5, 1)})
    corpus.write_codes(tmp_path, {i: codes[i] for i in (3,)})
    found = reader.take()
    assert sorted(found) == [1, 3, 5]
    corpus.write_codes(tmp_path, {i: codes[i] for i in (9,)})
    fresh = reader.take()
    assert list(fresh) == [9]
    found |= fresh
    assert all(np.array_equal(found[i], codes[i].numpy()) for i in codes)


def test_material_grows_by_what_has_come():
    config = geometry.config()
    one = Utterance(np.array([1, 2]), np.zeros((3, 16), np.uint8), 0)
    coming = [[[one], [one]], []]
    layout = Layout(config, [config.im_start_id])
    material = batches.Material(layout, [[one], [one]], 0, lambda: coming.pop(0))
    material.grow()
    material.grow()
    assert [len(reading) for reading in material.readings] == [2, 2]


def test_an_encoder_can_learn_to_speak_to_an_exported_decoder():
    codec, other = _random_codec(), TrainedCodec(geometry.config().codec)
    other.decoder.load_state_dict(codec.decoder.state_dict())
    other.adopt()
    for mine, its in zip(other.quantizer.books, codec.quantizer.books, strict=True):
        torch.testing.assert_close(mine.rows(), its.rows())
    for name, weight in codec.quantizer.named_parameters():
        assert torch.equal(other.quantizer.get_parameter(name), weight)


@pytest.mark.skipif(not ordinary.WORDNET.is_dir(), reason="needs wordnet-base")
def test_ordinary_sentences_are_inflected():
    words = ordinary.words()
    rng = random.Random(0)
    assert [words.plural(noun) for noun in ("box", "lady", "man", "dog")] == [
        "boxes",
        "ladies",
        "men",
        "dogs",
    ]
    assert [words.past(verb, rng) for verb in ("hail", "sell", "carry", "pat")] == [
        "hailed",
        "sold",
        "carried",
        "patted",
    ]
    assert [words.gerund(verb) for verb in ("take", "see", "run")] == ["taking", "seeing", "running"]
    for text in ordinary.sentences(200, rng):
        assert re.fullmatch(r"[A-Z][A-Za-z ,.'!?-]+[.?!]", text), text


def test_words_are_compared_as_they_sound():
    assert word_errors("It's a three-fold test.", "its a three fold test") == (0, 5)
    assert word_errors("One two three.", "one three four") == (2, 3)
    assert word_errors("One two.", "") == (2, 2)


def test_heldout_sentences_are_sixty_different_ones():
    assert len({key(text) for text in heldout()}) == 60
