"""Options of the model over the native protocol, the times of words, and Opus."""

import asyncio
import io

import av
import numpy as np
import pytest
from native_client import LONG_TEXT, SENTENCES, WILD, NativeClient, take
from session_stage import Stage

from qwen_megakernel.config import SamplingParams
from qwen_megakernel.serving import audio_encoding, native
from qwen_megakernel.serving.native import NativeDialect
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    AudioFormat,
    End,
    Error,
    Flush,
    Hello,
    Segment,
    Speak,
    encode,
    parse_client_message,
    parse_server_message,
)
from qwen_megakernel.serving.wire import ProtocolError


def spoken_with(*messages):
    """Turns that a client's messages open, after `hello`."""

    async def script():
        stage = Stage()
        dialect = NativeDialect(stage.session)
        for message in (Hello(), *messages):
            dialect.receive(encode(message))
        for turn in stage.turns:  # grows meanwhile
            turn.finish()
            await asyncio.sleep(0)
        return [turn.options for turn in stage.turns]

    return asyncio.run(script())


def test_every_choice_reaches_its_turn_and_the_next_segment():
    first = Speak(
        "a", "One.", temperature=0.5, top_k=7, top_p=0.8, repetition_penalty=1.2,
        predictor_temperature=0.4, predictor_top_k=9, min_frames=3, max_frames=40, streaming=False,
    )  # fmt: skip
    one, two = spoken_with(first, Flush("a"), Speak("a", "Two.", top_p=1.0, streaming=True), End("a"))
    assert one["params"].talker == SamplingParams(0.5, 7, 0.8, 1.2)
    assert one["params"].predictor == SamplingParams(0.4, 9)
    assert (one["params"].min_frames, one["params"].max_frames, one["streaming"]) == (3, 40, False)
    assert two["params"].talker == SamplingParams(0.5, 7, 1.0, 1.2)
    assert (two["params"].predictor, two["streaming"]) == (one["params"].predictor, True)


def test_without_a_choice_the_server_decides():
    (options,) = spoken_with(Speak("a", "One."), End("a"))
    assert options["params"].talker == SamplingParams(0.4, 12, 1.0, 1.05)  # of the fake decoder
    assert options["streaming"] is None
    assert options["params"].max_frames is None


@pytest.mark.parametrize(
    "choice",
    [
        {"top_p": 0}, {"top_p": 1.1}, {"top_p": True}, {"repetition_penalty": 0},
        {"predictor_temperature": 11}, {"predictor_top_k": 0.5}, {"min_frames": -1},
        {"max_frames": 0}, {"max_frames": 1 << 21}, {"streaming": 1}, {"streaming": "yes"},
    ],
)  # fmt: skip
def test_choices_out_of_range_are_refused_by_name(choice):
    (name,) = choice
    with pytest.raises(ProtocolError, match=name) as refused:
        parse_client_message(encode(Speak("a", "One.", **choice)))
    assert refused.value.code == "bad_request"


def test_a_segment_says_when_its_words_are_heard(live_server):
    with NativeClient(live_server) as client:
        client.speak("a", "One ", seed=3)
        client.speak("a", "two three. ")
        client.send(Flush("a"))
        client.speak("a", "Four, five!")
        client.send(End("a"))
        first, second = client.hear("a").of(Segment)
    for segment, words in ((first, ["One", "two", "three."]), (second, ["Four,", "five!"])):
        assert [word.text for word in segment.estimated_words] == words
        end_s = segment.start_s + segment.duration_s
        for word in segment.estimated_words:
            assert segment.start_s - 1e-3 <= word.start_s < word.end_s <= end_s + 1e-3
        starts = [word.start_s for word in segment.estimated_words]
        assert starts == sorted(set(starts))


def test_a_segment_that_ended_early_keeps_the_words_of_the_next_apart():
    async def script():
        stage = Stage()
        dialect = NativeDialect(stage.session)
        for message in (Hello(), Speak("a", "One two ")):
            dialect.receive(encode(message))
        stage.turns[0].speak(24_000)
        stage.turns[0].finish()
        await asyncio.sleep(0)
        heard = [one for event in await stage.events() if not hasattr(event, "message")
                 for one in dialect.translate(event)]  # fmt: skip
        for message in (Speak("a", "three."), Flush("a"), Speak("a", "Four."), End("a")):
            dialect.receive(encode(message))
        stage.turns[1].speak(24_000)
        stage.turns[1].finish()
        await asyncio.sleep(0)
        heard += [one for event in await stage.events() for one in dialect.translate(event)]
        messages = map(parse_server_message, heard)
        return [message.estimated_words for message in messages if isinstance(message, Segment)]

    words = asyncio.run(script())
    assert [[word.text for word in segment] for segment in words] == [["One", "two"], ["Four."]]


def test_the_longest_is_kept(live_server):
    with NativeClient(live_server) as client:
        client.speak("a", LONG_TEXT, **WILD | {"max_frames": 5})
        client.send(End("a"))
        assert client.hear("a").done.finish_reason == "length"
        assert client.heard["a"].done.samples == 5 * 1920


def test_the_shortest_is_kept(live_server):
    short = len(take(live_server, SENTENCES[0], seed=3))
    frames = short // 1920 + 10
    assert len(take(live_server, SENTENCES[0], seed=3, min_frames=frames)) >= frames * 1920


def test_opus_is_one_file_of_the_same_length(live_server):
    plain = take(live_server, SENTENCES[0], seed=3)
    with NativeClient(live_server, "opus") as client:
        assert client.ready.encodings == ("pcm_s16le", "pcm_f32le", "pcm_mulaw", "pcm_alaw", "opus")
        for name in ("a", "b"):
            client.speak(name, SENTENCES[0], seed=3)
            client.send(End(name))
        heard = [client.hear(name) for name in ("a", "b")]
    for one in heard:
        assert one.done.samples == len(plain)
        assert len(one.audio) < len(plain) * 2 / 4
        with av.open(io.BytesIO(one.audio)) as file:
            assert file.streams.audio[0].codec_context.name in ("opus", "libopus")
            seconds = sum(frame.samples / frame.sample_rate for frame in file.decode(audio=0))
        assert abs(seconds - len(plain) / 24_000) < 0.05


def test_opus_is_heard_before_its_end_and_nothing_follows_a_cancel(live_server):
    with NativeClient(live_server, "opus") as client:
        client.speak("a", LONG_TEXT, **WILD)
        client.wait_for(AudioChunk, "a")
        client.wait_for(AudioChunk, "a")
        client.send(native.Cancel("a"))
        assert client.hear("a").done.finish_reason == "cancelled"
        client.speak("b", SENTENCES[0])
        client.send(End("b"))
        assert client.hear("b").done.samples  # `_keep` fails on audio of `a` after its `done`


def test_opus_has_one_rate_and_needs_pyav(monkeypatch):
    with pytest.raises(ProtocolError, match="24000") as refused:
        parse_client_message(encode(Hello(audio=AudioFormat("opus", 48_000))))
    assert refused.value.code == "unsupported_protocol"

    async def script():
        stage = Stage()
        NativeDialect(stage.session).receive(encode(Hello(audio=AudioFormat("opus"))))
        return parse_server_message((await stage.events())[0].message)

    monkeypatch.setattr(audio_encoding, "pyav_is_installed", lambda: False)
    answer = asyncio.run(script())
    assert isinstance(answer, Error)
    assert answer.code == "unsupported_protocol"
    assert "PyAV" in answer.message


def test_telephones_are_spoken_to(live_server):
    plain = take(live_server, SENTENCES[0], seed=3)
    with NativeClient(live_server, "pcm_mulaw", 8000) as client:
        client.speak("a", SENTENCES[0], seed=3)
        client.send(End("a"))
        assert len(client.hear("a").audio) == len(plain) // 3
        assert np.frombuffer(client.heard["a"].audio, np.uint8).std() > 1
