"""Voices that clients add: their requests as data, and what is kept of them on disk."""

import asyncio
import encodings.aliases
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from qwen_megakernel import GenerationParams, TTSDecoder
from qwen_megakernel.prompt.voice import Voice, VoiceCloner, VoiceError
from qwen_megakernel.serving import voice_library
from qwen_megakernel.serving.voice_messages import NewVoice, parse_new_voice
from qwen_megakernel.serving.wire import SpeechError
from qwen_megakernel.turn import RequestError

CONSENT = "my own voice"


# --- requests as data -------------------------------------------------------------------------------

COMPLETE = {"name": "anna", "recording": b"RIFF", "consent": CONSENT}


def test_a_request_is_read():
    assert parse_new_voice(COMPLETE) == NewVoice("anna", b"RIFF", None, CONSENT)
    assert parse_new_voice({**COMPLETE, "transcript": " Hello. "}).transcript == "Hello."
    assert parse_new_voice({"name": "anna", "description": " warm "}) == NewVoice(
        "anna", description="warm"
    )


def test_other_servers_names_of_fields_are_known():
    given = {"name": "anna", "audio_sample": b"RIFF", "consent": CONSENT, "ref_text": "Hello."}
    assert parse_new_voice(given) == NewVoice("anna", b"RIFF", "Hello.", CONSENT)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": "../anna"}, "name"),
        ({"name": "-anna"}, "name"),
        ({"name": "a" * 65}, "name"),
        ({"name": "änna"}, "name"),
        ({"name": "anna\n"}, None),
        ({"name": b"anna"}, "name"),
        ({"recording": None}, "recording"),
        ({"recording": "RIFF"}, "recording"),
        ({"consent": None}, "consent"),
        ({"consent": " "}, "consent"),
        ({"consent": "False"}, "consent"),
        ({"consent": "x" * 501}, "consent"),
        ({"consent": "\ud800"}, "consent"),
        ({"transcript": b"Hello."}, "transcript"),
        ({"description": "warm"}, "description"),
    ],
)
def test_a_wrong_field_is_named(fields, param):
    given = {name: value for name, value in (COMPLETE | fields).items() if value is not None}
    if param is None:
        assert parse_new_voice(given).name == "anna"
        return
    with pytest.raises(SpeechError) as refused:
        parse_new_voice(given)
    assert (refused.value.status, refused.value.param) == (400, param)


FIELDS = (
    "name",
    "recording",
    "consent",
    "transcript",
    "description",
    "audio_sample",
    "ref_text",
    "other",
)


@given(st.dictionaries(st.sampled_from(FIELDS), st.text(max_size=20) | st.binary(max_size=20)))
@settings(max_examples=200, deadline=None)
def test_any_fields_are_a_request_or_an_error_with_a_code(fields):
    try:
        new = parse_new_voice(fields)
    except SpeechError as refused:
        answer = (refused.status, refused.code)
    else:
        assert (new.recording is None) != (new.description is None)
        assert new.description or new.consent
        return
    assert answer == (400, "bad_request")


def read_form(content_type, body):
    """What the fields of a body are, as the server reads them."""

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", content_type.encode("latin-1"))]
    scope = {"type": "http", "method": "POST", "headers": headers, "app": None}
    return asyncio.run(voice_library._read_form(Request(scope, receive)))


PARTS = st.builds(
    lambda name, options, value: (
        f'--b\r\nContent-Disposition: form-data; name="{name}"{options}\r\n\r\n{value}\r\n'.encode()
    ),
    st.sampled_from(FIELDS) | st.text(max_size=5),
    st.sampled_from(
        ["", '; filename="a.wav"', "; filename*=x", "; name=", "\r\nContent-Type: audio/wav"]
    ),
    st.text(max_size=20),
)
BODIES = st.binary(max_size=100) | st.builds(
    lambda parts, end: b"".join(parts) + end,
    st.lists(PARTS | st.binary(max_size=10), max_size=10),
    st.sampled_from([b"--b--\r\n", b"--b", b""]),
)
NAME_PART = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nanna\r\n--b--\r\n'
CONTENT_TYPES = st.builds(
    "multipart/form-data{}".format,
    st.sampled_from(["; boundary=b"] * 4 + ["", "x", "; boundary=", f"; boundary={'b' * 300}"])
    | st.sampled_from(sorted({*encodings.aliases.aliases.values(), "undefined", "idna", "?"})).map(
        "; boundary=b; charset={}".format
    ),
)


@given(CONTENT_TYPES, BODIES)
@example("multipart/form-data; boundary=b; charset=undefined", NAME_PART)
@settings(max_examples=200, deadline=None)
def test_any_form_has_fields_or_an_error_with_a_code(content_type, body):
    try:
        fields = read_form(content_type, body)
    except SpeechError as refused:
        answer = (refused.status, refused.code, bool(str(refused)))
    else:
        assert all(isinstance(value, (str, bytes)) for value in fields.values())
        return
    assert answer == (400, "bad_request", True)


def test_voices_are_added_so_often_and_so_many_at_a_time():
    async def scenario():
        uploads = voice_library._Uploads()
        async with uploads.enter(), uploads.enter(), uploads.enter(), uploads.enter():
            with pytest.raises(RequestError, match="other voices are being added"):
                async with uploads.enter():
                    pass
        for _ in range(voice_library.MAX_PER_MINUTE - 4):
            async with uploads.enter():
                pass
        with pytest.raises(RequestError, match="10 voices a minute") as refused:
            async with uploads.enter():
                pass
        assert 50 < refused.value.retry_after_s <= 60

    asyncio.run(scenario())


# --- voices on disk ---------------------------------------------------------------------------------


def test_a_voice_keeps_its_notes(tmp_path):
    path = tmp_path / "anna.safetensors"
    Voice.x_vector(torch.ones(8)).with_notes(origin="upload", consent="my own").save(path)
    assert Voice.load(path).notes == {"origin": "upload", "consent": "my own"}


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "anna.safetensors"
    Voice.x_vector(torch.ones(8)).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        Voice.x_vector(torch.zeros(8)).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["anna.safetensors"]
    assert path.read_bytes() == before


def test_a_described_voice_is_its_description(tiny_voice_design, tmp_path):
    with TTSDecoder.load(tiny_voice_design) as tts:
        options = {"params": GenerationParams(seed=1, max_frames=6), "language": "english"}
        said = tts.synthesize("Hello.", instruct="a warm voice", **options)
        tts.design_voice("a warm voice").save(tmp_path / "warm.safetensors")
        tts.load_voices(tmp_path)
        assert tts.voices["warm"].mode == "designed"
        np.testing.assert_array_equal(tts.synthesize("Hello.", "warm", **options), said)
        other = tts.synthesize("Hello.", "warm", instruct="a cold voice", **options)
        assert not np.array_equal(other[: len(said)], said[: len(other)])
        Voice.x_vector(torch.ones(8)).save(tmp_path / "cloned.safetensors")
        with pytest.raises(VoiceError, match="cloned voice"):
            tts.load_voices(tmp_path)


def test_the_operators_voice_stays_the_default(tiny_base, recording, tmp_path):
    with TTSDecoder.load(tiny_base) as tts:
        voice = tts.clone_voice(recording.read_bytes())
        voice.save(tmp_path / "rms.safetensors")
        voice.with_notes(origin="upload").save(tmp_path / "anna.safetensors")
        tts.load_voices(tmp_path)
        assert (list(tts.voices), tts.default_voice) == (["rms", "anna"], "rms")
        tts.remove_voice("rms")
        assert (list(tts.voices), tts.default_voice) == (["anna"], "anna")
        tts.remove_voice("anna")
        assert (tts.voices, tts.default_voice) == ({}, None)


def test_cloning_aside_yields_to_others(tiny_base, recording, monkeypatch):
    seen = []
    clone = VoiceCloner.clone

    def watched(self, *arguments, **options):
        thread = threading.get_native_id()
        seen.append((os.getpriority(os.PRIO_PROCESS, thread), torch.get_num_threads(), options))
        return clone(self, *arguments, **options)

    with TTSDecoder.load(tiny_base) as tts:
        expected = tts.clone_voice(recording.read_bytes()).speaker_embedding
        own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        monkeypatch.setattr(VoiceCloner, "clone", watched)
        voice = tts.clone_voice_aside(recording.read_bytes()).result(60)
        assert seen == [(19, 1, {"refuse_clipped": True})]
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
        torch.testing.assert_close(voice.speaker_embedding, expected)
        with pytest.raises(RequestError, match="only voice_design can"):
            tts.design_voice("warm")
