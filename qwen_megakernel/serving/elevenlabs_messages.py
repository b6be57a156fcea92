"""ElevenLabs' speech API as data: queries, messages of its WebSockets, errors. Standard library only.

WebSocket /v1/text-to-speech/VOICE/stream-input         one text in pieces
WebSocket /v1/text-to-speech/VOICE/multi-stream-input   contexts, several at a time
POST /v1/text-to-speech/VOICE, .../stream               -> bytes of an audio file
POST /v1/text-to-speech/VOICE/stream/with-timestamps    -> JSON lines with audio and times
GET  /v1/voices, /v1/voices/ID, /v2/voices              -> the server's voices
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_megakernel.serving.message_rules import MAX_SPEED, MIN_SPEED
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

SPEECH_PATH, VOICES_PATH, VOICE_PAGES_PATH = "/v1/text-to-speech", "/v1/voices", "/v2/voices"
PATHS = frozenset({SPEECH_PATH, VOICES_PATH, VOICE_PAGES_PATH})
MAX_ID_CHARS = 256
MAX_INACTIVITY_S = 180
MAX_PAGE = 100
"""The most voices in one answer to `VOICE_PAGES_PATH`."""
MAX_SEED = 2**64 - 1
NORMALIZATION = ("auto", "on", "off")
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_CLOSE_CODES: Mapping[str, int] = {"internal": 1011, "overloaded": 1013}
"""`code` in an error message is a close code of WebSockets."""
_STATUSES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    429: "too_many_concurrent_requests",
    503: "system_busy",
}


@dataclass(frozen=True, slots=True)
class Output:
    """A format of mono audio."""

    container: str
    """raw, mp3 or ogg."""
    encoding: str
    """pcm_s16le, pcm_mulaw, pcm_alaw, mp3 or opus."""
    sample_rate: int
    bit_rate: int | None = None
    """Bits a second of mp3 and opus; None otherwise."""


def _outputs() -> dict[str, Output]:
    rates = (8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
    formats = {f"pcm_{rate}": Output("raw", "pcm_s16le", rate) for rate in rates}
    formats["ulaw_8000"] = Output("raw", "pcm_mulaw", 8_000)
    formats["alaw_8000"] = Output("raw", "pcm_alaw", 8_000)
    kilobits = {22_050: (32,), 24_000: (48,), 44_100: (32, 64, 96, 128, 192)}
    for rate, choices in kilobits.items():
        formats |= {f"mp3_{rate}_{k}": Output("mp3", "mp3", rate, 1000 * k) for k in choices}
    formats["mp3_44100"] = Output("mp3", "mp3", 44_100, 128_000)
    for k in (32, 64, 96, 128, 192):
        formats[f"opus_48000_{k}"] = Output("ogg", "opus", 48_000, 1000 * k)
    return formats


OUTPUT_FORMATS = _outputs()
DEFAULT_FORMAT = "mp3_44100_128"


@dataclass(frozen=True, slots=True)
class Query:
    """The query of a request or a handshake."""

    output: Output = OUTPUT_FORMATS[DEFAULT_FORMAT]
    language: str | None = None
    """Lower-case name."""
    seed: int | None = None
    auto_mode: bool = False
    """Whether a message that ends a sentence completes its segment."""
    markup: bool | None = None
    """True if tags are to be followed; None leaves it to the server."""
    inactivity_s: int | None = None
    """Seconds of silence after which the client wants its socket closed."""


@dataclass(frozen=True, slots=True)
class Request:
    """The body of a request."""

    text: str
    language: str | None
    """Lower-case name."""
    seed: int | None
    speed: float | None


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a client's WebSocket."""

    context_id: str | None = None
    """None is the context without an id."""
    text: str | None = None
    """None if the message has no text."""
    flush: bool = False
    close_context: bool = False
    close_socket: bool = False
    speed: float | None = None


def parse_query(fields: Mapping[str, str]) -> Query:
    """Parse a query. Unknown fields are ignored, and so are those that this server has no use for.

    Raises:
        SpeechError: 400 if a field has a value that is not allowed.
    """
    name = fields.get("output_format", DEFAULT_FORMAT)
    if name not in OUTPUT_FORMATS:
        raise _refusal("output_format", f"output_format is unknown: use {' '.join(OUTPUT_FORMATS)}")
    if "single_use_token" in fields:
        raise _refusal("single_use_token", "single_use_token is not supported; send xi-api-key")
    for flag in ("enable_logging", "sync_alignment", "apply_language_text_normalization"):
        _flag(fields, flag)
    normalization = fields.get("apply_text_normalization", "auto")
    if normalization not in NORMALIZATION:
        known = ", ".join(NORMALIZATION)
        raise _refusal(
            "apply_text_normalization", f"apply_text_normalization is unknown; known: {known}"
        )
    return Query(
        output=OUTPUT_FORMATS[name],
        language=_language(fields.get("language_code")),
        seed=_integer(fields, "seed", 0, MAX_SEED),
        auto_mode=_flag(fields, "auto_mode"),
        markup=_flag(fields, "enable_ssml_parsing") or None,
        inactivity_s=_integer(fields, "inactivity_timeout", 1, MAX_INACTIVITY_S),
    )


def parse_request(body: bytes) -> Request:
    """Parse the body of a request for a file. Unknown fields are ignored.

    Raises:
        SpeechError: 400 if the body is malformed. No bytes raise anything else.
    """
    try:
        fields = parse_object(body.decode())
        text = get_string(fields, "text")
        if not text.strip():
            raise ProtocolError("bad_request", "text is empty")
        code = fields.get("language_code")
        return Request(
            text=text,
            language=None if code is None else _language(get_string(fields, "language_code")),
            seed=get_number(fields, "seed", (int,), 0, MAX_SEED),
            speed=_speed(fields),
        )
    except UnicodeDecodeError:
        raise SpeechError(400, "the body is not UTF-8", "bad_request") from None
    except ProtocolError as error:
        raise SpeechError(400, error_line(str(error)), error.code) from None


def parse_message(data: str | bytes, *, multi: bool) -> Message:
    """Parse a client's WebSocket message. Unknown fields are ignored.

    Args:
        data: the message.
        multi: whether the socket has several contexts.

    Raises:
        ProtocolError: the message is malformed. No bytes raise anything else. Its `context_id` is the
            message's, if that could be read.
    """
    fields = parse_object(data)
    context_id = _context_id(fields) if multi else None
    try:
        message = Message(
            context_id=context_id,
            text=get_string(fields, "text") if fields.get("text") is not None else None,
            flush=get_flag(fields, "flush"),
            close_context=multi and get_flag(fields, "close_context"),
            close_socket=multi and get_flag(fields, "close_socket"),
            speed=_speed(fields),
        )
        if message.text is None and not (message.flush or message.close_context or message.close_socket):
            raise ProtocolError("bad_request", "text is missing, expected a string")
        return message
    except ProtocolError as error:
        error.context_id = context_id
        raise


@dataclass(slots=True)
class Alignment:
    """Turns timed words into timed characters, for one context.

    A word's characters share its time equally, and a space of no duration ends it. Times of an
    alignment count from the end of the one before: clients add them up.
    """

    _end_ms: int = 0
    """When the last character ends, in the context's audio."""

    def align(self, words: Sequence[TimedWord], *, ends: bool = False) -> Any:
        """The JSON for words; None if there are none. `ends` says that they end their segment."""
        if not words:
            return None
        start_ms, letters = self._end_ms, _letters(words, start_ms=self._end_ms, ends=ends)
        self._end_ms = letters[-1].end_ms
        return {
            "chars": [letter.char for letter in letters],
            "charStartTimesMs": [letter.start_ms - start_ms for letter in letters],
            "charDurationsMs": [letter.end_ms - letter.start_ms for letter in letters],
        }

    def align_in_seconds(self, words: Sequence[TimedWord], *, ends: bool = False) -> Any:
        """The same for HTTP: seconds from the beginning of the audio."""
        if not words:
            return None
        letters = _letters(words, start_ms=self._end_ms, ends=ends)
        self._end_ms = letters[-1].end_ms
        return {
            "characters": [letter.char for letter in letters],
            "character_start_times_seconds": [letter.start_ms / 1000 for letter in letters],
            "character_end_times_seconds": [letter.end_ms / 1000 for letter in letters],
        }


@dataclass(frozen=True, slots=True)
class _Letter:
    char: str
    start_ms: int
    end_ms: int


def _letters(words: Sequence[TimedWord], *, start_ms: int, ends: bool) -> list[_Letter]:
    letters: list[_Letter] = []
    for number, word in enumerate(words):
        begin = max(start_ms, round(word.time_s * 1000))
        end = max(begin, round(word.end_s * 1000))
        borders = [begin + (end - begin) * n // len(word.text) for n in range(len(word.text) + 1)]
        letters += map(_Letter, word.text, borders, borders[1:])
        if word.spaced or (ends and number == len(words) - 1):
            letters.append(_Letter(" ", end, end))
        start_ms = end
    return letters


def encode_audio(context: Mapping[str, Any], audio: bytes, alignment: Any) -> str:
    """The message with audio, and with the characters that begin in it. `context` is what `name_context`
    gives."""
    return _message(
        audio=base64.b64encode(audio).decode(),
        isFinal=False,
        normalizedAlignment=alignment,
        alignment=alignment,
        **context,
    )


def encode_final(context: Mapping[str, Any]) -> str:
    """The last message of a context."""
    return _message(audio=None, isFinal=True, normalizedAlignment=None, alignment=None, **context)


def encode_error(context: Mapping[str, Any], code: ErrorCode, message: str) -> str:
    """The message for a refusal or a failure."""
    return _message(
        message=error_line(message), error=code, code=_CLOSE_CODES.get(code, 1008), **context
    )


def name_context(context_id: str | None) -> dict[str, Any]:
    """The fields that name a context. Clients read one of the two."""
    return {"contextId": context_id, "context_id": context_id}


def encode_line(audio: bytes, alignment: Any) -> bytes:
    """A line of an answer with times."""
    fields = {
        "audio_base64": base64.b64encode(audio).decode(),
        "alignment": alignment,
        "normalized_alignment": alignment,
    }
    return _message(**fields).encode() + b"\n"


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> Any:
    """The body of an error answer, as ElevenLabs' clients read it."""
    return {"detail": {"status": code or _STATUSES.get(status, "bad_request"), "message": message}}


def voice_object(name: str) -> Any:
    """The JSON of a voice, in ElevenLabs' form."""
    return {"voice_id": name, "name": name, "category": "premade", "labels": {}, "description": ""}


def voice_page(names: Iterable[str], query: Mapping[str, str]) -> Any:
    """The answer to `GET /v2/voices`. The token of the next page is the last name of this one.

    Raises:
        SpeechError: 400 if `page_size` is not a number from 1 to `MAX_PAGE`.
    """
    size = _integer(query, "page_size", 1, MAX_PAGE)
    wanted = query.get("search", "").lower()
    found = sorted(name for name in names if wanted in name.lower())
    rest = [name for name in found if name > query.get("next_page_token", "")]
    page = rest[: size or 10]
    more = len(page) < len(rest)
    return {
        "voices": [voice_object(name) for name in page],
        "has_more": more,
        "total_count": len(found),
        "next_page_token": page[-1] if more else None,
    }


def _message(**fields: Any) -> str:
    return json.dumps(fields, separators=(",", ":"))


def _context_id(fields: dict[str, Any]) -> str | None:
    if fields.get("context_id") is None:
        return None
    context_id = get_string(fields, "context_id")
    if not 1 <= len(context_id) <= MAX_ID_CHARS:
        raise ProtocolError("bad_request", f"context_id must have 1 to {MAX_ID_CHARS} characters")
    return context_id


def _speed(fields: dict[str, Any]) -> float | None:
    """The rate among the voice's settings. Dictionaries would change the speech, so they are refused."""
    locators = fields.get("pronunciation_dictionary_locators")
    if locators is not None and locators != []:
        raise ProtocolError("unsupported", "pronunciation_dictionary_locators is not supported")
    settings = fields.get("voice_settings")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ProtocolError("bad_request", f"voice_settings is {kind(settings)}, expected an object")
    speed: float | None = get_number(settings, "speed", (int, float), MIN_SPEED, MAX_SPEED)
    return speed


def _language(code: str | None) -> str | None:
    return None if code is None else language_name(code.replace("_", "-").partition("-")[0])


def _flag(fields: Mapping[str, str], name: str) -> bool:
    value = fields.get(name, "false").lower()
    if value not in _FLAGS:
        raise _refusal(name, f"{name} must be true or false", "bad_request")
    return _FLAGS[value]


def _integer(fields: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 20 and low <= int(value) <= high):
        raise _refusal(name, f"{name} must be an integer from {low} to {high}", "bad_request")
    return int(value)


def _refusal(name: str, message: str, code: str = "unsupported") -> SpeechError:
    return SpeechError(400, error_line(message), code, name)
