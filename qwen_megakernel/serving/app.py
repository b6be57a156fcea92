"""The ASGI application: its routes, the phase it is in, and how it drains.

    GET /health    200 while the process can work, 503 once the engine has died; needs no token
    GET /ready     200 when turns are taken, else 503; {"phase": "loading" | "warming_up" | ...}
    GET /metrics   Prometheus
    GET /docs      all HTTP routes, described; /openapi.json is the same for machines
    GET /          a page for people with a browser; needs no token

Dialects add their routes. Until a model is loaded, while the server drains and while it is full,
their clients are refused with HTTP 503, a WebSocket's at the handshake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_megakernel.serving import (
    cartesia,
    cartesia_messages,
    deepgram,
    deepgram_messages,
    docs_page,
    elevenlabs,
    elevenlabs_messages,
    openai_messages,
    openai_speech,
    switch,
    vllm_omni,
    vllm_omni_messages,
    voice_library,
    web_page,
)
from qwen_megakernel.serving.access import AccessRules, check_access, find_token
from qwen_megakernel.serving.admission import Admission, AdmissionLimits, NotAdmitted
from qwen_megakernel.serving.observe import Metrics, edge_log, log
from qwen_megakernel.serving.open_sessions import OpenSessions, request_token
from qwen_megakernel.serving.openapi import ServerFacts
from qwen_megakernel.serving.server_state import ENGINE_STOPPED, ServerState
from qwen_megakernel.serving.wire import SpeechError
from qwen_megakernel.turn import RequestError

if TYPE_CHECKING:
    from qwen_megakernel.tts_model import TTSDecoder

FEWEST_CONNECTIONS = 64
"""The fewest connections if their number follows from the slots."""
Phase = Literal["starting", "loading", "warming_up", "ready", "draining", "failed"]
DialectRoutes = Callable[[OpenSessions], Sequence[BaseRoute]]
"""A dialect's routes. They admit their clients to the open sessions, and let `NotAdmitted` pass."""
DIALECTS: tuple[DialectRoutes, ...] = (
    switch.routes,
    openai_speech.routes,
    cartesia.routes,
    deepgram.routes,
    elevenlabs.routes,
    vllm_omni.routes,
    voice_library.routes,
)
ErrorBody = Callable[[int, str, str | None], Any]
ERROR_BODIES: Mapping[str, ErrorBody] = {
    **dict.fromkeys(openai_messages.PATHS, openai_messages.error_body),
    **dict.fromkeys(cartesia_messages.PATHS, cartesia_messages.error_body),
    **dict.fromkeys(elevenlabs_messages.PATHS, elevenlabs_messages.error_body),
    deepgram_messages.PATH: deepgram_messages.error_body,
}
"""Makers of error bodies, by the path of an HTTP request or one above it. Other paths answer
{"error": "..."}."""
SOCKET_ERROR_BODIES: Mapping[str, ErrorBody] = {
    cartesia_messages.SOCKET_PATH: cartesia_messages.error_body,
    deepgram_messages.PATH: deepgram_messages.error_body,
    elevenlabs_messages.SPEECH_PATH: elevenlabs_messages.error_body,
    vllm_omni_messages.PATH: openai_messages.error_body,
}
"""The same for refused handshakes."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The options of the command line for serving."""

    host: str = "127.0.0.1"
    port: int = 8765
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Secrets by the names of their accounts."""
    allow_origins: frozenset[str] = frozenset()
    trusted_proxies: tuple[str, ...] = ()
    """Addresses and networks whose `X-Forwarded-For` the server trusts."""
    max_connections: int | None = None
    """None is twice the decoder's slots, at least 64."""
    spare_sockets: int = 256
    """Open sockets beyond `max_connections`: HTTP, and handshakes that are not accepted yet."""
    request_timeout_s: float = 10.0
    """Time until a request must be complete, and until a handshake must be answered."""
    max_connections_per_address: int = 32
    max_turns_per_address: int = 32
    max_connections_per_token: int = 0
    """0 is no limit, here and in the next field."""
    max_turns_per_token: int = 0
    max_queue_s: float = 10.0
    max_messages_per_s: int = 500
    idle_s: float = 600.0
    max_text_chars: int = 4096
    drain_s: float = 10.0
    openai_voices: Mapping[str, str] = field(default_factory=dict)
    """This server's voices by OpenAI's names. Other names of OpenAI give the default voice."""
    voices_folder: Path | None = None
    """The folder for voices that clients add. Without it they cannot add any."""
    trim_leading_silence: bool = False
    """The choice for clients that make none; likewise the next field."""
    markup: bool = False
    lexicons: Mapping[str | None, Mapping[str, str]] = field(default_factory=dict)
    """Words and respellings by voice. Those under the key None are for all voices."""
    max_lead_s: float = math.inf
    """Seconds of audio that a socket's reply may be ahead of its playback; a dialect may allow less."""

    @property
    def admission(self) -> AdmissionLimits:
        """The limits of connections and turns."""
        return AdmissionLimits(
            max_connections=self.max_connections or FEWEST_CONNECTIONS,
            max_connections_per_address=self.max_connections_per_address,
            max_turns_per_address=self.max_turns_per_address,
            max_connections_per_token=self.max_connections_per_token,
            max_turns_per_token=self.max_turns_per_token,
            max_queue_s=self.max_queue_s,
        )

    @property
    def max_message_bytes(self) -> int:
        """The largest WebSocket message in bytes."""
        # A character takes at most 12 bytes of JSON (an escaped surrogate pair).
        return max(65_536, 12 * self.max_text_chars + 4096)


class App:
    """One server: what it serves, and the phase it is in."""

    def __init__(self, settings: ServerSettings, dialects: Sequence[DialectRoutes] = DIALECTS) -> None:
        self.settings = settings
        self.phase: Phase = "starting"
        self.detail = ""
        self._server: ServerState | None = None
        self._admission = Admission(settings.admission)
        self._sessions = OpenSessions(self._admission, self._get_ready)
        self._metrics = Metrics(
            num_sessions=lambda: len(self._sessions),
            num_slots=lambda: self._server.decoder.num_slots if self._server else 0,
            num_active=lambda: self._server.decoder.num_active if self._server else 0,
            num_waiting=lambda: self._server.decoder.num_waiting if self._server else 0,
            num_unsent_bytes=lambda: self._sessions.unsent_bytes,
            engine_cpu_s=lambda: self._server.decoder.engine_cpu_s if self._server else 0.0,
            is_loaded=lambda: self._server is not None and self._server.decoder.standby.loaded,
            num_warm_frames=lambda: self._server.decoder.standby.num_warm_frames if self._server else 0,
        )
        routes: list[BaseRoute] = [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics_page),
            *web_page.routes(),
        ]
        for dialect_routes in dialects:
            routes += dialect_routes(self._sessions)
        routes += docs_page.routes(
            lambda: routes, ServerFacts(settings.max_text_chars, bool(settings.tokens))
        )
        starlette = Starlette(
            routes=routes,
            exception_handlers={
                NotAdmitted: self._refuse,
                SpeechError: _refuse_speech,
                HTTPException: _refuse_http,
            },
        )
        # By default Starlette refuses a handshake with a 403 that gives no reason.
        starlette.router.default = _unserved(_name_paths(routes))
        rules = AccessRules(settings.host, settings.tokens, settings.allow_origins)
        self.asgi: ASGIApp = _Gate(starlette, rules)

    @property
    def load(self) -> float:
        """The share that is taken: of the slots by turns, or of the connections, whichever is larger.
        At 1 the server is full; above 1 turns wait."""
        if self._server is None:
            return 0.0
        decoder = self._server.decoder
        turns = (decoder.num_active + decoder.num_waiting) / decoder.num_slots
        return max(turns, len(self._sessions) / self._admission.limits.max_connections)

    def report(self, phase: Phase, detail: str = "") -> None:
        """Enter a phase. Any thread may call it."""
        if self.phase not in ("draining", "failed"):
            self.phase, self.detail = phase, detail
            log.info("%s", f"{phase}: {detail}" if detail else phase)

    def start_serving(self, decoder: TTSDecoder) -> None:
        """Take turns from now on."""
        if self.settings.max_connections is None:
            most = max(FEWEST_CONNECTIONS, 2 * decoder.num_slots)
            self._admission.limits = replace(self._admission.limits, max_connections=most)
        self._server = ServerState(
            decoder,
            self._metrics,
            self.settings.max_text_chars,
            self.settings.max_message_bytes,
            self._admission,
            self.settings.max_messages_per_s,
            self.settings.idle_s,
            self.settings.openai_voices,
            self.settings.voices_folder,
            self.settings.trim_leading_silence,
            self.settings.markup,
            self.settings.lexicons,
            self.settings.max_lead_s,
        )
        self.report("ready")

    async def drain(self) -> None:
        """Let running turns end, up to `drain_s`; then stop them and finish every session."""
        self.report("draining")
        if self._server is not None:
            self._server.draining = True
        await self._sessions.drain(self.settings.drain_s)

    async def fail(self) -> None:
        """The engine has died: tell all clients and finish every session."""
        self.report("failed", ENGINE_STOPPED)
        await self._sessions.fail(RequestError("internal", ENGINE_STOPPED))

    async def _health(self, request: Request) -> Response:
        if self._server is not None and self._server.decoder.error is not None:
            return JSONResponse({"status": "engine died"}, 503)
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        phase = self._current_phase()
        body: dict[str, Any] = {"phase": phase, "detail": self.detail}
        if self._server is not None:
            decoder = self._server.decoder
            if decoder.error is not None:
                body["detail"] = f"{type(decoder.error).__name__}: {decoder.error}"
            body |= {
                **decoder.description,
                "voices": sorted(decoder.voices),
                "voice_uploads": self._server.voices_folder is not None,
                "active": decoder.num_active,
                "waiting": decoder.num_waiting,
                "memory": decoder.standby.memory,
                "connections": len(self._sessions),
            }
        return JSONResponse(body, 200 if phase == "ready" else 503)

    async def _metrics_page(self, request: Request) -> Response:
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4")

    async def _refuse(self, request: Request, refusal: Exception) -> Response:
        """The answer to a client that is not admitted. For a WebSocket it refuses the handshake."""
        assert isinstance(refusal, NotAdmitted)
        self._metrics.count_refusal("connection")
        status = 429 if refusal.own_limit else 503
        return _refusal(request.scope, str(refusal), status, {"Retry-After": str(refusal.retry_after_s)})

    def _get_ready(self) -> ServerState:
        phase = self._current_phase()
        if self._server is None or phase != "ready":
            raise NotAdmitted(f"not ready: {phase}")
        return self._server

    def _current_phase(self) -> Phase:
        if self._server is not None and self._server.decoder.error is not None:
            return "failed"
        return self.phase


def _name_paths(routes: Sequence[BaseRoute]) -> str:
    """The sentence that answers a request for a path that no route serves."""
    sockets = [route.path for route in routes if isinstance(route, WebSocketRoute)]
    others = dict.fromkeys(
        route.path
        for route in routes
        if isinstance(route, Route) and "{" not in route.path and route.path not in sockets
    )
    return (
        f"this path is not served; a WebSocket connects to {', '.join(sockets)}, "
        f"and HTTP has {', '.join(others)}"
    )


async def _refuse_speech(request: Request, refusal: Exception) -> Response:
    """The answer to a handshake whose query cannot be served."""
    assert isinstance(refusal, SpeechError)
    return _refusal(request.scope, str(refusal), refusal.status, code=refusal.code)


async def _refuse_http(request: Request, refusal: Exception) -> Response:
    """The answer to a method that a path does not have."""
    assert isinstance(refusal, HTTPException)
    headers = dict(refusal.headers or {})
    if refusal.status_code == 405:
        headers["Allow"] = _name_methods(request)
    return _refusal(request.scope, refusal.detail, refusal.status_code, headers)


def _name_methods(request: Request) -> str:
    """The methods of all routes of a request's path. Starlette names only those of the first route."""
    methods: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def _unserved(message: str) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await _refusal(scope, message, 404)(scope, receive, send)

    return answer


def _refusal(
    scope: Scope,
    message: str,
    status: int,
    headers: Mapping[str, str] | None = None,
    code: str | None = None,
) -> Response:
    """An error answer. A refused handshake also goes to the log."""
    if scope["type"] == "websocket":
        edge_log.info(f"handshake refused with {status}: {message}")
    bodies = SOCKET_ERROR_BODIES if scope["type"] == "websocket" else ERROR_BODIES
    path = PurePosixPath(scope["path"])
    found = (bodies.get(str(each)) for each in (path, *path.parents))
    error_body = next((body for body in found if body is not None), None)
    body = {"error": message} if error_body is None else error_body(status, message, code)
    return JSONResponse(body, status, headers)


class _Gate:
    """Lets through what `check_access` allows; answers the rest itself, WebSocket handshakes too."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, headers, query = scope["path"], scope["headers"], scope["query_string"]
        refusal = check_access(self._rules, path, headers, query, kind=scope["type"])
        if refusal is None:
            request_token.set(find_token(self._rules, scope["headers"], scope["query_string"]))
            await self._app(scope, receive, send)
            return
        challenge = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
        await _refusal(scope, refusal.message, refusal.status, challenge)(scope, receive, send)
