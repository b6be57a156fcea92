"""Messages of the simple protocol: JSON text in, float32 audio and JSON text out.

Sans-IO and standard library only, so that server, clients and fuzzers share one definition: bytes
and strings go in, values come out.

Client to server, one JSON object per text message:

    {"text": "...", "language", "temperature", "top_k", "speaker_ref", "chunk_tokens", "seed"}
        Speak. Only `text` is required; null means absent; unknown keys are ignored. While a turn
        runs on the connection, the next ones wait in a queue and are spoken in order.
    {"text": "...", "more": true}
        Live text. Opens a turn whose text is not complete; further messages append to it (their
        other keys are ignored), and the first one without `more` ends it: {"text": "", "more": false}.
    {"cancel": true}
        Stop the running turn at the next frame and forget the queued ones.

Server to client:

    binary     raw float32 little-endian samples, mono, 24 kHz
    {"done": true, "duration_s", "generation_s", "ttfc_ms", "rtf", "samples", "finish_reason"}
        A turn is over. Each turn has one, and so has a cancelled turn. A `cancel` that finds nothing to
        stop gets an empty one, so that a client never waits in vain.
    {"error": "...", "code": "..."}
        A message was refused, and the connection goes on. An overloaded server may add
        "retry_after_s": seconds after which the client may send the text again. With "done": true, a
        turn that had begun has failed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from qwen_megakernel.serving.wire import (
    ProtocolError,
    error_line,
    get_flag,
    get_number,
    get_string,
    language_name,
    parse_object,
)

VOICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Speak:
    """Text to speak. A field that is None leaves the choice to the server."""

    text: str
    more: bool = False
    """Whether the turn's text goes on in a later message."""
    language: str = "auto"
    """Lower-case name."""
    voice: str | None = None
    """`speaker_ref` on the wire: the name of a voice of the server, never a path."""
    temperature: float | None = None
    """Temperature of the talker; 0 takes the most likely code."""
    top_k: int | None = None
    """Top-k of the talker; 0 keeps all codes."""
    seed: int | None = None
    chunk_frames: int | None = None
    """`chunk_tokens` on the wire: frames of 80 ms in one binary message."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop the running turn, and forget the queued ones."""


def parse_client_message(data: str | bytes) -> Speak | Cancel:
    """Parse one WebSocket message.

    Raises:
        ProtocolError: the message is malformed. No bytes raise anything else.
    """
    fields = parse_object(data)
    if get_flag(fields, "cancel"):
        return Cancel()
    if "text" not in fields:
        raise ProtocolError("bad_request", 'neither "text" nor "cancel": true in the message')
    return Speak(
        text=get_string(fields, "text"),
        more=get_flag(fields, "more"),
        language=_language(fields),
        voice=_voice(fields),
        temperature=get_number(fields, "temperature", (int, float), 0, 10),
        top_k=get_number(fields, "top_k", (int,), 0, 1 << 16),
        seed=get_number(fields, "seed", (int,), 0, 2**64 - 1),
        chunk_frames=get_number(fields, "chunk_tokens", (int,), 1, 64),
    )


def encode_done(
    *, finish_reason: str, samples: int, generation_s: float, ttfc_s: float | None, rtf: float | None
) -> str:
    """The last message of a turn. Figures are 0 if nothing was spoken."""
    return json.dumps(_done_fields(finish_reason, samples, generation_s, ttfc_s, rtf))


def encode_failed(message: str, *, samples: int, generation_s: float) -> str:
    """The last message of a turn that has failed: an error that is also a `done`."""
    done = _done_fields("error", samples, generation_s, None, None)
    return json.dumps({**_error_fields("internal", message), **done})


def encode_error(code: str, message: str, retry_after_s: float | None = None) -> str:
    """The answer to a refused message."""
    later = {} if retry_after_s is None else {"retry_after_s": retry_after_s}
    return json.dumps({**_error_fields(code, message), **later})


def _error_fields(code: str, message: str) -> dict[str, Any]:
    return {"error": error_line(message), "code": code}


def _done_fields(
    finish_reason: str, samples: int, generation_s: float, ttfc_s: float | None, rtf: float | None
) -> dict[str, Any]:
    return {
        "done": True,
        "duration_s": round(samples / 24_000, 4),
        "generation_s": round(generation_s, 4),
        "ttfc_ms": round((ttfc_s or 0.0) * 1000, 2),
        "rtf": round(rtf or 0.0, 4),
        "samples": samples,
        "finish_reason": finish_reason,
    }


def _language(fields: dict[str, Any]) -> str:
    if fields.get("language") is None:
        return "auto"
    name = language_name(get_string(fields, "language"))
    if len(name) > 40:
        raise ProtocolError("unknown_language", "language is longer than any name of a language")
    return name


def _voice(fields: dict[str, Any]) -> str | None:
    if fields.get("speaker_ref") is None:
        return None
    name = get_string(fields, "speaker_ref")
    if not name:
        return None
    if not VOICE_NAME.fullmatch(name):
        raise ProtocolError(
            "unknown_voice",
            "speaker_ref must be the name of a voice on the server (letters, digits, _ and -), "
            "not a path, an address or audio",
        )
    return name
