"""The native protocol's messages: code, schema and page agree."""

import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from live_server import ROOT
from native_client import check_schema, schema, validator

from qwen_megakernel.__main__ import main
from qwen_megakernel.serving import native_messages as messages
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    AudioFormat,
    Cancel,
    Done,
    End,
    Error,
    Flush,
    Hello,
    Limits,
    Progress,
    Ready,
    Segment,
    Speak,
    Started,
    Word,
    encode,
    parse_client_message,
    parse_server_message,
)
from qwen_megakernel.serving.wire import ErrorCode, ProtocolError, error_line

CLIENT = [
    Hello(),
    Hello(audio=AudioFormat("pcm_f32le", 8000), client="pipecat/1.14 (linux)"),
    Speak("a", ""),
    Speak("A-z.0:_" * 9, 'Grüße, "Welt"\n', "anna", "de", "softly", 0.5, 10, 2**64 - 1, 8),
    Speak("a", "", None, None, None, None, None, None, None, 0.5, 1.1, 0.0, 0, 1, 1 << 20, False),
    Hello(audio=AudioFormat("opus")),
    Hello(audio=AudioFormat("pcm_mulaw", 8000)),
    Flush("a"),
    End("a"),
    Cancel(),
    Cancel("a"),
]
SERVER = [
    Ready(
        1, "pcm_s16le", 24_000, ("pcm_s16le",), (24_000,), (), None, ("auto",), Limits(1, 2, 3), "x/1"
    ),
    Started("a", 1),
    Progress("a", "waiting_for_text", 0),
    Segment("a", 0, 0.0, 0.96, "stop"),
    Done("a", "cancelled", 0, 0.0, 0.0, None, None),
    Done("a", "stop", 24_000, 1.0, 0.2, 31.4, 0.2),
    Error(None, "bad_request", "no"),
    Error("a", "internal", "sorry"),
]
WITH_WORDS = [
    Segment("a", 0, 0.0, 0.96, "stop", ()),
    Segment("a", 0, 0.0, 0.96, "stop", (Word("Hello", 0.0, 0.4), Word("du.", 0.5, 0.9))),
]
"""Fields that earlier servers do not send."""
PAGE = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")


def refusal(data):
    with pytest.raises(ProtocolError) as caught:
        parse_client_message(data)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("message", CLIENT, ids=repr)
def test_client_messages_survive_the_wire(message):
    text = encode(message)
    check_schema("client", text)
    assert parse_client_message(text) == message


@pytest.mark.parametrize("message", SERVER + WITH_WORDS, ids=repr)
def test_server_messages_survive_the_wire(message):
    text = encode(message)
    check_schema("server", text)
    assert parse_server_message(text) == message


def test_audio_has_a_header_of_two_little_endian_numbers():
    data = encode(AudioChunk(1, 0x0203, b"\x01\x02"))
    assert data == bytes([1, 0, 0, 0, 3, 2, 0, 0, 1, 2])
    assert parse_server_message(data) == AudioChunk(1, 0x0203, b"\x01\x02")
    assert parse_server_message(encode(AudioChunk(1, 2**32 + 5, b""))).sequence == 5
    for length in range(8):
        with pytest.raises(ProtocolError):
            parse_server_message(bytes(length))


def test_null_is_absent_and_only_text_is_required():
    nulls = {each.name: None for each in fields(Speak)[2:]}
    text = json.dumps({"type": "speak", "context_id": "a", "text": "x", **nulls})
    check_schema("client", text)
    assert parse_client_message(text) == Speak("a", "x")
    assert encode(Speak("a", "x")) == '{"type":"speak","context_id":"a","text":"x"}'
    hello = '{"type": "hello", "protocol": 1, "audio": {"sample_rate": null}, "client": null}'
    check_schema("client", hello)
    assert parse_client_message(hello) == Hello()


@pytest.mark.parametrize(
    ("text", "code", "context_id"),
    [
        ("", "bad_request", None),
        (b"{}", "bad_request", None),
        ("[1]", "bad_request", None),
        ("{}", "bad_request", None),
        ('{"type": "dance", "context_id": "a"}', "bad_request", "a"),
        ('{"type": ["speak"]}', "bad_request", None),
        ('{"type": "ready"}', "bad_request", None),
        ('{"type": "flush"}', "bad_request", None),
        ('{"type": "flush", "context_id": ""}', "bad_request", None),
        ('{"type": "flush", "context_id": "a b"}', "bad_request", None),
        ('{"type": "flush", "context_id": "a\\n"}', "bad_request", None),
        (f'{{"type": "flush", "context_id": "{"a" * 65}"}}', "bad_request", None),
        ('{"type": "flush", "context_id": "a", "context_id": "b"}', "bad_request", None),
        ('{"type": "flush", "context_id": "a", "text": "x"}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a"}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": null}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": "\\ud800"}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": "x", "txt": "y"}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": "x", "voice": 7}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": "x", "seed": -1}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": "x", "seed": 0.5}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": "x", "top_k": true}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": "x", "temperature": 11}', "bad_request", "a"),
        ('{"type": "speak", "context_id": "a", "text": "x", "chunk_frames": 9}', "bad_request", "a"),
        ('{"type": "hello"}', "bad_request", None),
        ('{"type": "hello", "protocol": "1"}', "bad_request", None),
        ('{"type": "hello", "protocol": 1, "audio": []}', "bad_request", None),
        ('{"type": "hello", "protocol": 1, "audio": {"rate": 8000}}', "bad_request", None),
        ('{"type": "hello", "protocol": 1, "client": "a\\nb"}', "bad_request", None),
        ('{"type": "hello", "protocol": 2, "news": {}}', "unsupported_protocol", None),
        ('{"type": "hello", "protocol": 1, "audio": {"encoding": "mp3"}}', "unsupported_protocol", None),
        (
            '{"type": "hello", "protocol": 1, "audio": {"sample_rate": 44100}}',
            "unsupported_protocol",
            None,
        ),
    ],
)
def test_refused_messages(text, code, context_id):
    error = refusal(text)
    assert (error.code, error.context_id) == (code, context_id)


def test_clients_pass_over_what_a_later_server_may_add():
    later = {**json.loads(encode(SERVER[1])), "colour": "blue"}
    assert parse_server_message(json.dumps(later)) == SERVER[1]
    with pytest.raises(ProtocolError) as caught:
        parse_server_message('{"type": "weather"}')
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize("message", SERVER[1:], ids=repr)
def test_server_messages_are_checked_by_clients(message):
    values = json.loads(encode(message))
    for name in values.keys() - {"type"}:
        for wrong in ({}, True):
            with pytest.raises(ProtocolError):
                parse_server_message(json.dumps({**values, name: wrong}))


values = st.one_of(
    st.sampled_from(["a", "b:1", "", "x" * 65, "pcm_s16le", "stop", "a b", "anna"]),
    st.sampled_from([None, True, 0, 1, -1, 8, 9, 10, 11, 0.5, 65_536, 65_537, 8000, 2**64 - 1, 2**64]),
    st.sampled_from([[], {}, {"encoding": "pcm_f32le"}, {"sample_rate": 16_000}, {"rate": 1}]),
)
names = sorted({name for kind in schema()["$defs"].values() for name in kind.get("properties", {})})


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(CLIENT), st.dictionaries(st.sampled_from([*names, "other"]), values, max_size=2))
def test_schema_and_parser_agree(message, changes):
    text = json.dumps({**json.loads(encode(message)), **changes})
    try:
        parse_client_message(text)
        accepted = True
    except ProtocolError:
        accepted = False
    assert accepted == validator("client").is_valid(json.loads(text)), text


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.binary(), st.recursive(st.none(), st.lists).map(json.dumps)))
def test_any_garbage_is_refused_in_one_line(data):
    refusal(data)
    if isinstance(data, str):
        with pytest.raises(ProtocolError):
            parse_server_message(data)


def test_core_is_light():
    heavy = {"torch", "numpy", "asyncio"}
    code = f"import qwen_megakernel.serving.native_messages, sys; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("set()", "")


# --- the page ----------------------------------------------------------------------------------


def rows(heading):
    """Cells of the table below a heading."""
    part = PAGE.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_page_names_every_message_and_field():
    found = {}
    for heading in ("Client to server", "Server to client"):
        for name, named, _ in rows(heading):
            if name != "(binary)":
                found[name.strip("`")] = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", named)))
    kinds = {name: kind for name, kind in schema()["$defs"].items() if "properties" in kind}
    assert found.keys() == kinds.keys()
    for name, kind in kinds.items():
        expected = kind["properties"].keys() - {"type"}
        expected |= kind["properties"].get("audio", {}).get("properties", {}).keys()
        assert found[name] == expected, name


def test_page_and_schema_name_every_error():
    named = [code for row in rows("Errors") for code in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(ErrorCode.__args__)
    assert sorted(named) == sorted(schema()["$defs"]["error"]["properties"]["code"]["enum"])


def test_page_names_every_choice():
    for choice in [
        *messages.ENCODINGS,
        *messages.State.__args__,
        *messages.FinishReason.__args__,
    ]:
        assert f"`{choice}`" in PAGE
    for rate in messages.SAMPLE_RATES:
        assert str(rate) in PAGE


def test_example_is_true():
    example = PAGE.split("### Example", 1)[1].split("```")[1].strip().splitlines()
    for line in example:
        side, text = line[:2], line[2:]
        if side == "> ":
            check_schema("client", text)
        elif text.startswith("{") and "..." not in text:
            check_schema("server", text)
    assert len(example) > 10


# --- the schema --------------------------------------------------------------------------------


def test_schema_is_what_the_command_prints(capsys):
    """`python -m qwen_megakernel protocol-schema > docs/protocol.schema.json` updates the file."""
    assert main(["protocol-schema"]) == 0
    assert (ROOT / "docs" / "protocol.schema.json").read_text(
        encoding="utf-8"
    ) == capsys.readouterr().out
    Draft202012Validator.check_schema(schema())


def test_schema_and_code_cut_errors_at_the_same_length():
    longest = schema()["$defs"]["error"]["properties"]["message"]["maxLength"]
    assert len(error_line("x" * 10_000)) == longest


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (SERVER[0], {"protocol": 2}),
        (SERVER[0], {"encoding": "mp3"}),
        (SERVER[0], {"sample_rate": 44_100}),
        (SERVER[0], {"encodings": []}),
        (SERVER[0], {"sample_rates": []}),
        (SERVER[0], {"voices": [1]}),
        (SERVER[0], {"languages": []}),
        (SERVER[0], {"limits": {"max_text_chars": 0, "max_contexts": 1, "max_message_bytes": 1}}),
        (SERVER[0], {"limits": {"max_text_chars": 1, "max_contexts": 1}}),
        (SERVER[1], {"stream": 0}),
        (SERVER[1], {"stream": 2**32}),
        (SERVER[1], {"context_id": "a b"}),
        (SERVER[2], {"state": "thinking"}),
        (SERVER[2], {"queued": -1}),
        (SERVER[3], {"finish_reason": "cancelled"}),
        (SERVER[3], {"finish_reason": "error"}),
        (SERVER[3], {"duration_s": -0.1}),
        (SERVER[3], {"estimated_words": ["Hello"]}),
        (SERVER[3], {"estimated_words": [{"text": "Hello", "start_s": 0.0}]}),
        (SERVER[4], {"finish_reason": "tired"}),
        (SERVER[4], {"ttfc_ms": -1}),
        (SERVER[4], {"samples": None}),
        (SERVER[6], {"code": "teapot"}),
        (SERVER[6], {"message": "x" * 301}),
        (SERVER[6], {"context_id": ""}),
    ],
)
def test_schema_refuses_what_the_server_never_sends(message, changes):
    values = json.loads(encode(message))
    assert validator("server").is_valid(values)
    assert not validator("server").is_valid({**values, **changes})


@pytest.mark.parametrize("message", SERVER, ids=repr)
def test_schema_requires_every_field_that_the_server_sends(message):
    values = json.loads(encode(message))
    for name in values:
        assert not validator("server").is_valid({k: v for k, v in values.items() if k != name}), name
