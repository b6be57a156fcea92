"""The native protocol as its clients meet it: a server process, sockets, no mocks."""

import json
import time

import numpy as np
import pytest
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import collect, send
from native_client import LONG_TEXT, SENTENCES, WILD, NativeClient, assert_healthy, take
from slow_cases import slow_after
from websockets.exceptions import ConnectionClosed

from qwen_megakernel.serving.native_messages import (
    ENCODINGS,
    SAMPLE_RATES,
    AudioChunk,
    Cancel,
    Done,
    End,
    Error,
    Flush,
    Progress,
    Segment,
    Started,
)
from qwen_megakernel.serving.pcm import PcmEncoder


def error_of(client, limit_s=60):
    """The next message, which must be an error."""
    message = client.receive(limit_s)
    assert isinstance(message, Error), message
    return message


# --- the first message ------------------------------------------------------------------------------


def test_hello_is_answered_with_all_there_is_to_choose(live_server):
    with NativeClient(live_server, "pcm_f32le", 16_000) as client:
        ready = client.ready
    assert (ready.protocol, ready.encoding, ready.sample_rate) == (1, "pcm_f32le", 16_000)
    assert ready.encodings == tuple(ENCODINGS)
    assert ready.sample_rates == SAMPLE_RATES
    assert (ready.voices, ready.default_voice) == (("default",), "default")
    assert {"auto", "english"} <= set(ready.languages)
    assert (ready.limits.max_text_chars, ready.limits.max_contexts) == (4096, 8)
    assert ready.limits.max_message_bytes == 65_536
    assert (ready.sampling.temperature, ready.sampling.top_k) == (0.3, 15)


@pytest.mark.parametrize("first", ["nonsense", '{"text": ""}', "[]", b"\0"])
def test_first_message_without_a_type_means_the_original(live_server, first):
    with live_server.connect() as client:
        client.send(first)
        assert set(collect(client)[1]) == {"error", "code"}
        client.send('{"type": "hello", "protocol": 1}')
        assert set(collect(client)[1]) == {"error", "code"}
        send(client, text="Hi.", type="ignored here")
        assert collect(client)[1]["done"] is True


@pytest.mark.parametrize("first", ['{"type": 7}', '{"type": "speak", "context_id": "a", "text": "Hi."}'])
def test_first_message_with_a_type_means_native_and_hello_comes_first(live_server, first):
    with live_server.connect() as client:
        client.send(first)
        assert json.loads(client.recv())["code"] == "bad_request"
        send(client, text="Hi.")
        assert json.loads(client.recv())["type"] == "error"
        client.send('{"type": "hello", "protocol": 1}')
        assert json.loads(client.recv())["type"] == "ready"
        client.send('{"type": "hello", "protocol": 1}')
        assert json.loads(client.recv())["code"] == "bad_request"


@pytest.mark.parametrize(
    "hello", [{"protocol": 2, "new": 1}, {"protocol": 1, "audio": {"encoding": "speex"}}]
)
def test_what_cannot_be_spoken_is_said_and_closed(live_server, hello):
    with live_server.connect() as client:
        send(client, type="hello", **hello)
        assert json.loads(client.recv())["code"] == "unsupported_protocol"
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=60)
        assert closed.value.rcvd.code == 1002


# --- contexts and segments --------------------------------------------------------------------------


def test_a_context(live_server):
    with NativeClient(live_server) as client:
        client.speak("a", SENTENCES[0], voice="default", language="en", seed=1)
        client.send(End("a"))
        heard = client.hear("a")
    kinds = [type(message) for message in heard.messages]
    assert kinds[0] is Started
    assert kinds[-2:] == [Segment, Done]
    assert set(kinds[1:-2]) == {AudioChunk}
    done = heard.done
    assert done.samples % 1920 == 0
    assert done.samples > 0
    assert done.ttfc_ms > 0
    assert done.rtf == pytest.approx(done.generation_s / done.duration_s, rel=0.05)
    assert done.finish_reason in ("stop", "length", "repeat", "silence")


def test_contexts_are_spoken_in_the_order_of_their_opening(live_server):
    expected = [take(live_server, text, seed=seed) for seed, text in enumerate(SENTENCES)]
    with NativeClient(live_server, "pcm_f32le") as client:
        for seed, text in enumerate(SENTENCES):
            client.speak(f"c{seed}", text[:4], seed=seed)
        for seed, text in reversed(list(enumerate(SENTENCES))):  # in reverse order
            client.speak(f"c{seed}", text[4:])
            client.send(End(f"c{seed}"))
        heard = [client.hear(f"c{seed}") for seed in range(3)]
        assert client.order == ["c0", "c1", "c2"]
        for one, other in zip(heard, expected, strict=True):
            np.testing.assert_allclose(client.array(one), other, atol=1e-4)


def test_text_token_by_token_is_the_whole_text(live_server):
    text = "  The quick brown fox, says she, isn't naïve: 3.14 is less than 4!  "
    whole = take(live_server, text, seed=5)
    with NativeClient(live_server, "pcm_f32le") as client:
        for start in range(0, len(text), 3):
            client.speak("a", text[start : start + 3], seed=5)
            time.sleep(0.01)
        client.send(End("a"))
        np.testing.assert_allclose(client.array(client.hear("a")), whole, atol=1e-4)


def test_segments_are_takes_of_their_own_and_add_up(live_server):
    singly = [take(live_server, text, seed=7 + i) for i, text in enumerate(SENTENCES)]
    with NativeClient(live_server, "pcm_f32le") as client:
        client.send(Flush("a"))
        assert error_of(client).code == "unknown_context"
        client.speak("a", " ", seed=7)
        client.send(Flush("a"))  # nothing to say: nothing happens
        for text in SENTENCES:
            client.speak("a", f"{text} ")
            client.send(Flush("a"))
            client.send(Flush("a"))
            client.speak("a", " \n ")
        client.send(End("a"))
        heard = client.hear("a")
    np.testing.assert_allclose(client.array(heard), np.concatenate(singly), atol=1e-4)
    segments = heard.of(Segment)
    assert [s.duration_s for s in segments] == [round(len(one) / 24_000, 4) for one in singly]


def test_a_choice_holds_until_another_is_made(live_server):
    with NativeClient(live_server, "pcm_f32le") as client:
        client.speak("a", SENTENCES[0], seed=3, temperature=0.0, top_k=0, language="de", chunk_frames=1)
        client.send(Flush("a"))
        client.speak("a", SENTENCES[1])
        client.send(Flush("a"))
        client.speak("a", SENTENCES[2], seed=90, language="fr")
        client.send(End("a"))
        heard = client.hear("a")
    kept = {"temperature": 0.0, "top_k": 0}
    singly = [
        take(live_server, SENTENCES[0], seed=3, language="german", **kept),
        take(live_server, SENTENCES[1], seed=4, language="german", **kept),
        take(live_server, SENTENCES[2], seed=92, language="french", **kept),
    ]
    np.testing.assert_allclose(client.array(heard), np.concatenate(singly), atol=1e-4)
    assert {len(chunk) for chunk in heard.samples} == {1920 * 4}


def test_nothing_to_say_is_done_at_once(live_server):
    with NativeClient(live_server) as client:
        client.speak("a", " \n")
        client.speak("a", "")
        client.send(End("a"))
        heard = client.hear("a")
    assert [type(message) for message in heard.messages] == [Done]
    assert (heard.done.finish_reason, heard.done.samples, heard.done.ttfc_ms) == ("stop", 0, None)


def test_a_queued_context_is_not_older_than_its_turn(live_server):
    with NativeClient(live_server) as client:
        client.speak("a", LONG_TEXT, **WILD)
        client.speak("b", SENTENCES[0], seed=1)
        client.send(End("b"))
        client.wait_for(Started, "a")
        time.sleep(0.5)
        cancelled_at = time.monotonic()
        client.send(Cancel("a"))
        ttfc_ms = client.hear("b").done.ttfc_ms
        assert ttfc_ms <= 1000 * (time.monotonic() - cancelled_at)


# --- silence ----------------------------------------------------------------------------------------


def test_progress_is_told_once_a_second_and_late_text_goes_on(live_server):
    whole = take(live_server, "Hello there, I am still thinking.", seed=2)
    with NativeClient(live_server, "pcm_f32le") as client:
        start = time.monotonic()
        client.speak("a", "Hello ", seed=2)
        client.speak("b", "Queued.")
        told = [client.wait_for(Progress, each, 120) for each in ("a", "b", "a")]
        assert time.monotonic() - start > 1.8
        assert [(p.state, p.queued) for p in told] == [
            ("waiting_for_text", 0),
            ("queued", 1),
            ("waiting_for_text", 0),
        ]
        take(live_server, SENTENCES[0])  # nobody else waits
        client.speak("a", "there, I am still thinking.")
        client.send(End("a"))
        np.testing.assert_allclose(client.array(client.hear("a")), whole, atol=1e-4)
        while (state := client.wait_for(Progress, "b", 120).state) == "queued":
            pass  # told while "a" spoke
        assert state == "waiting_for_text"


# --- formats ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(live_server):
    """The two segments of the next test at 24 kHz, each from a context of its own."""
    texts = enumerate(SENTENCES[1:])
    return [take(live_server, text, seed=11 + i, temperature=0.9) for i, text in texts]


@pytest.mark.parametrize("rate", slow_after(2, SAMPLE_RATES))
@pytest.mark.parametrize("encoding", slow_after(1, ["pcm_s16le", "pcm_f32le"]))
def test_formats_are_the_resampled_whole(live_server, whole, encoding, rate):
    """Each sample is that of the resampled whole segment: no click between messages, and no drift."""
    expected = np.concatenate([soxr.resample(one, 24_000, rate, quality="HQ") for one in whole])
    with NativeClient(live_server, encoding, rate) as client:
        client.speak("a", SENTENCES[1], seed=11, temperature=0.9)
        client.send(Flush("a"))
        client.speak("a", SENTENCES[2])
        client.send(End("a"))
        heard = client.hear("a")
    samples = client.array(heard)
    assert len(samples) * 24_000 == sum(map(len, whole)) * rate
    if encoding == "pcm_s16le":
        assert np.abs(samples - np.clip(expected, -1, 1) * 32_767.0).max() <= 0.5 + 32_767 * 1e-4
    else:
        np.testing.assert_allclose(samples, np.clip(expected, -1, 1), atol=1e-4)
    first = len(heard.of(AudioChunk)[0].samples) // client.format.sample_bytes
    assert first >= 0.06 * rate  # the resampler keeps little of the first frame of 80 ms


def test_samples_are_clamped_rounded_and_little_endian():
    samples = np.float32([2, -2, 1, 0, 0.6 / 32_767, -0.6 / 32_767, 1 / 32_767])
    encoded = PcmEncoder("pcm_s16le", 24_000).encode(samples)
    assert np.frombuffer(encoded, "<i2").tolist() == [32_767, -32_767, 32_767, 0, 1, -1, 1]
    encoded = PcmEncoder("pcm_f32le", 24_000).encode(samples)
    assert np.frombuffer(encoded, "<f4").tolist() == np.clip(samples, -1, 1).tolist()


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "known"),
    [
        ({"voice": "nobody"}, "unknown_voice", "default"),
        ({"voice": "../../etc/passwd"}, "unknown_voice", "default"),
        ({"language": "klingon"}, "unknown_language", "english"),
        ({"instruct": "whisper"}, "unsupported", "VoiceDesign"),
    ],
)
def test_what_cannot_be_served_ends_its_context(live_server, options, code, known):
    with NativeClient(live_server) as client:
        client.speak("good", SENTENCES[0])
        client.speak("bad", SENTENCES[0], **options)
        heard = client.hear("bad")
        assert [type(message) for message in heard.messages] == [Error, Done]
        assert heard.messages[0].code == code
        assert known in heard.messages[0].message
        assert heard.done.finish_reason == "error"
        client.speak("bad", "more")  # the rest of its text was on its way
        assert client.wait_for(Error, "bad").code == "bad_request"
        client.send(End("good"))
        assert client.hear("good").done.samples > 0


def test_messages_out_of_order(live_server):
    with NativeClient(live_server) as client:
        client.speak("a", SENTENCES[0])
        client.send(End("a"))
        for message in (Flush("a"), End("a")):
            client.send(message)
        client.speak("a", "more")
        client.hear("a")
        assert [e.code for e in client.heard["a"].of(Error)] == ["bad_request"] * 3
        for message in (Flush("a"), End("a"), Cancel("a")):
            client.send(message)
            assert error_of(client) == Error("a", "unknown_context", "context a is not open")
        client.speak("a", "again")
        assert error_of(client).code == "bad_request"


def test_limits_of_a_connection(live_server):
    with NativeClient(live_server) as client:
        client.speak("long", "a" * 4000)
        client.speak("long", "a" * 97)
        assert error_of(client).code == "text_too_long"
        client.speak("long", "a" * 96)
        client.speak("longer", "a" * 4097)
        assert client.wait_for(Error, "longer").code == "text_too_long"
        for number in range(7):
            client.speak(f"c{number}", "x")
        client.speak("ninth", "x")
        assert client.wait_for(Error, "ninth").code == "overloaded"
        client.send(Cancel("c3"))
        client.hear("c3")
        client.speak("ninth", SENTENCES[0])  # was not opened, so its id is free
        client.send(End("ninth"))
        client.send(Cancel("long"))
        for number in (0, 1, 2, 4, 5, 6):
            client.send(Cancel(f"c{number}"))
        assert client.hear("ninth").done.samples > 0
        client.socket.send(f'{{"type": "{"a" * 65_536}"}}')
        with pytest.raises(ConnectionClosed) as closed:
            client.receive(10)
        assert closed.value.rcvd.code == 1009


WORDS = ["type", "speak", "flush", "end", "cancel", "hello", "context_id", "a", "text", "seed"]
pieces = st.sampled_from([*WORDS, None, 0, -1, True])
garbage = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.binary(max_size=40),
    st.dictionaries(st.sampled_from(WORDS), pieces).map(json.dumps),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["speak", "flush", "end", "cancel"]), "context_id": st.just("a b")},
        optional={"text": pieces, "voice": pieces, "seed": pieces},
    ).map(json.dumps),
)


def test_garbage_is_always_answered_with_a_code(live_server):
    with NativeClient(live_server) as client:

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(garbage)
        def attack(data):
            client.socket.send(data)
            client.send(Flush("marker"))
            errors = [error_of(client)]
            while errors[-1].context_id != "marker":
                errors.append(error_of(client))
            assert {error.code for error in errors} <= {"bad_request", "unknown_context"}
            # a `cancel` of all contexts is valid, and has no answer here
            assert len(errors) == 2 or json.loads(data)["type"] == "cancel"

        attack()
        client.speak("ok", SENTENCES[0])
        client.send(End("ok"))
        assert client.hear("ok").done.samples > 0
    assert_healthy(live_server)
