"""A session on a decoder whose turns a test controls."""

import asyncio
import json
import time
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import numpy as np
import pytest

from qwen_megakernel.config import GenerationParams, SamplingParams
from qwen_megakernel.engine.capacity import Capacity
from qwen_megakernel.serving.events import Reply, SessionOver
from qwen_megakernel.serving.server_state import ServerState
from qwen_megakernel.serving.session import Session
from qwen_megakernel.turn import Audio, Finished, RequestError, Started, Turn

T = TypeVar("T")
SEGMENT_S = 0.6
"""What `InstantDecoder` says."""


class FakeDecoder:
    """A decoder whose turns a test controls."""

    default_voice = "anna"
    default_params = GenerationParams(SamplingParams(0.4, 12, 1.0, 1.05))
    languages = ("auto", "english")
    description: ClassVar = {"model": "fake"}

    def __init__(self):
        self.voices = {"anna": None, "bob": None}
        self.error = None
        self.load = Capacity(num_slots=4, num_free=4, num_queued=0, slot_s=2.0)
        self.refusal = None
        """Raised by the next `open_turn`."""
        self.opened = []

    def check(self, voice, language, *, instruct):
        if language not in self.languages:
            raise RequestError("unknown_language", "no such language")

    def capacity(self, owner=()):
        return self.load

    def open_turn(self, text, *, sink, ended, **options):
        if self.refusal is not None:
            raise self.refusal
        turn = FakeTurn(text, sink, options)
        if ended:
            turn.end()
        self.opened.append(turn)
        return turn


class NoTokens:
    """A text feed for a turn without an engine."""

    def append(self, text):
        return []

    def flush(self):
        return []


class FakeTurn(Turn):
    """A turn for which the test plays the engine."""

    def __init__(self, text, sink, options):
        super().__init__(lambda: None, NoTokens())
        self.opened_at, self.text, self.sink, self.options = time.monotonic(), text, sink, options
        self.num_samples = 0

    def append(self, text):
        super().append(text)
        self.text += text

    def speak(self, num_samples=1920, generation_s=0.01, level=0.0):
        self.num_samples += num_samples
        self.sink(Audio(np.full(num_samples, level, np.float32), generation_s))

    def finish(self, reason="stop", error=None):
        self.mark_finished()
        self.sink(Finished(reason, 1, self.num_samples, 0.02, error))


class InstantDecoder(FakeDecoder):
    """A decoder whose turns are 0.6 s of silence, at once."""

    reasons = ("stop", "length", "repeat")

    def open_turn(self, *args, **options):
        turn = super().open_turn(*args, **options)
        turn.sink(Started())
        turn.speak(int(SEGMENT_S * 24_000))
        turn.finish(self.reasons[(len(self.opened) - 1) % 3])
        return turn


class Stage:
    """A session on a fake decoder, and the events that it has given."""

    def __init__(self, rules=None, decoder=None, **limits):
        self.decoder = decoder or FakeDecoder()
        self.records = []
        self.refused: list[str] = []
        metrics = SimpleNamespace(record=self.records.append, count_refusal=self.refused.append)
        self.server = ServerState(self.decoder, metrics, **limits)
        self.session = Session(self.server, "1", rules)

    @property
    def turns(self):
        return self.decoder.opened

    async def events(self):
        """All events that can be taken now."""
        found = []
        while True:
            try:
                found += await asyncio.wait_for(self.session.take(), 0.02)
            except TimeoutError:
                return found

    async def kinds(self):
        return [type(event) for event in await self.events()]


ROUND_S = 1e-6
"""What a round of `_JumpingLoop` takes, so that its time never stands still."""


class _JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own: instead of waiting for a timer, the clock jumps to it."""

    def __init__(self) -> None:
        super().__init__()
        self._now, select = time.monotonic(), self._selector.select

        def jump(timeout: float | None = None) -> list:
            ready = select(0 if timeout else timeout)
            self._now += timeout if timeout and not ready else ROUND_S
            return ready

        self._selector.select = jump

    def time(self) -> float:
        return self._now


def run_at_once(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, but its waits take no time, and it knows of no other work of the machine.

    `time.monotonic` is the loop's clock. For coroutines without threads and sockets.
    """
    with asyncio.Runner(loop_factory=_JumpingLoop) as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", runner.get_loop().time)
        return runner.run(main)


class StagedTalk:
    """A dialect on a stage, and the messages that it has sent."""

    over: str | None = None
    """Why the session is over."""

    def __init__(self, stage: Stage, dialect: Any) -> None:
        self.stage, self.dialect = stage, dialect

    async def heard(self) -> list[Any]:
        """Messages, after the work that makes them. Audio is its bytes."""
        found: list[Any] = []
        while events := await self.stage.events():
            for event in events:
                if isinstance(event, SessionOver):
                    self.over = event.reason
                    continue
                said = [event.message] if isinstance(event, Reply) else self.dialect.translate(event)
                for message in said:
                    made = message() if callable(message) else [message]
                    found += [one if isinstance(one, bytes) else json.loads(one) for one in made]
        return found
