"""The original dialect on `/`: messages of `protocol.py` to turns, one spoken at a time.

A connection may have nine turns: the first runs, the others wait. The last one may still be
growing ("live", `"more": true`).
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.serving.server_state import ServerState, SpokenTurn, TurnOptions
from qwen_megakernel.serving.simple_messages import (
    Cancel,
    Speak,
    encode_done,
    encode_error,
    encode_failed,
    parse_client_message,
)
from qwen_megakernel.serving.wire import ProtocolError
from qwen_megakernel.turn import Audio, Finished, RequestError, TurnEvent

MAX_QUEUED = 8
MAX_LEAD_S = 30.0
"""How far generation may run ahead of real time."""

_NOTHING_DONE = encode_done(
    finish_reason="cancelled", samples=0, generation_s=0.0, ttfc_s=None, rtf=None
)

Item = str | tuple[SpokenTurn, TurnEvent]
"""What waits for the writer: a reply, or an event of a turn."""
Send = Callable[[str | bytes], Awaitable[None]]


class OriginalDialect:
    """One client's dialogue. `receive` belongs to the reader, `write` to the writer."""

    def __init__(self, speech: ServerState, name: str, post: Callable[[Item], None]) -> None:
        """`post` puts an item into the writer's queue."""
        self._speech = speech
        self._name = name
        self._post = post
        self._turns: deque[SpokenTurn] = deque()
        self._turn_numbers = count(1)
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a turn runs."""
        return bool(self._turns)

    @property
    def unsent_bytes(self) -> int:
        """Audio that waits for the socket."""
        return sum(turn.unsent_bytes for turn in self._turns)

    def receive(self, data: str | bytes) -> None:
        """Follow one message of the client; a refused one is answered and otherwise forgotten."""
        try:
            message = parse_client_message(data)
            if isinstance(message, Cancel):
                self.cancel()
            else:
                self._speak(message)
        except (ProtocolError, RequestError) as error:
            self._post(encode_error(error.code, str(error)))

    def cancel(self) -> None:
        """Stop the running turn and forget the queued ones; each is answered by a `done`."""
        if not self._turns:
            self._post(_NOTHING_DONE)
            return
        self._turns[0].cancel()
        while len(self._turns) > 1:
            self._turns.pop()
            self._post(_NOTHING_DONE)

    def drain(self) -> None:
        """Refuse the queued turns; the running one goes on."""
        while len(self._turns) > 1:
            self._turns.pop()
            self._post(encode_error("overloaded", "the server is shutting down"))

    async def write(self, item: Item, send: Send) -> None:
        """Put one posted item on the wire."""
        if isinstance(item, str):
            await send(item)
            return
        turn, event = item
        if isinstance(event, Audio):
            turn.mark_taken(event)
            if not turn.cancelled:
                await send(event.samples.astype("<f4", copy=False).tobytes())
                turn.mark_sent(len(event.samples))
        elif isinstance(event, Finished):
            # Nothing may be awaited before the queue is in order again: the reader uses it too.
            last_message = self._close_turn(turn, event)
            self._open_next()
            await send(last_message)

    def close(self) -> None:
        """The client is gone: stop its turns now."""
        self._closed = True
        for turn in self._turns:
            turn.cancel()

    def discard(self, item: Item) -> None:
        """Account for an item that can no longer be written."""
        if not isinstance(item, str) and isinstance(item[1], Finished):
            self._close_turn(item[0], item[1])

    def _speak(self, message: Speak) -> None:
        turn = self._turns[-1] if self._turns else None
        if turn is None or not turn.takes_text:
            self._begin(message)
            return
        turn.append(message.text)
        if not message.more:
            turn.end()

    def _begin(self, message: Speak) -> None:
        if not (message.more or message.text.strip()):
            raise ProtocolError("bad_request", "text is empty")
        self._speech.check_accepting()
        if len(self._turns) > MAX_QUEUED:
            raise ProtocolError("overloaded", f"{MAX_QUEUED} texts are waiting on this connection")
        name = f"{self._name}-{next(self._turn_numbers)}"
        turn = SpokenTurn(self._speech, name, self._options(message), self._deliver)
        turn.append(message.text)
        if not message.more:
            turn.end()
        if not self._turns:
            turn.open()
        self._turns.append(turn)

    def _options(self, message: Speak) -> TurnOptions:
        decoder = self._speech.decoder
        voice = self._speech.voice_name(message.voice)
        if message.language not in decoder.languages:
            known = ", ".join(decoder.languages)
            raise ProtocolError("unknown_language", f"language is unknown; known: {known}")
        params = GenerationParams()
        talker = params.talker
        if message.temperature is not None:
            talker = replace(talker, temperature=message.temperature)
        if message.top_k is not None:
            talker = replace(talker, top_k=message.top_k)
        # Without a seed every take differs; the log has the seed of each.
        seed = secrets.randbits(32) if message.seed is None else message.seed
        return TurnOptions(
            params=replace(params, talker=talker, seed=seed),
            voice=voice,
            language=message.language,
            chunk_frames=message.chunk_frames,
            max_lead_s=MAX_LEAD_S,
        )

    def _deliver(self, turn: SpokenTurn, event: TurnEvent) -> None:
        if self._closed:
            self.discard((turn, event))
            return
        if isinstance(event, Audio):
            turn.mark_waiting(event)
        self._post((turn, event))

    def _close_turn(self, turn: SpokenTurn, finished: Finished) -> str:
        self._turns.remove(turn)
        record = turn.close(finished)
        samples, generation_s = turn.num_samples_sent, finished.generation_s
        if finished.reason == "error":
            message = f"turn {turn.name} failed: {finished.error}"
            return encode_failed(message, samples=samples, generation_s=generation_s)
        return encode_done(
            finish_reason=record.finish_reason,
            samples=samples,
            generation_s=generation_s,
            ttfc_s=None if record.ttfc_ms is None else record.ttfc_ms / 1000,
            rtf=record.rtf,
        )

    def _open_next(self) -> None:
        while self._turns:
            try:
                self._turns[0].open()
                return
            except (ProtocolError, RequestError) as error:
                self._turns.popleft()
                self._post(encode_error(error.code, str(error)))
