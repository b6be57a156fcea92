"""OpenAI's speech API as data: requests, events of a stream, error bodies. Standard library only.

POST /v1/audio/speech   -> bytes of an audio file, or Server-Sent Events
GET  /v1/audio/voices   -> {"voices": [{"id", "name", ...}]}
GET  /v1/models         -> {"object": "list", "data": [...]}
GET  /v1/audio/models   -> {"models": [{"id", "name"}]}
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from qwen_megakernel.serving.message_rules import MAX_SPEED, MIN_SPEED, words
from qwen_megakernel.serving.wire import (
    ProtocolError,
    SpeechError,
    error_line,
    get_flag,
    get_number,
    get_string,
    kind,
    language_name,
    parse_object,
)

T = TypeVar("T")
ResponseFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]
RESPONSE_FORMATS: tuple[ResponseFormat, ...] = ("mp3", "opus", "aac", "flac", "wav", "pcm")
STREAM_FORMATS = ("audio", "sse")
SPEECH_PATH, VOICES_PATH, MODELS_PATH = "/v1/audio/speech", "/v1/audio/voices", "/v1/models"
AUDIO_MODELS_PATH = "/v1/audio/models"
"""An addition to OpenAI's API: Open WebUI asks here."""
PATHS = frozenset({SPEECH_PATH, VOICES_PATH, MODELS_PATH, AUDIO_MODELS_PATH})
VOICE_NAMES = (
    "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage",
    "shimmer", "verse",
)  # fmt: skip
"""OpenAI's names. Some clients send no others."""
MODEL_NAMES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
"""OpenAI's names. Some clients offer only models that the server lists."""
MAX_INSTRUCTIONS_CHARS = 1000
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SpeechRequest:
    """The speech that a client asks for."""

    text: str
    voice: str | None
    """None is the default voice."""
    instructions: str | None
    language: str | None
    """Lower-case name. An addition to OpenAI's API."""
    seed: int | None
    """An addition to OpenAI's API."""
    response_format: ResponseFormat
    as_events: bool
    """Whether the answer is Server-Sent Events, not an audio file."""
    trim_leading_silence: bool | None = None
    """Not of OpenAI; None leaves it to the server. So are the next two."""
    markup: bool | None = None
    lexicon: dict[str, str] | None = None
    speed: float | None = None


def parse_speech(body: bytes) -> SpeechRequest:
    """Parse the body of `POST /v1/audio/speech`. Unknown fields are ignored.

    Raises:
        SpeechError: 400 if the body is malformed. No bytes raise anything else.
    """
    try:
        fields = parse_object(body.decode())
    except UnicodeDecodeError:
        raise SpeechError(400, "the body is not UTF-8", "bad_request") from None
    except ProtocolError as error:
        raise SpeechError(400, error_line(str(error)), error.code) from None
    _field("model", lambda: _string(fields, "model"))
    stream_format = _field("stream_format", lambda: _choice(fields, "stream_format", STREAM_FORMATS))
    language = _field("language", lambda: _string(fields, "language"))
    return SpeechRequest(
        text=_field("input", lambda: _text(fields)),
        voice=_field("voice", lambda: _voice(fields)),
        instructions=_field("instructions", lambda: _instructions(fields)),
        language=None if language is None else language_name(language),
        seed=_field("seed", lambda: get_number(fields, "seed", (int,), 0, _MAX_SEED)),
        trim_leading_silence=_field(
            "trim_leading_silence", lambda: _flag(fields, "trim_leading_silence")
        ),
        markup=_field("markup", lambda: _flag(fields, "markup")),
        lexicon=_field("lexicon", lambda: _lexicon(fields)),
        speed=_field("speed", lambda: get_number(fields, "speed", (int, float), MIN_SPEED, MAX_SPEED)),
        response_format=_field(
            "response_format", lambda: _choice(fields, "response_format", RESPONSE_FORMATS)
        ),
        as_events=stream_format == "sse",
    )


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> Any:
    """The body of an error answer, as OpenAI's clients read it."""
    if status == 429:
        error_type = "rate_limit_error"
    else:
        error_type = "server_error" if status >= 500 else "invalid_request_error"
    code = code or {401: "invalid_api_key", 429: "rate_limit_exceeded"}.get(status)
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def delta_event(audio: bytes) -> bytes:
    """The event with bytes of the audio file."""
    return _event({"type": "speech.audio.delta", "audio": base64.b64encode(audio).decode()})


def done_event() -> bytes:
    """The last event. OpenAI's clients require numbers of tokens, which this server does not count."""
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    return _event({"type": "speech.audio.done", "usage": usage})


def error_event(message: str, code: str) -> bytes:
    """The last event, if the speech breaks off."""
    return _event({"type": "speech.audio.error", **error_body(500, message, code)})


def model_list(names: Iterable[str]) -> Any:
    """The answer to `GET /v1/models`."""
    models = [{"id": n, "object": "model", "created": 0, "owned_by": "qwen-megakernel"} for n in names]
    return {"object": "list", "data": models}


def audio_model_list(names: Iterable[str]) -> Any:
    """The answer to `GET /v1/audio/models`."""
    return {"models": [{"id": name, "name": name} for name in names]}


def find_voice(given: str | None, aliases: Mapping[str, str], known: Iterable[str]) -> str | None:
    """The server's name for a voice; None is the default voice. An unknown name stays as it is.

    An alias comes before a voice of the same name, and a voice comes before OpenAI's names.
    """
    if given is None or given in aliases:
        return None if given is None else aliases[given]
    return None if given in VOICE_NAMES and given not in known else given


def _field(name: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except ProtocolError as error:
        raise SpeechError(400, error_line(str(error)), error.code, name) from None


def _string(fields: dict[str, Any], key: str) -> str | None:
    return None if fields.get(key) is None else get_string(fields, key)


def _text(fields: dict[str, Any]) -> str:
    text = get_string(fields, "input")
    if not text.strip():
        raise ProtocolError("bad_request", "input is empty")
    return text


def _voice(fields: dict[str, Any]) -> str | None:
    voice = fields.get("voice")
    if isinstance(voice, dict):
        if not isinstance(voice.get("id"), str):
            raise ProtocolError("bad_request", "voice is an object without an id that is a string")
        return get_string(voice, "id") or None
    if voice is not None and not isinstance(voice, str):
        raise ProtocolError("bad_request", f"voice is {kind(voice)}, expected a string or an object")
    return _string(fields, "voice") or None


def _instructions(fields: dict[str, Any]) -> str | None:
    instructions = _string(fields, "instructions")
    if instructions is not None and len(instructions) > MAX_INSTRUCTIONS_CHARS:
        raise ProtocolError(
            "bad_request", f"instructions is longer than {MAX_INSTRUCTIONS_CHARS} characters"
        )
    return instructions if instructions and instructions.strip() else None


def _choice(fields: dict[str, Any], key: str, known: tuple[Any, ...]) -> Any:
    """One of the known strings; the first if the field is absent or null."""
    value = _string(fields, key)
    if value is not None and value not in known:
        raise ProtocolError("bad_request", f"{key} is unknown; known: {', '.join(known)}")
    return known[0] if value is None else value


def _lexicon(fields: dict[str, Any]) -> dict[str, str] | None:
    return None if fields.get("lexicon") is None else words(fields, "lexicon")


def _flag(fields: dict[str, Any], key: str) -> bool | None:
    return None if fields.get(key) is None else get_flag(fields, key)


def _event(fields: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()
