"""Messages of the simple protocol, and who may send them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_megakernel.serving.access import AccessRules, check_access, is_loopback
from qwen_megakernel.serving.simple_messages import (
    Cancel,
    ProtocolError,
    Speak,
    encode_done,
    encode_error,
    encode_failed,
    parse_client_message,
)

FULL = {
    "text": "Hello.",
    "language": "English",
    "temperature": 0.5,
    "top_k": 10,
    "speaker_ref": "alice",
    "chunk_tokens": 4,
    "seed": 7,
}


def parse(**fields):
    return parse_client_message(json.dumps(fields))


def refusal(data):
    with pytest.raises(ProtocolError) as caught:
        parse_client_message(data)
    assert "\n" not in str(caught.value)
    return caught.value.code


def test_every_field_arrives():
    assert parse(**FULL) == Speak("Hello.", False, "english", "alice", 0.5, 10, 7, 4)


def test_only_text_is_required():
    assert parse(text="Hi") == Speak("Hi")
    nulls = dict.fromkeys(set(FULL) - {"text"})
    assert parse(text="Hi", more=None, cancel=None, **nulls) == Speak("Hi")


def test_unknown_keys_are_ignored():
    assert parse(text="Hi", model="x", voice={"a": [1]}) == Speak("Hi")


def test_live_text():
    assert parse(text="Hi", more=True).more
    assert parse(text="", more=False) == Speak("")


def test_cancel():
    assert parse(cancel=True) == Cancel()
    assert parse(cancel=True, text="Hi") == Cancel()
    assert parse(cancel=False, text="Hi") == Speak("Hi")


@pytest.mark.parametrize(
    ("given_name", "name"),
    [("EN", "english"), ("de", "german"), ("Auto", "auto"), ("", "auto"), ("Japanese ", "japanese")],
)
def test_languages(given_name, name):
    assert parse(text="Hi", language=given_name).language == name


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "Hi"}',
        "",
        "Hi",
        "[1]",
        "null",
        '"text"',
        "{}",
        '{"cancel": false}',
        '{"cancel": 1, "text": "Hi"}',
        '{"text": null}',
        '{"text": 5}',
        '{"text": ["Hi"]}',
        '{"text": "Hi", "more": "yes"}',
        '{"text": "Hi", "text": "Ho"}',
        '{"text": "Hi", "x": {"a": 1, "a": 2}}',
        '{"text": "\\ud800"}',
        '{"text": "Hi", "language": "\\udfff"}',
        '{"text": "Hi", "language": 3}',
        '{"text": "Hi", "temperature": NaN}',
        '{"text": "Hi", "temperature": Infinity}',
        '{"text": "Hi", "temperature": 1e999}',
        '{"text": "Hi", "temperature": -0.1}',
        '{"text": "Hi", "temperature": true}',
        '{"text": "Hi", "temperature": "0.3"}',
        '{"text": "Hi", "temperature": ' + "9" * 400 + "}",
        '{"text": "Hi", "top_k": 1.5}',
        '{"text": "Hi", "top_k": -1}',
        '{"text": "Hi", "top_k": ' + "9" * 5000 + "}",
        '{"text": "Hi", "seed": 18446744073709551616}',
        '{"text": "Hi", "chunk_tokens": 0}',
        '{"text": "Hi", "chunk_tokens": 65}',
        '{"text": "Hi", "speaker_ref": 3}',
        '{"text": "Hi"} {}',
        "\ufeff{}",
        "[" * 50_000,
        '{"a":' * 20_000,
        '{"text": "Hi", "x": ' + "[" * 900 + "]" * 900 + "}" + "x",
    ],
)
def test_bad_requests(data):
    assert refusal(data) == "bad_request"


@pytest.mark.parametrize(
    "name",
    [
        "../voices/alice",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "a\\b",
        "alice.wav",
        "alice\n",
        "alice\0",
        "http://x/a.wav",
        "file:///etc/passwd",
        "data:audio/wav;base64,AAAA",
        "%2e%2e",
        "~",
        "-x",
        "é",
        "a" * 65,
    ],
)
def test_speaker_ref_is_never_a_path(name):
    assert refusal(json.dumps({"text": "Hi", "speaker_ref": name})) == "unknown_voice"


def test_done_has_the_original_fields_and_only_numbers():
    done = json.loads(
        encode_done(finish_reason="stop", samples=48_000, generation_s=0.5, ttfc_s=0.0123, rtf=0.25)
    )
    assert done == {
        "done": True,
        "duration_s": 2.0,
        "generation_s": 0.5,
        "ttfc_ms": 12.3,
        "rtf": 0.25,
        "samples": 48_000,
        "finish_reason": "stop",
    }
    empty = json.loads(
        encode_done(finish_reason="cancelled", samples=0, generation_s=0.0, ttfc_s=None, rtf=None)
    )
    assert (empty["ttfc_ms"], empty["rtf"], empty["duration_s"]) == (0.0, 0.0, 0.0)


def test_errors_are_one_short_line():
    error = json.loads(encode_error("internal", "Traceback:\n  x\r\n" + "y" * 9000))
    assert set(error) == {"error", "code"}
    assert len(error["error"]) <= 300
    assert "\n" not in error["error"]
    failed = json.loads(encode_failed("no luck", samples=0, generation_s=1.0))
    assert failed["done"] is True
    assert (failed["error"], failed["finish_reason"]) == ("no luck", "error")


def test_importing_the_server_imports_no_torch():
    code = "import sys, server; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, timeout=240)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
known_keys = st.sampled_from([*FULL, "more", "cancel"])


def check_result(data):
    """Check that data parses to a well-formed message, or is refused with a code."""
    try:
        message = parse_client_message(data)
    except ProtocolError as error:
        json.loads(encode_error(error.code, str(error)))
        return
    if isinstance(message, Speak):
        message.text.encode()
        assert message.voice is None or re.fullmatch(r"[A-Za-z0-9_-]{1,64}", message.voice)
        assert message.temperature is None or 0 <= message.temperature <= 10
        assert not (message.temperature is not None and math.isnan(message.temperature))
        assert all(
            type(n) in (int, type(None)) for n in (message.top_k, message.seed, message.chunk_frames)
        )


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=60) | st.binary(max_size=60))
def test_any_text_or_bytes(data):
    check_result(data)


@settings(max_examples=200, deadline=None)
@given(json_values)
@example({"text": "\ud800"})
def test_any_json(value):
    check_result(json.dumps(value))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(known_keys, json_values, max_size=4))
def test_valid_messages_with_some_values_exchanged(changes):
    check_result(json.dumps({**FULL, **changes}))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_valid_messages_with_characters_changed(data):
    text = json.dumps(FULL)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 6)))
    check_result(text[:start] + data.draw(st.text(st.characters(), max_size=6)) + text[end:])


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 2**64 - 1), st.floats(0, 10))
def test_what_is_sent_is_what_is_read(text, seed, temperature):
    message = parse(text=text, seed=seed, temperature=temperature)
    assert (message.text, message.seed, message.temperature) == (text, seed, temperature)


def access(rules, path="/", query=b"", **headers):
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    refusal = check_access(rules, path, raw, query)
    return None if refusal is None else refusal.status


LOCAL = AccessRules("127.0.0.1")
GUARDED = AccessRules("0.0.0.0", {"token": "s3cret-token"}, frozenset({"https://app.example.org"}))


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8765", "127.0.0.1:9000", "[::1]:8765", "LOCALHOST:1"]
)
def test_local_names_may_be_called(host):
    assert access(LOCAL, host=host) is None


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost@evil.example", "[x"],
)
def test_a_rebound_name_may_not(host):
    assert access(LOCAL, host=host) == 403


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8765", None),
        ("http://localhost:8765", 403),
        ("http://127.0.0.1:3000", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("file://127.0.0.1:8765", 403),
        ("http://[", 403),
        ("", 403),
    ],
)
def test_origins(origin, status):
    assert access(LOCAL, host="127.0.0.1:8765", origin=origin) == status


def test_allowed_origin_is_compared_whole():
    token = {"host": "tts.example.org", "x_api_key": "s3cret-token"}
    assert access(GUARDED, origin="https://APP.example.org", **token) is None
    assert access(GUARDED, origin="https://app.example.org.evil", **token) == 403
    assert access(GUARDED, origin="http://app.example.org", **token) == 403


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        (b"", {}, 401),
        (b"", {"authorization": "Bearer s3cret-token"}, None),
        (b"", {"authorization": "bearer s3cret-token"}, None),
        (b"", {"authorization": "Token s3cret-token"}, None),
        (b"", {"authorization": "Token s3cret-toke"}, 401),
        (b"", {"sec_websocket_protocol": "token, s3cret-token"}, None),
        (b"", {"sec_websocket_protocol": "bearer,s3cret-token"}, None),
        (b"", {"sec_websocket_protocol": "chat, s3cret-token"}, 401),
        (b"", {"sec_websocket_protocol": "token"}, 401),
        (b"", {"authorization": "Basic s3cret-token"}, 401),
        (b"", {"authorization": "s3cret-token"}, 401),
        (b"", {"authorization": "Bearer s3cret-toke"}, 401),
        (b"", {"x_api_key": "s3cret-token"}, None),
        (b"", {"x_api_key": "S3CRET-TOKEN"}, 401),
        (b"", {"x_api_key": "é"}, 401),
        (b"", {"xi_api_key": "s3cret-token"}, None),
        (b"", {"xi_api_key": "s3cret-toke"}, 401),
        (b"token=s3cret-token", {}, None),
        (b"api_key=s3cret-token", {}, None),
        (b"cartesia_version=1&access_token=s3cret-token", {}, None),
        (b"api_key=s3cret-toke&access_token=", {}, 401),
        (b"authorization=Bearer%20s3cret-token", {}, None),
        (b"authorization=s3cret-token", {}, 401),
        (b"token=x&token=", {}, 401),
        (b"token=%ff%00", {}, 401),
    ],
)
def test_tokens(query, headers, status):
    assert access(GUARDED, query=query, host="h", **headers) == status


def test_health_alone_needs_no_token():
    assert access(GUARDED, "/health", host="h") is None
    assert [access(GUARDED, path, host="h") for path in ("/ready", "/metrics", "/", "/health/")] == [
        401
    ] * 4


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost", "LocalHost"]))
    assert not any(
        map(is_loopback, ["0.0.0.0", "::", "192.168.0.1", "example.org", "", "127.0.0.1.nip.io"])
    )
