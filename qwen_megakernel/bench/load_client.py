"""A client process of the load bench: many voices on one event loop, each as a listener hears it.

    python -m qwen_megakernel.bench.load_client < job.json

The first line of standard input is a `Job`. When its connections are open, the process prints `open` and
waits for another line. Then it speaks, and prints its `Findings`. It imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.asyncio.client import ClientConnection, connect

from qwen_megakernel.bench.bad_network import BadNetwork, Network
from qwen_megakernel.bench.player import CHARS_PER_S, Player, make_text
from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.serving.native_messages import (
    AudioChunk,
    Cancel,
    Done,
    End,
    Error,
    Hello,
    ServerMessage,
    Speak,
    encode,
    parse_server_message,
)

_LAG_PERIOD_S = 0.01
_GRACE_S = 20.0
"""Time after the end of a run for turns that are still open."""
_OPEN_AT_ONCE = 16
"""Handshakes at a time. The server answers at most 64."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does."""

    url: str
    seconds: float
    """Turns begin until this time."""
    ramp_s: float
    """The voices of a closed loop begin at random times within this time."""
    voices: int = 0
    """Voices of a closed loop. Each speaks turn after turn, in real time."""
    rate: float = 0.0
    """Turns a second of an open loop, as a Poisson process. 0 means a closed loop."""
    chars: tuple[int, int] = (40, 140)
    """Shortest and longest text of a turn. Lengths are drawn evenly."""
    jitter_buffer_s: float = 0.0
    """Seconds from a turn's first audio until its playback begins."""
    network: Network | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LoadTurn:
    """One turn as its listener heard it. Times are in milliseconds, audio is in seconds."""

    outcome: str
    """`finish_reason`, or the code of the error."""
    ttfb_ms: float | None = None
    """Text sent to first chunk received."""
    ttfa_ms: float | None = None
    """Text sent to first audible sample played."""
    refusal_ms: float | None = None
    """Text sent to the refusal."""
    audio_s: float = 0.0
    underruns: int = 0
    """How many times playback stopped because there was no audio."""
    dry_s: float = 0.0
    """For how many seconds in all it stood still."""


@dataclass(slots=True)
class Findings:
    """What one process has measured."""

    turns: list[LoadTurn] = field(default_factory=list)
    audio_s: float = 0.0
    """Seconds of audio received after the ramp, until the end."""
    lag_p99_ms: float = 0.0
    """How late the process's own timers fired. Its measurements are wrong by as much."""
    lag_max_ms: float = 0.0
    cpu_share: float = 0.0
    """Share of one core that the process used."""
    num_stalls: int = 0
    """Packets that the bad network lost."""
    failures: list[str] = field(default_factory=list)
    """Connections that broke."""


class Voice:
    """One connection of the native protocol, one turn at a time."""

    def __init__(self, socket: ClientConnection, run: Run) -> None:
        self._socket, self._run = socket, run
        self._num_turns = 0

    @classmethod
    async def open(cls, url: str, run: Run) -> Voice:
        """Connect and say hello."""
        socket = await connect(url, compression=None, max_size=None, proxy=None, open_timeout=60)
        await socket.send(encode(Hello(client="bench")))
        await socket.recv()
        return cls(socket, run)

    async def close(self) -> None:
        """Hang up."""
        await self._socket.close()

    async def speak(self, text: str, seed: int) -> tuple[LoadTurn, Player]:
        """Speak one turn. It is cancelled when it has said enough for its text, or when the run is
        over."""
        run, self._num_turns = self._run, self._num_turns + 1
        context = f"turn-{self._num_turns}"
        enough = int(len(text) / CHARS_PER_S * SAMPLE_RATE)
        player = Player(run.job.jitter_buffer_s)
        start, error, cancelled = time.perf_counter(), None, False
        await self._socket.send(encode(Speak(context, text, language="english", seed=seed)))
        await self._socket.send(encode(End(context)))
        while True:
            message = await self._receive(None if cancelled else run.end_at)
            now = time.perf_counter()
            if isinstance(message, AudioChunk):
                player.add(np.frombuffer(message.samples, "<i2"), now)
                run.count_audio(len(message.samples) // 2, now)
            elif isinstance(message, Error) and message.context_id == context:
                error = error or (message.code, 1000 * (now - start))
            elif isinstance(message, Done):
                break
            if not cancelled and (message is None or player.num_samples >= enough):
                cancelled = True
                if player.num_samples < enough:
                    player.stop(now)  # the run is over
                await self._socket.send(encode(Cancel(context)))
        return _turn_of(message, error, player, start), player

    async def _receive(self, limit_at: float | None) -> ServerMessage | None:
        """The next message, or None at the limit."""
        wait_s = _GRACE_S if limit_at is None else max(0.0, limit_at - time.perf_counter())
        try:
            async with asyncio.timeout(wait_s):
                return parse_server_message(await self._socket.recv())
        except TimeoutError:
            if limit_at is None:
                raise
            return None


def _turn_of(done: Done, error: tuple[str, float] | None, player: Player, start: float) -> LoadTurn:
    def since_start(at: float | None) -> float | None:
        return None if at is None else 1000 * (at - start)

    return LoadTurn(
        outcome=done.finish_reason if error is None else error[0],
        ttfb_ms=since_start(player.first_at),
        ttfa_ms=since_start(player.audible_at),
        refusal_ms=None if error is None else error[1],
        audio_s=player.num_samples / SAMPLE_RATE,
        underruns=player.underruns,
        dry_s=player.dry_s,
    )


class Run:
    """One job, from its first connection to its findings."""

    def __init__(self, job: Job) -> None:
        self.job, self.findings = job, Findings()
        self.end_at = float("inf")
        self._counted_from = 0.0
        self._random = random.Random(job.seed)
        self._url = job.url
        self._idle: list[Voice] = []
        self._lags: list[float] = []

    def count_audio(self, num_samples: int, now: float) -> None:
        """Count samples that arrived at `now`."""
        if self._counted_from <= now <= self.end_at:
            self.findings.audio_s += num_samples / SAMPLE_RATE

    async def go(self) -> Findings:
        """Open the connections, wait for the start, speak."""
        async with self._reached():
            await self._open(self.job.voices)
            print("open", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            start, cpu = time.perf_counter(), time.process_time()
            self._counted_from, self.end_at = start + self.job.ramp_s, start + self.job.seconds
            lag = asyncio.create_task(self._measure_lag())
            await (self._arrivals() if self.job.rate else self._voices())
            self.findings.cpu_share = (time.process_time() - cpu) / (time.perf_counter() - start)
            lag.cancel()
            for voice in self._idle:
                with contextlib.suppress(OSError):
                    await voice.close()
        lags = np.percentile(self._lags or [0.0], (99, 100))
        self.findings.lag_p99_ms, self.findings.lag_max_ms = (float(1000 * lag) for lag in lags)
        return self.findings

    @asynccontextmanager
    async def _reached(self) -> AsyncIterator[None]:
        """The server's address, behind a bad network if the job has one."""
        if self.job.network is None:
            yield
            return
        parts = urlsplit(self.job.url)
        target = parts.hostname or "127.0.0.1", parts.port or 80
        async with BadNetwork(*target, self.job.network, self.job.seed) as proxy:
            self._url = parts._replace(netloc=f"127.0.0.1:{proxy.port}").geturl()
            yield
            self.findings.num_stalls = proxy.num_stalls

    async def _open(self, count: int) -> None:
        places = asyncio.Semaphore(_OPEN_AT_ONCE)

        async def one() -> Voice:
            async with places:
                return await Voice.open(self._url, self)

        self._idle += await asyncio.gather(*(one() for _ in range(count)))

    async def _voices(self) -> None:
        """Run the closed loop."""
        voices, self._idle = self._idle, []
        starts = [self._random.uniform(0, self.job.ramp_s) for _ in voices]
        await asyncio.gather(*map(self._speak_on, voices, starts))

    async def _speak_on(self, voice: Voice, start_s: float) -> None:
        """Speak turn after turn. The next one begins when this one has been played."""
        await asyncio.sleep(start_s)
        while time.perf_counter() < self.end_at:
            played_at = await self._speak(voice)
            if played_at is None:
                return
            now = time.perf_counter()
            await asyncio.sleep(max(0.0, min(played_at, self.end_at) - now))

    async def _arrivals(self) -> None:
        """Run the open loop: turns begin whatever happens to the earlier ones."""
        async with asyncio.TaskGroup() as tasks:
            due_at = time.perf_counter()
            while (due_at := due_at + self._random.expovariate(self.job.rate)) < self.end_at:
                await asyncio.sleep(due_at - time.perf_counter())
                tasks.create_task(self._arrive())

    async def _arrive(self) -> None:
        try:
            voice = self._idle.pop() if self._idle else await Voice.open(self._url, self)
        except Exception as error:  # a refused handshake is a finding and does not end the run
            self.findings.failures.append(f"{type(error).__name__}: {error}")
            return
        if await self._speak(voice) is not None:
            self._idle.append(voice)

    async def _speak(self, voice: Voice) -> float | None:
        """Speak one turn. Returns when its playback ends, or None if the connection broke."""
        text = make_text(self._random, *self.job.chars)
        try:
            turn, player = await voice.speak(text, self._random.getrandbits(32))
        except Exception as error:  # the other voices continue
            self.findings.failures.append(f"{type(error).__name__}: {error}")
            return None
        self.findings.turns.append(turn)
        return player.dry_at if player.num_samples else time.perf_counter() + 1.0

    async def _measure_lag(self) -> None:
        while True:
            due_at = time.perf_counter() + _LAG_PERIOD_S
            await asyncio.sleep(_LAG_PERIOD_S)
            self._lags.append(time.perf_counter() - due_at)


def read_job(text: str) -> Job:
    """Parse a job from JSON."""
    fields: dict[str, Any] = json.loads(text)
    fields["chars"] = tuple(fields["chars"])
    fields["network"] = fields["network"] and Network(**fields["network"])
    return Job(**fields)


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(Run(read_job(sys.stdin.readline())).go()))), flush=True)
