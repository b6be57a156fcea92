"""The bench's end-to-end part: a real server process, a real socket, turn after turn.

Random weights almost never draw EOS. So the client listens for as long as a voice would take for the
text, and then cancels. A trained voice mostly ends before that.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from websockets.sync.client import ClientConnection, connect

from qwen_megakernel.bench.dialects import first_audio_s
from qwen_megakernel.bench.player import CHARS_PER_S, SENTENCE, Player, make_text
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
from qwen_megakernel.tools.demo import running_server

CHARS = (20, 140)
"""Lengths of the texts of mixed turns. The longest is 9.3 s of speech, so that no turn reaches the
server's limit of 10 s ahead of real time."""
DIALECT_TURNS = 50
"""The most turns of each dialect."""
TURN_S = 120.0

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TurnFigures:
    """One turn as its client saw it. Times are in milliseconds, audio is in seconds."""

    chars: int
    ttfc_ms: float
    """On the server's clock: text accepted to first chunk handed to the socket."""
    ttfb_ms: float
    """Text sent to first chunk received."""
    ttfa_ms: float | None
    """Text sent to first audible sample played: the first 10 ms above -50 dBFS."""
    rtf: float
    """On the server's clock: time of generation over audio."""
    cancel_ms: float | None
    """Cancel sent to its acknowledgement, or None if the turn ended by itself."""
    audio_s: float
    """Seconds of audio received."""
    underruns: int
    """Chunks that came after all earlier ones had been played."""
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Spread:
    """The spread of a figure over turns."""

    p50: float
    p95: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles of at least one value, with linear interpolation between neighbours."""
        p50, p95, p99 = (float(p) for p in np.percentile(values, (50, 95, 99)))
        return cls(p50, p95, p99, len(values))


class BenchClient:
    """One connection of the native protocol, one turn at a time."""

    def __init__(self, port: int) -> None:
        url = f"ws://127.0.0.1:{port}/"
        self._socket: ClientConnection = connect(url, compression=None, max_size=None, proxy=None)
        self._num_turns = 0
        self._send(Hello(client="bench"))
        self._receive()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def speak(self, text: str, seed: int) -> TurnFigures:
        """Speak one turn. It is cancelled when it has said enough for its text.

        Raises:
            RuntimeError: the server refused the turn or failed.
        """
        self._num_turns += 1
        context = f"turn-{self._num_turns}"
        enough = int(len(text) / CHARS_PER_S * SAMPLE_RATE)
        player, cancelled_at = Player(), None
        start = time.perf_counter()
        self._send(Speak(context, text, language="english", seed=seed))
        self._send(End(context))
        while True:
            message = self._receive()
            if isinstance(message, AudioChunk):
                player.add(np.frombuffer(message.samples, "<i2"), time.perf_counter())
            elif isinstance(message, Error):
                raise RuntimeError(f"the server refused a turn: {message.message}")
            elif isinstance(message, Done):
                cancel_s = None if cancelled_at is None else time.perf_counter() - cancelled_at
                return _figures(text, message, player, start, cancel_s)
            if player.num_samples >= enough and cancelled_at is None:
                cancelled_at = time.perf_counter()
                self._send(Cancel(context))

    def _send(self, message: Hello | Speak | End | Cancel) -> None:
        self._socket.send(encode(message))

    def _receive(self) -> ServerMessage:
        return parse_server_message(self._socket.recv(timeout=TURN_S))


def _figures(text: str, done: Done, player: Player, start: float, cancel_s: float | None) -> TurnFigures:
    if done.ttfc_ms is None or done.rtf is None or player.first_at is None:
        raise RuntimeError(f"a turn had no sound: {done.finish_reason}")
    audible = player.audible_at
    return TurnFigures(
        chars=len(text),
        ttfc_ms=done.ttfc_ms,
        ttfb_ms=1000 * (player.first_at - start),
        ttfa_ms=None if audible is None else 1000 * (audible - start),
        rtf=done.rtf,
        cancel_ms=None if cancel_s is None else 1000 * cancel_s,
        audio_s=player.num_samples / SAMPLE_RATE,
        underruns=player.underruns,
        finish_reason=done.finish_reason,
    )


def write_voice(path: Path, seconds: float = 3.0) -> None:
    """Write a recording to clone: a buzz whose loudness rises and falls like syllables."""
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 13))
    soundfile.write(path, 0.18 * buzz * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)), SAMPLE_RATE)


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of `CHARS` characters. They are the same for every backend."""
    choose = random.Random(seed)
    return [make_text(choose, *CHARS) for _ in range(count)]


def summary(turns: Sequence[TurnFigures]) -> dict[str, Any]:
    """Spreads of the turns' figures, and their sums."""
    cancels = [turn.cancel_ms for turn in turns if turn.cancel_ms is not None]
    audible = [turn.ttfa_ms for turn in turns if turn.ttfa_ms is not None]
    return {
        "ttfc_ms": asdict(Spread.of([turn.ttfc_ms for turn in turns])),
        "ttfb_ms": asdict(Spread.of([turn.ttfb_ms for turn in turns])),
        "ttfa_ms": asdict(Spread.of(audible)) if audible else None,
        "rtf": asdict(Spread.of([turn.rtf for turn in turns])),
        "cancel_ms": asdict(Spread.of(cancels)) if cancels else None,
        "audio_s": sum(turn.audio_s for turn in turns),
        "underruns": sum(turn.underruns for turn in turns),
        "finish_reasons": sorted({turn.finish_reason for turn in turns}),
    }


def speak_at_once(port: int, clients: int, turns: int) -> list[TurnFigures]:
    """Speak `SENTENCE` from several clients at once, each turn after turn, `turns` in all.

    The clients share this process, so under load their figures (TTFB, TTFA) include its delays.
    """

    def speak(number: int) -> list[TurnFigures]:
        client = BenchClient(port)
        try:
            return [client.speak(SENTENCE, seed) for seed in range(number, turns, clients)]
        finally:
            client.close()

    with ThreadPoolExecutor(clients) as threads:
        return [figures for of_one in threads.map(speak, range(clients)) for figures in of_one]


def run(
    checkpoint: Path,
    backend: str,
    *,
    device: str,
    turns: int,
    at_once: Sequence[int] = (),
    report: Report,
) -> dict[str, Any]:
    """Start a server on a checkpoint, measure its turns and stop it. One entry of the bench's JSON.

    Args:
        checkpoint: a Base checkpoint. A buzz is cloned as its voice, by speaker embedding alone.
        backend, device: as `server.py` takes them.
        turns: number of turns of `SENTENCE`, then as many of mixed length, one at a time. Then up to 50
            of `SENTENCE` in each dialect, to its first audio.
        at_once: numbers of clients that then speak `SENTENCE` together, at least one turn each.
        report: told what is being done.

    Raises:
        DemoError: the server did not start or stop.
        RuntimeError: a turn failed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        voice = Path(folder) / "voice.wav"
        write_voice(voice)
        options = ("--model", checkpoint, "--speaker-ref", voice, "--backend", backend)
        ready = threading.Event()
        start = time.perf_counter()
        # With JSON output it prints no banner.
        with running_server(
            *options, "--device", device, "--log-format", "json",
            show=lambda line: None if ready.is_set() else report(line),
        ) as port:  # fmt: skip
            ready_s = time.perf_counter() - start
            ready.set()
            report(f"{backend}: ready after {ready_s:.1f} s")
            client = BenchClient(port)
            fixed = [client.speak(SENTENCE, seed) for seed in range(turns)]
            mixed = [client.speak(text, seed) for seed, text in enumerate(mixed_texts(turns))]
            client.close()
            heard = first_audio_s(port, SENTENCE, min(turns, DIALECT_TURNS))
            together = {str(n): summary(speak_at_once(port, n, max(turns, n))) for n in at_once}
    return {
        "backend": backend,
        "ready_s": ready_s,
        "sentence": summary(fixed),
        "mixed": summary(mixed),
        "at_once": together,
        "dialects": {
            name: asdict(Spread.of([1000 * seconds for seconds in times]))
            for name, times in heard.items()
        },
    }
