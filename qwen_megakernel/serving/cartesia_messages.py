"""Cartesia's speech API as data: requests, messages of its WebSocket, errors. Standard library only.

WebSocket /tts/websocket   contexts, several at a time
POST /tts/bytes            -> bytes of an audio file
GET  /voices, /voices/ID   -> the server's voices
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_megakernel.serving.wire import (
    ErrorCode,
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
from qwen_megakernel.serving.word_timing import TimedWord

SOCKET_PATH, BYTES_PATH, VOICES_PATH = "/tts/websocket", "/tts/bytes", "/voices"
PATHS = frozenset({BYTES_PATH, VOICES_PATH})
"""Paths of the HTTP routes."""
ENCODINGS = ("pcm_s16le", "pcm_f32le", "pcm_mulaw", "pcm_alaw")
SAMPLE_RATES = (8_000, 16_000, 22_050, 24_000, 44_100, 48_000)
BIT_RATES = (32_000, 64_000, 96_000, 128_000, 192_000)
"""Bit rates of MP3."""
MAX_ID_CHARS = 256
MAX_PAGE = 100
"""The most voices in one answer."""
_MAX_SEED = 2**64 - 1
_MAX_DELAY_MS = 5000
_STATUS: dict[str, int] = {"overloaded": 503, "internal": 500}
_STATUS_CODES = {
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    429: "too_many_requests",
    503: "unavailable",
}


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The format in which a client wants its audio. It is always mono."""

    container: str = "raw"
    """raw, wav or mp3."""
    encoding: str = "pcm_s16le"
    """One of `ENCODINGS` for raw and wav; mp3 for mp3."""
    sample_rate: int = 24_000
    bit_rate: int | None = None
    """Bit rate of mp3; None otherwise."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Text to speak, for a context or as a whole."""

    context_id: str | None
    """None if the client names no context."""
    text: str
    more: bool
    """`continue` on the wire: whether more text follows for the context."""
    flush: bool
    unbuffered: bool
    """Whether `max_buffer_delay_ms` is 0: a message that ends a sentence then ends its segment."""
    voice: str | None
    """None is the default voice."""
    language: str | None
    """Lower-case name."""
    seed: int | None
    """An addition to Cartesia's API."""
    output: OutputFormat
    timestamps: bool
    """Whether the client wants the times of words."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a context."""

    context_id: str


def parse_message(data: str | bytes) -> Generate | Cancel:
    """Parse a client's WebSocket message. Unknown fields are ignored.

    Raises:
        ProtocolError: the message is malformed. No bytes raise anything else. Its `context_id` is the
            message's, if that could be read.
    """
    fields = parse_object(data)
    context_id = _context_id(fields)
    try:
        if get_flag(fields, "cancel"):
            if context_id is None:
                raise ProtocolError("bad_request", "context_id is missing")
            return Cancel(context_id)
        message = _generate(fields, context_id)
        if message.output.container != "raw":
            raise ProtocolError("unsupported", "a WebSocket has the container raw only")
        return message
    except ProtocolError as error:
        error.context_id = context_id
        raise


def parse_bytes(body: bytes) -> Generate:
    """Parse the body of `POST /tts/bytes`. Unknown fields are ignored.

    Raises:
        SpeechError: 400 if the body is malformed. No bytes raise anything else.
    """
    try:
        request = _generate(parse_object(body.decode()), None)
        if not request.text.strip():
            raise ProtocolError("bad_request", "transcript is empty")
        return request
    except UnicodeDecodeError:
        raise SpeechError(400, "the body is not UTF-8", "bad_request") from None
    except ProtocolError as error:
        raise SpeechError(400, error_line(str(error)), error.code) from None


def encode_chunk(context_id: str, audio: bytes, flush_id: int, step_ms: float) -> str:
    """The message with a chunk of a context's audio."""
    return _message(
        "chunk",
        context_id,
        206,
        data=base64.b64encode(audio).decode(),
        step_time=round(step_ms, 2),
        flush_id=flush_id,
    )


def encode_words(context_id: str, words: Sequence[TimedWord], flush_id: int) -> str:
    """The message with estimated times of words, in seconds of the context's audio."""
    times = {
        "words": [word.text for word in words],
        "start": [round(word.time_s, 3) for word in words],
        "end": [round(word.end_s, 3) for word in words],
    }
    return _message("timestamps", context_id, 206, word_timestamps=times, flush_id=flush_id)


def encode_flush_done(context_id: str, flush_id: int) -> str:
    """The message that says that all audio of a flush was sent."""
    return _message("flush_done", context_id, 206, flush_done=True, flush_id=flush_id)


def encode_done(context_id: str) -> str:
    """The last message of a context."""
    return _message("done", context_id, 200, done=True)


def encode_error(context_id: str | None, code: ErrorCode, message: str, *, done: bool) -> str:
    """The message for a refusal or a failure. `done` says whether the context is over."""
    status = _STATUS.get(code, 400)
    return _message("error", context_id, status, done=done, **_error(status, message, code))


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> Any:
    """The body of an error answer, as Cartesia's clients read it."""
    code = code or _STATUS_CODES.get(status, "bad_request")
    return {**_error(status, message, code), "status_code": status}


def voice_object(name: str) -> Any:
    """The JSON of a voice, in Cartesia's form."""
    return {
        "id": name,
        "name": name,
        "description": "",
        "tagline": "",
        "access": "private",
        "visibility": "owner",
        "is_owner": True,
        "language": "en",
        "locales": [],
        "created_at": "1970-01-01T00:00:00Z",
    }


def voice_page(names: Iterable[str], query: dict[str, str]) -> Any:
    """The answer to `GET /voices`.

    Raises:
        SpeechError: 400 if `limit` is not a number from 1 to `MAX_PAGE`.
    """
    limit = query.get("limit", str(MAX_PAGE))
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:4]) <= MAX_PAGE):
        raise SpeechError(400, f"limit is out of range, allowed: 1 to {MAX_PAGE}", "bad_request")
    wanted = query.get("q", "").lower()
    found = sorted(name for name in names if wanted in name.lower())
    if "starting_after" in query:
        found = [name for name in found if name > query["starting_after"]]
    if "ending_before" in query:
        found = [name for name in found if name < query["ending_before"]]
        page = found[-int(limit) :]
    else:
        page = found[: int(limit)]
    return {"data": [voice_object(name) for name in page], "has_more": len(page) < len(found)}


def _message(message_type: str, context_id: str | None, status: int, **fields: Any) -> str:
    head = {"type": message_type, "context_id": context_id, "status_code": status, "done": False}
    return json.dumps({**head, **fields}, separators=(",", ":"))


def _error(status: int, message: str, code: str) -> dict[str, Any]:
    title = code.replace("_", " ").capitalize()
    return {"title": title, "message": error_line(message), "error_code": code}


def _context_id(fields: dict[str, Any]) -> str | None:
    if fields.get("context_id") is None:
        return None
    context_id = get_string(fields, "context_id")
    if not 1 <= len(context_id) <= MAX_ID_CHARS:
        raise ProtocolError("bad_request", f"context_id must have 1 to {MAX_ID_CHARS} characters")
    return context_id


def _generate(fields: dict[str, Any], context_id: str | None) -> Generate:
    _check_model(fields)
    return Generate(
        context_id=context_id,
        text=get_string(fields, "transcript"),
        more=get_flag(fields, "continue"),
        flush=get_flag(fields, "flush"),
        unbuffered=get_number(fields, "max_buffer_delay_ms", (int,), 0, _MAX_DELAY_MS) == 0,
        voice=_voice(fields),
        language=_language(fields),
        seed=get_number(fields, "seed", (int,), 0, _MAX_SEED),
        output=_output(fields),
        timestamps=get_flag(fields, "add_timestamps"),
    )


def _check_model(fields: dict[str, Any]) -> None:
    """Refuse fields that would change the speech and that this server does not support."""
    for name in ("model_id", "pronunciation_dict_id", "speed"):
        if fields.get(name) is not None:
            get_string(fields, name)
    if fields.get("pronunciation_dict_id"):
        raise ProtocolError("unsupported", "pronunciation_dict_id is not supported; leave it out")
    if fields.get("speed") not in (None, "", "normal"):
        raise ProtocolError("unsupported", "speed other than normal is not supported")
    if get_flag(fields, "add_phoneme_timestamps"):
        raise ProtocolError("unsupported", "add_phoneme_timestamps is not supported; words have times")
    config = fields.get("generation_config")
    if config is None:
        return
    if not isinstance(config, dict):
        raise ProtocolError("bad_request", f"generation_config is {kind(config)}, expected an object")
    for name in ("speed", "volume"):
        if get_number(config, name, (int, float), 0, 10) not in (None, 1.0):
            raise ProtocolError("unsupported", f"generation_config.{name} other than 1 is not supported")
    if config.get("emotion") not in (None, "neutral"):
        raise ProtocolError("unsupported", "generation_config.emotion is not supported; leave it out")


def _voice(fields: dict[str, Any]) -> str | None:
    voice = fields.get("voice")
    if isinstance(voice, dict):
        if voice.get("mode", "id") != "id":
            raise ProtocolError("unsupported", "voice has the mode id only")
        return get_string(voice, "id") or None if voice.get("id") is not None else None
    if voice is not None and not isinstance(voice, str):
        raise ProtocolError("bad_request", f"voice is {kind(voice)}, expected a string or an object")
    return None if voice is None else get_string(fields, "voice") or None


def _language(fields: dict[str, Any]) -> str | None:
    key = "language" if fields.get("language") is not None else "locale"
    if fields.get(key) is None:
        return None
    return language_name(get_string(fields, key).replace("_", "-").partition("-")[0])


def _output(fields: dict[str, Any]) -> OutputFormat:
    output = fields.get("output_format")
    if output is None:
        return OutputFormat()
    if not isinstance(output, dict):
        raise ProtocolError("bad_request", f"output_format is {kind(output)}, expected an object")
    container = _choice(output, "container", ("raw", "wav", "mp3"))
    sample_rate = get_number(output, "sample_rate", (int,), 0, 2**31)
    if sample_rate is None:
        sample_rate = 24_000
    if sample_rate not in SAMPLE_RATES:
        known = ", ".join(map(str, SAMPLE_RATES))
        raise ProtocolError("unsupported", f"sample_rate {sample_rate} is not supported; known: {known}")
    if container != "mp3":
        return OutputFormat(container, _choice(output, "encoding", ENCODINGS), sample_rate)
    bit_rate = get_number(output, "bit_rate", (int,), 0, 2**31)
    if bit_rate not in (None, *BIT_RATES):
        known = ", ".join(map(str, BIT_RATES))
        raise ProtocolError("unsupported", f"bit_rate {bit_rate} is not supported; known: {known}")
    return OutputFormat(container, "mp3", sample_rate, bit_rate)


def _choice(fields: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    """One of the known strings; the first if the field is absent or null."""
    if fields.get(key) is None:
        return known[0]
    value = get_string(fields, key)
    if value not in known:
        raise ProtocolError("unsupported", f"{key} is not supported; known: {', '.join(known)}")
    return value
