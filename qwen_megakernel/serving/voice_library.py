"""Voices that clients add to the operator's folder, and delete again (docs/PROTOCOL.md).

A server has a library only if it has such a folder. Clients can speak with the operator's voices and
cannot delete them. A recording becomes a voice in a thread that yields to all others, one recording at
a time, so that nobody's speech waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive

from qwen_megakernel.serving.access import client_address
from qwen_megakernel.serving.http_speech import FileAnswer, SpokenFile, refusal_of
from qwen_megakernel.serving.observe import log
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.openai_messages import VOICES_PATH
from qwen_megakernel.serving.openai_speech import FORMATS, OpenAIErrors
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.voice_messages import UPLOADED, NewVoice, parse_new_voice, voice_entry
from qwen_megakernel.serving.wire import SpeechError
from qwen_megakernel.turn import RequestError

if TYPE_CHECKING:
    from qwen_megakernel.prompt.voice import Voice

MAX_BODY_BYTES = (20 << 20) + 65_536
"""A recording of 20 MiB, and 64 KiB for the texts beside it."""
MAX_VOICES = 200
"""The most voices that clients may have added."""
MAX_PER_MINUTE = 10
"""The most requests to add a voice in a minute, of all clients together."""
MAX_UPLOADS = 4
"""The most request bodies that are held at a time."""
PREVIEW = "This is how I sound. I can say whatever you like."
_ERRORS = OpenAIErrors()
_WAV = FORMATS["wav"]
_MAX_FIELDS = 8
_MAX_FIELD_BYTES = 16_384


def routes(sessions: OpenSessions) -> list[BaseRoute]:
    """The library's routes. Every server also lists its voices, so that route is not here."""
    uploads = _Uploads()

    async def add(request: Request) -> Response:
        with sessions.admit(client_address(request.scope["client"])) as session:
            try:
                folder = _folder_of(session.server)
                async with uploads.enter():
                    new = parse_new_voice(await _read_form(request))
                    async with uploads.one_at_a_time:
                        entry = await _add(session.server, folder, new)
            except (SpeechError, RequestError) as error:
                return refusal_of(_ERRORS, error)
            except ClientDisconnect:
                return Response(status_code=400)
        return JSONResponse(entry, 201)

    async def describe(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            return JSONResponse(_entry(name, _find(sessions.get_ready(), name)))
        except SpeechError as error:
            return refusal_of(_ERRORS, error)

    async def remove(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            async with uploads.one_at_a_time:
                await _remove(sessions.get_ready(), name)
        except SpeechError as error:
            return refusal_of(_ERRORS, error)
        return JSONResponse({"id": name, "deleted": True})

    async def preview(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            _find(sessions.get_ready(), name)
        except SpeechError as error:
            return refusal_of(_ERRORS, error)
        return FileAnswer(sessions, _Preview(name))

    one = VOICES_PATH + "/{name}"
    return [
        Route(VOICES_PATH, add, methods=["POST"]),
        Route(one, describe),
        Route(one, remove, methods=["DELETE"]),
        Route(one + "/preview", preview, methods=["POST"]),
    ]


class _Preview(OpenAIErrors):
    """Speaks a fixed sentence with a voice. It ignores the body."""

    def __init__(self, voice: str) -> None:
        self._voice = voice

    def read(self, request: Request, body: bytes, server: ServerState) -> SpokenFile:
        """See `FileDialect`."""
        return SpokenFile(PREVIEW, SpeechOptions(voice=self._voice, language="english", seed=0), _WAV)


class _Uploads:
    """Limits how many clients may add a voice at a time, and how often."""

    def __init__(self) -> None:
        self.one_at_a_time = asyncio.Lock()
        self._num_open = 0
        self._begun: deque[float] = deque(maxlen=MAX_PER_MINUTE)

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Count an upload. Raises `RequestError` if there are too many."""
        now = time.monotonic()
        if len(self._begun) == MAX_PER_MINUTE and now - self._begun[0] < 60.0:
            wait_s = 60.0 - (now - self._begun[0])
            raise RequestError("overloaded", f"{MAX_PER_MINUTE} voices a minute can be added", wait_s)
        if self._num_open >= MAX_UPLOADS:
            raise RequestError("overloaded", "other voices are being added", 2.0)
        self._begun.append(now)
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1


def _folder_of(server: ServerState) -> Path:
    server.check_accepting()
    if server.voices_folder is None:
        message = "this server keeps no voices; its operator can start it with --voices DIR"
        raise SpeechError(403, message, "unsupported")
    return server.voices_folder


async def _read_form(request: Request) -> dict[str, str | bytes]:
    """The fields of a multipart body, with files as bytes. Raises `SpeechError` if it is malformed."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise SpeechError(400, "the body must be multipart/form-data", "bad_request")
    request = Request(request.scope, _limited(request.receive))
    form = request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
    try:
        async with form as fields:
            return {
                name: await value.read() if isinstance(value, UploadFile) else value
                for name, value in fields.items()
            }
    except HTTPException as error:
        raise SpeechError(400, f"the form cannot be read: {error.detail}", "bad_request") from None
    except UnicodeError as error:  # a form can name an encoding that decodes nothing
        raise SpeechError(400, f"the form's charset cannot be read: {error}", "bad_request") from None


def _limited(receive: Receive) -> Receive:
    num_bytes = 0

    async def receive_within_limit() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise SpeechError(413, f"the body is longer than {MAX_BODY_BYTES} bytes", "bad_request")
        return message

    return receive_within_limit


async def _add(server: ServerState, folder: Path, new: NewVoice) -> dict[str, Any]:
    decoder = server.decoder
    if new.name.lower() in {name.lower() for name in decoder.voices}:
        raise SpeechError(409, f"a voice {new.name} exists already", "bad_request", "name")
    if sum(map(_is_uploaded, decoder.voices.values())) >= MAX_VOICES:
        raise SpeechError(409, f"{MAX_VOICES} voices were added already: delete one", "bad_request")
    voice = await _make(server, new)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    voice = voice.with_notes(origin=UPLOADED, created=now, consent=new.consent or "")
    path = folder / f"{new.name}.safetensors"
    try:
        await asyncio.to_thread(voice.save, path)
    except OSError as error:
        message = f"the server cannot write to its folder of voices: {error.strerror}"
        raise SpeechError(507, message, "internal") from None
    decoder.add_voice(new.name, voice)
    log.info("voice %s was added (%s)", new.name, voice.mode)
    return _entry(new.name, voice)


async def _make(server: ServerState, new: NewVoice) -> Voice:
    param = "description" if new.recording is None else "recording"
    try:
        if new.recording is None:
            return server.decoder.design_voice(new.description or "")
        return await asyncio.wrap_future(server.decoder.clone_voice_aside(new.recording, new.transcript))
    except RequestError:
        raise
    except ValueError as error:  # a `VoiceError`, which says what was given and what is allowed
        raise SpeechError(400, str(error), "bad_request", param) from None


async def _remove(server: ServerState, name: str) -> None:
    folder, voice = server.voices_folder, _find(server, name)
    if folder is None or not _is_uploaded(voice):
        raise SpeechError(403, f"the voice {name} is the operator's", "unsupported")
    await asyncio.to_thread((folder / f"{name}.safetensors").unlink, missing_ok=True)
    server.decoder.remove_voice(name)
    log.info("voice %s was deleted", name)


def _find(server: ServerState, name: str) -> Voice:
    voice = server.decoder.voices.get(name)
    if voice is None:
        raise SpeechError(404, f"the voice {name[:64]} is unknown", "unknown_voice")
    return voice


def _is_uploaded(voice: Voice) -> bool:
    return voice.notes.get("origin") == UPLOADED


def _entry(name: str, voice: Voice) -> dict[str, Any]:
    return voice_entry(name, voice.mode, voice.notes)
