"""The simple protocol (`simple_messages.py`): each text is a context of one turn.

The text of the last context may still grow ("live", `"more": true`).
"""

from __future__ import annotations

from itertools import count

from qwen_megakernel.serving.events import (
    ContextAudio,
    ContextDone,
    ContextEvent,
    ContextFailed,
    Figures,
    SessionFailed,
)
from qwen_megakernel.serving.options import SpeechOptions
from qwen_megakernel.serving.session import Session
from qwen_megakernel.serving.session_rules import SessionRules
from qwen_megakernel.serving.simple_messages import (
    Cancel,
    Speak,
    encode_done,
    encode_error,
    encode_failed,
    parse_client_message,
)
from qwen_megakernel.serving.wire import ProtocolError
from qwen_megakernel.turn import FinishReason, RequestError

MAX_QUEUED = 8
RULES = SessionRules(
    max_contexts=1 + MAX_QUEUED,
    when_full=f"{MAX_QUEUED} texts are waiting on this connection",
    max_lead_s=30.0,
    one_turn=True,
    own_ids=True,
)


class SimpleDialect:
    """One client's dialogue."""

    def __init__(self, session: Session) -> None:
        session.rules = RULES
        self._session = session
        self._numbers = count(1)
        self._last_id = ""

    def receive(self, data: str | bytes) -> None:
        """Act on one message of the client. A refused one gets an error and changes nothing."""
        try:
            message = parse_client_message(data)
            if isinstance(message, Cancel):
                self._cancel()
            else:
                self._speak(message)
        except RequestError as error:
            self._session.reply(encode_error(error.code, str(error), error.retry_after_s))
        except ProtocolError as error:
            self._session.reply(encode_error(error.code, str(error)))

    def translate(self, event: ContextEvent | SessionFailed) -> list[str | bytes]:
        """The messages to send for an event."""
        match event:
            case ContextAudio(samples=samples):
                return [samples.astype("<f4", copy=False).tobytes()]
            case ContextDone(reason=reason, figures=figures):
                return [_done(reason, figures)]
            case ContextFailed(begun=False):
                return [encode_error(event.code, event.message, event.retry_after_s)]
            case SessionFailed():
                return [encode_error(event.code, event.message)]
            case ContextFailed(context_id, figures=figures):
                message = f"turn {self._session.name}-{context_id} failed: {event.message}"
                num_samples, generation_s = figures.num_samples, figures.generation_s
                return [encode_failed(message, samples=num_samples, generation_s=generation_s)]
        return []

    def _cancel(self) -> None:
        if self._session.busy:
            self._session.cancel()
        else:
            self._session.reply(_done("cancelled", Figures(0, 0.0, None, None)))

    def _speak(self, message: Speak) -> None:
        if self._session.takes_text(self._last_id):
            self._session.append(self._last_id, message.text, ended=not message.more)
            return
        if not (message.more or message.text.strip()):
            raise ProtocolError("bad_request", "text is empty")
        self._session.check_room()
        self._last_id = str(next(self._numbers))
        self._session.append(self._last_id, message.text, self._choices(message), ended=not message.more)

    def _choices(self, message: Speak) -> SpeechOptions:
        server = self._session.server
        voice = server.voice_name(message.voice)
        if message.language not in server.decoder.languages:
            known = ", ".join(server.decoder.languages)
            raise ProtocolError("unknown_language", f"language is unknown; known: {known}")
        return SpeechOptions(
            voice=voice,
            language=message.language,
            temperature=message.temperature,
            top_k=message.top_k,
            seed=message.seed,
            chunk_frames=message.chunk_frames,
        )


def _done(reason: FinishReason, figures: Figures) -> str:
    return encode_done(
        finish_reason=reason,
        samples=figures.num_samples,
        generation_s=figures.generation_s,
        ttfc_s=figures.ttfc_s,
        rtf=figures.rtf,
    )
