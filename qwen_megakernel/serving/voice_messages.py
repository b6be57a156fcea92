"""The voice library's requests and answers as data (docs/PROTOCOL.md). Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_megakernel.serving.wire import SpeechError

UPLOADED = "upload"
"""The note `origin` of a voice that a client added. Only such a voice can be deleted."""
ALIASES = {"audio_sample": "recording", "ref_text": "transcript"}
"""Names of fields that clients of other servers send."""
MAX_CONSENT_CHARS = 500
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""The names that a client may give a voice."""
_NO_CONSENT = {"", "false", "0", "no", "off", "none", "null"}


@dataclass(frozen=True, slots=True)
class NewVoice:
    """The voice that a client wants to add: a recording of a speaker who agrees, or a description."""

    name: str
    recording: bytes | None = None
    """A WAV or FLAC file."""
    transcript: str | None = None
    """The words of the recording."""
    consent: str | None = None
    """The client's statement that the speaker agrees, in its own words."""
    description: str | None = None


def parse_new_voice(fields: Mapping[str, str | bytes]) -> NewVoice:
    """Parse the fields of `POST /v1/audio/voices`: texts, and the content of files.

    Raises:
        SpeechError: 400, with the name of the wrong field.
    """
    given = {ALIASES.get(name, name): value for name, value in fields.items()}
    name = _text(given, "name")
    if not NAME.fullmatch(name):
        raise _wrong("name", "name must be 1 to 64 letters, digits, - and _, a letter or digit first")
    recording, description = given.get("recording"), _text(given, "description")
    if description:
        if recording is not None:
            raise _wrong("description", "a voice has a recording or a description, both are given")
        return NewVoice(name, description=description)
    if recording is None:
        raise _wrong("recording", "recording is missing: send a WAV or FLAC file, or a description")
    if isinstance(recording, str):
        raise _wrong("recording", "recording must be a file, with a filename in its part's header")
    consent = _text(given, "consent")
    if consent.lower() in _NO_CONSENT:
        raise _wrong("consent", "consent is missing: only voices whose owner agreed may be added")
    if len(consent) > MAX_CONSENT_CHARS:
        raise _wrong("consent", f"consent is longer than {MAX_CONSENT_CHARS} characters")
    return NewVoice(name, recording, _text(given, "transcript") or None, consent)


def voice_entry(name: str, kind: str, notes: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of one voice."""
    return {
        "id": name,
        "name": name,
        "kind": kind,
        "created_at": notes.get("created"),
        "removable": notes.get("origin") == UPLOADED,
    }


def _text(fields: Mapping[str, str | bytes], name: str) -> str:
    value = fields.get(name, "")
    if isinstance(value, bytes):
        raise _wrong(name, f"{name} must be text, not a file")
    if any("\ud800" <= char <= "\udfff" for char in value):  # some encodings can carry surrogates
        raise _wrong(name, f"{name} has half of a surrogate pair")
    return value.strip()


def _wrong(name: str, message: str) -> SpeechError:
    return SpeechError(400, message, "bad_request", name)
