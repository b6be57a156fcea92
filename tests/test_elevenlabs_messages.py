"""ElevenLabs' speech API as data: queries, bodies, messages, times of characters."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_megakernel.serving.elevenlabs_messages import (
    OUTPUT_FORMATS,
    Alignment,
    Message,
    Output,
    Query,
    Request,
    error_body,
    parse_message,
    parse_query,
    parse_request,
    voice_page,
)
from qwen_megakernel.serving.wire import ProtocolError, SpeechError
from qwen_megakernel.serving.word_timing import TimedWord


def parse(multi=True, **fields):
    return parse_message(json.dumps(fields), multi=multi)


def test_queries_have_elevenlabs_defaults():
    assert parse_query({}) == Query(Output("mp3", "mp3", 44_100, 128_000))
    found = {name: parse_query({"output_format": name}).output for name in OUTPUT_FORMATS}
    assert found["pcm_22050"] == Output("raw", "pcm_s16le", 22_050)
    assert found["ulaw_8000"] == Output("raw", "pcm_mulaw", 8_000)
    assert found["alaw_8000"] == Output("raw", "pcm_alaw", 8_000)
    assert found["mp3_22050_32"] == Output("mp3", "mp3", 22_050, 32_000)
    assert found["opus_48000_64"] == Output("ogg", "opus", 48_000, 64_000)


def test_every_field_of_a_query_is_read():
    fields = {
        "model_id": "eleven_flash_v2_5", "output_format": "pcm_16000", "language_code": "de-CH",
        "auto_mode": "true", "inactivity_timeout": "20", "enable_logging": "false", "seed": "7",
        "enable_ssml_parsing": "true", "sync_alignment": "true", "apply_text_normalization": "on",
        "optimize_streaming_latency": "3", "tag": "x",
    }  # fmt: skip
    assert parse_query(fields) == Query(
        Output("raw", "pcm_s16le", 16_000), "german", 7, auto_mode=True, markup=True, inactivity_s=20
    )


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"output_format": "pcm_12000"}, "output_format .*pcm_8000 .*opus_48000_192$"),
        ({"auto_mode": "maybe"}, "auto_mode must be true or false"),
        ({"inactivity_timeout": "181"}, "inactivity_timeout must be an integer from 1 to 180"),
        ({"seed": "-1"}, "seed must be an integer"),
        ({"single_use_token": "x"}, "single_use_token is not supported"),
        ({"apply_text_normalization": "x"}, "apply_text_normalization .*auto, on, off"),
    ],
)
def test_a_wrong_query_is_refused_by_name(fields, says):
    with pytest.raises(SpeechError, match=says) as refused:
        parse_query(fields)
    (name,) = fields
    assert (refused.value.status, refused.value.param) == (400, name)


def test_messages_are_read():
    assert parse(text=" ", context_id="a", voice_settings={"stability": 0.5, "speed": 1.2}) == Message(
        "a", " ", speed=1.2
    )
    assert parse(text="Hi ", flush=True, try_trigger_generation=True) == Message(None, "Hi ", flush=True)
    assert parse(context_id="a", flush=True) == Message("a", flush=True)
    assert parse(context_id="a", close_context=True) == Message("a", close_context=True)
    assert parse(close_socket=True) == Message(close_socket=True)
    assert parse(multi=False, text="", context_id=7, close_socket=7) == Message(text="")
    assert parse(
        text=" ", voice_settings=None, generation_config={"chunk_length_schedule": [50]},
        pronunciation_dictionary_locators=[], xi_api_key="x",
    ) == Message(text=" ")  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({}, "bad_request", "text is missing"),
        ({"text": 7}, "bad_request", "text"),
        ({"text": "Hi", "context_id": ""}, "bad_request", "256"),
        ({"text": "Hi", "context_id": 7}, "bad_request", "context_id"),
        ({"text": "Hi", "flush": "yes"}, "bad_request", "flush"),
        ({"close_context": 1}, "bad_request", "close_context"),
        ({"text": " ", "voice_settings": []}, "bad_request", "voice_settings"),
        ({"text": " ", "voice_settings": {"speed": 5}}, "bad_request", "speed"),
        ({"text": " ", "pronunciation_dictionary_locators": [{}]}, "unsupported", "dictionary"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields, code, says):
    with pytest.raises(ProtocolError, match=says) as refused:
        parse(**({"context_id": "a"} | fields))
    assert refused.value.code == code
    assert refused.value.context_id == ("a" if "context_id" not in fields else None)


def test_bodies_are_read():
    body = {
        "text": "Hi.",
        "model_id": "x",
        "voice_settings": {"speed": 0.8},
        "language_code": "de",
        "seed": 3,
    }
    assert parse_request(json.dumps(body).encode()) == Request("Hi.", "german", 3, 0.8)
    for body in (b"\xff", b"[]", b'{"text": " "}', b"{}"):
        with pytest.raises(SpeechError) as refused:
            parse_request(body)
        assert error_body(400, "No.", refused.value.code) == {
            "detail": {"status": "bad_request", "message": "No."}
        }


def test_pages_of_voices_end():
    names = [f"voice{number:03}" for number in range(250)]
    found, query = [], {"page_size": "100"}
    for size in (100, 100, 50):
        page = voice_page(names, query)
        assert (len(page["voices"]), page["total_count"]) == (size, 250)
        assert page["has_more"] == (size == 100)
        found += [voice["voice_id"] for voice in page["voices"]]
        query["next_page_token"] = page["next_page_token"]
    assert found == names
    assert [v["name"] for v in voice_page(names, {"search": "E24", "page_size": "2"})["voices"]] == (
        names[240:242]
    )
    with pytest.raises(SpeechError):
        voice_page(names, {"page_size": "0"})


def test_characters_share_their_words_time_and_messages_follow_one_another():
    alignment = Alignment()
    assert alignment.align([]) is None
    assert alignment.align([TimedWord("ab", 0.1, 0.2, True), TimedWord("c", 0.25, 0.3, True)]) == {
        "chars": ["a", "b", " ", "c", " "],
        "charStartTimesMs": [100, 150, 200, 250, 300],
        "charDurationsMs": [50, 50, 0, 50, 0],
    }
    # The next times count from 300 ms. A word is not heard before the one that it follows.
    assert alignment.align([TimedWord("d", 0.28, 0.35, True)])["charStartTimesMs"] == [0, 50]
    assert alignment.align([TimedWord("e", 0.45, 0.5, True)])["charStartTimesMs"] == [100, 150]


def test_scripts_without_spaces_have_one_at_the_end_of_their_segment():
    alignment = Alignment()
    words = [TimedWord("你", 0.0, 0.2, False), TimedWord("好。", 0.2, 0.4, False)]
    assert alignment.align(words)["chars"] == ["你", "好", "。"]
    assert alignment.align(words, ends=True)["chars"] == ["你", "好", "。", " "]
    seconds = Alignment().align_in_seconds(words, ends=True)
    assert seconds["character_end_times_seconds"] == [0.2, 0.3, 0.4, 0.4]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "context_id", "text", "flush", "close_context", "close_socket", "voice_settings",
    "generation_config", "pronunciation_dictionary_locators", "language_code", "seed",
)  # fmt: skip
VALUES = JSON | st.sampled_from([True, False, "a", "Hi. ", "", " ", {"speed": 1.1}, []])
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6).map(json.dumps)
MESSAGES = st.text(max_size=100) | st.binary(max_size=100) | OBJECTS
QUERIES = st.dictionaries(
    st.sampled_from(["output_format", "language_code", "auto_mode", "inactivity_timeout", "seed"])
    | st.text(max_size=10),
    st.sampled_from(["pcm_24000", "true", "20", "0", "de", "-1", "9" * 30]) | st.text(max_size=20),
)


@given(st.binary(max_size=100) | OBJECTS.map(str.encode), QUERIES)
@settings(max_examples=200, deadline=None)
def test_any_body_and_any_query_are_a_request_or_an_error_with_a_code(body, query):
    for read in (lambda: parse_request(body), lambda: parse_query(query)):
        try:
            read()
        except SpeechError as refused:
            detail = error_body(refused.status, str(refused), refused.code)["detail"]
            assert detail["status"]
            assert detail["message"]
            json.dumps(detail).encode()
