"""vLLM-Omni's speech over a WebSocket as data: messages and errors. Standard library only.

WebSocket /v1/audio/speech/stream   utterances in pieces, one after the other
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from qwen_megakernel.serving.message_rules import MAX_SPEED, MIN_SPEED
from qwen_megakernel.serving.openai_messages import RESPONSE_FORMATS, ResponseFormat
from qwen_megakernel.serving.wire import (
    ErrorCode,
    ProtocolError,
    error_line,
    get_flag,
    get_number,
    get_string,
    language_name,
    parse_object,
)

PATH = "/v1/audio/speech/stream"
SPLITS = ("none", "sentence", "clause")
MAX_INSTRUCTIONS_CHARS = 1000
_MAX_SEED = 2**64 - 1
_REFUSED = {
    "ref_audio": "add the voice to the server",
    "ref_text": "add the voice to the server",
    "speaker_embedding": "add the voice to the server",
    "references": "add the voice to the server",
}
"""Fields that would change the speech, and what to do instead."""


@dataclass(frozen=True, slots=True)
class Config:
    """How the utterances that follow are spoken."""

    voice: str | None = None
    """None is the default voice."""
    language: str | None = None
    """Lower-case name."""
    instructions: str | None = None
    response_format: ResponseFormat = "wav"
    speed: float | None = None
    seed: int | None = None
    split: Literal["none", "sentence", "clause"] = "none"
    """Which message completes a sentence: none, one that ends a sentence, or one that ends a clause."""


@dataclass(frozen=True, slots=True)
class Text:
    """More text of an utterance."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The utterance's text is complete."""


@dataclass(frozen=True, slots=True)
class Close:
    """Speak all text so far, then close."""


Message = Config | Text | Done | Close


def parse_message(data: str | bytes) -> Message:
    """Parse a client's message. Unknown fields are ignored.

    Raises:
        ProtocolError: the message is malformed. No bytes raise anything else.
    """
    fields = parse_object(data)
    match get_string(fields, "type"):
        case "session.config":
            return _config(fields)
        case "input.text":
            return Text(get_string(fields, "text"))
        case "input.done":
            return Done()
        case "session.close":
            return Close()
    known = "session.config, input.text, input.done, session.close"
    raise ProtocolError("bad_request", f"type is unknown, expected {known}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sentence is: in which utterance, and its number there."""

    utterance: int
    sentence: int


def encode_start(place: Place, text: str, audio_format: str, sample_rate: int) -> str:
    """The message before a sentence's audio. Raw audio has no header, so its rate is told here."""
    raw = {"sample_rate": sample_rate, "channels": 1} if audio_format == "pcm" else {}
    return _message("audio.start", **_indices(place), sentence_text=text, format=audio_format, **raw)


def encode_done(place: Place, num_bytes: int, *, failed: bool) -> str:
    """The message behind a sentence's audio."""
    return _message("audio.done", **_indices(place), total_bytes=num_bytes, error=failed)


def encode_session_done(utterance: int, num_sentences: int) -> str:
    """The message behind an utterance."""
    return _message("session.done", utterance_index=utterance, total_sentences=num_sentences)


def encode_error(code: ErrorCode, message: str, *, partial: bool = False) -> str:
    """The message for a refusal or a failure. `partial` means that audio of the sentence was sent."""
    discard = {"partial_audio": True, "action": "discard"} if partial else {}
    return _message("error", message=error_line(message), code=code, **discard)


def _config(fields: dict[str, Any]) -> Config:
    for name, instead in _REFUSED.items():
        if fields.get(name) is not None:
            raise ProtocolError("unsupported", f"{name} is not supported; {instead}")
    if get_flag(fields, "word_timestamps"):
        raise ProtocolError("unsupported", "word_timestamps is not supported; leave it out")
    audio_format = _choice(fields, "response_format", RESPONSE_FORMATS, "wav")
    if get_flag(fields, "stream_audio") and audio_format != "pcm":
        raise ProtocolError("bad_request", "stream_audio needs the response_format pcm")
    language = _string(fields, "language")
    instructions = _string(fields, "instructions")
    if instructions is not None and len(instructions) > MAX_INSTRUCTIONS_CHARS:
        raise ProtocolError(
            "bad_request", f"instructions is longer than {MAX_INSTRUCTIONS_CHARS} characters"
        )
    return Config(
        voice=_string(fields, "voice") or _string(fields, "speaker") or None,
        language=None if language is None else language_name(language),
        instructions=instructions if instructions and instructions.strip() else None,
        response_format=audio_format,
        speed=get_number(fields, "speed", (int, float), MIN_SPEED, MAX_SPEED),
        seed=get_number(fields, "seed", (int,), 0, _MAX_SEED),
        split=_choice(fields, "split_granularity", SPLITS, "none"),
    )


def _string(fields: dict[str, Any], key: str) -> str | None:
    return None if fields.get(key) is None else get_string(fields, key)


def _choice(fields: dict[str, Any], key: str, known: tuple[Any, ...], default: str) -> Any:
    value = _string(fields, key)
    if value is not None and value not in known:
        raise ProtocolError("bad_request", f"{key} is unknown; known: {', '.join(known)}")
    return default if value is None else value


def _indices(place: Place) -> dict[str, int]:
    return {"utterance_index": place.utterance, "sentence_index": place.sentence}


def _message(message_type: str, **fields: Any) -> str:
    return json.dumps({"type": message_type, **fields}, separators=(",", ":"))
