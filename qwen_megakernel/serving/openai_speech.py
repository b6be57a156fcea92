"""OpenAI's speech API over HTTP (docs/PROTOCOL.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from qwen_megakernel.serving.audio_encoding import FileFormat
from qwen_megakernel.serving.http_speech import FileAnswer, SpokenFile
from qwen_megakernel.serving.open_sessions import OpenSessions
from qwen_megakernel.serving.openai_messages import (
    AUDIO_MODELS_PATH,
    MODEL_NAMES,
    MODELS_PATH,
    SPEECH_PATH,
    VOICES_PATH,
    audio_model_list,
    delta_event,
    done_event,
    error_body,
    error_event,
    find_voice,
    model_list,
    parse_speech,
)
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.spoken_text import Span
from qwen_megakernel.serving.voice_messages import voice_entry
from qwen_megakernel.serving.wire import error_line
from qwen_megakernel.turn import ErrorCode, RequestError

FORMATS = {
    "mp3": FileFormat("mp3", "mp3"),
    "opus": FileFormat("ogg", "opus"),
    "aac": FileFormat("adts", "aac"),
    "flac": FileFormat("flac", "flac"),
    "wav": FileFormat("wav", "pcm_s16le"),
    "pcm": FileFormat("raw", "pcm_s16le"),
}
"""The files that `response_format` can name."""
_PARAMS: dict[ErrorCode, str] = {
    "unknown_voice": "voice",
    "unknown_language": "language",
    "text_too_long": "input",
}


def routes(sessions: OpenSessions) -> list[BaseRoute]:
    """The routes of speech, voices and models."""

    async def speak(request: Request) -> Response:
        return FileAnswer(sessions, _OpenAI())

    async def list_voices(request: Request) -> Response:
        voices = sessions.get_ready().decoder.voices
        entries = [voice_entry(name, voices[name].mode, voices[name].notes) for name in sorted(voices)]
        return JSONResponse({"voices": entries})

    async def list_models(request: Request) -> Response:
        model = sessions.get_ready().decoder.description["model"]
        return JSONResponse(model_list([model, *MODEL_NAMES]))

    async def list_audio_models(request: Request) -> Response:
        model = sessions.get_ready().decoder.description["model"]
        return JSONResponse(audio_model_list([model, *MODEL_NAMES]))

    return [
        Route(SPEECH_PATH, speak, methods=["POST"]),
        Route(VOICES_PATH, list_voices),
        Route(MODELS_PATH, list_models),
        Route(AUDIO_MODELS_PATH, list_audio_models),
    ]


class OpenAIErrors:
    """The error answers of OpenAI's API."""

    def error_body(self, status: int, message: str, code: str | None, param: str | None) -> Any:
        """See `ErrorDialect`."""
        return error_body(status, message, code, param)

    def param_of(self, code: ErrorCode) -> str | None:
        """See `ErrorDialect`."""
        return _PARAMS.get(code)


class _OpenAI(OpenAIErrors):
    def read(self, request: Request, body: bytes, server: ServerState) -> SpokenFile:
        asked = parse_speech(body)
        choices = SpeechOptions(
            voice=find_voice(asked.voice, server.voice_aliases, server.decoder.voices),
            language=asked.language,
            instruct=asked.instructions,
            seed=asked.seed,
            trim_leading_silence=asked.trim_leading_silence,
            markup=asked.markup,
            lexicon=asked.lexicon,
            speed=asked.speed,
        )
        framing = _Events() if asked.as_events else None
        return SpokenFile(asked.text, choices, FORMATS[asked.response_format], framing=framing)


class _Events:
    media_type = "text/event-stream"

    def begin(self, spans: Sequence[Span]) -> None:
        pass

    def hear(self, samples: np.ndarray) -> None:
        pass

    def delta(self, audio: bytes) -> bytes:
        return delta_event(audio)

    def done(self) -> bytes:
        return done_event()

    def error(self, failure: RequestError) -> bytes:
        return error_event(error_line(str(failure)), failure.code)
