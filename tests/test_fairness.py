"""Nobody is shut out by others: a flood of cancels, silent turns on every slot, many slow writers."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, suppress

import pytest
from live_server import LiveServer, RawClient
from native_client import Heard, NativeClient

from qwen_megakernel.serving.native_messages import AudioChunk, Cancel, Done, End, Error

LIMIT_S = 240.0


def speak_once(client: NativeClient, context_id: str) -> float:
    """Seconds until the first audio of a short context."""
    start = time.monotonic()
    client.speak(context_id, "Hello there.", seed=1)
    client.send(End(context_id))
    client.wait_for(AudioChunk, context_id)
    first_s = time.monotonic() - start
    client.hear(context_id)
    return first_s


@pytest.mark.slow
def test_a_flood_of_cancelled_turns_gets_nobody_refused(live_server):
    """Cancelled turns must not count as waiting: one connection could get everybody refused."""
    flood, stop = RawClient(live_server), threading.Event()
    flood.send(type="hello", protocol=1)

    def pour() -> None:
        number = 0
        with suppress(OSError):
            while not stop.is_set():
                for _ in range(100):
                    number += 1
                    flood.send(type="speak", context_id=f"c{number}", text="Hello there.")
                    flood.send(type="cancel")

    def drain() -> None:
        with suppress(OSError):
            while flood.socket.recv(1 << 18):
                pass

    threads = [threading.Thread(target=target, daemon=True) for target in (pour, drain)]
    with NativeClient(live_server) as client:
        speak_once(client, "alone")
        for thread in threads:
            thread.start()
        for number in range(10):
            speak_once(client, f"beside-{number}")
        assert not [error for heard in client.heard.values() for error in heard.of(Error)]
    stop.set()
    flood.reset()
    live_server.wait_until_idle()


@pytest.mark.slow
def test_silent_turns_do_not_keep_the_slots(live_server):
    """Texts of two words without an end, two for every slot, must not hold the slots."""
    with ExitStack() as stack:
        silent = [stack.enter_context(NativeClient(live_server)) for _ in range(32)]
        for client in silent:
            client.speak("a", "Hello there, how ", seed=1)
        with NativeClient(live_server) as client:
            client.speak("b", "Good morning.", seed=1)
            client.send(End("b"))
            assert client.hear("b", 30).done.finish_reason == "stop"
        for client in silent:
            client.send(Cancel("a"))
    live_server.wait_until_idle()


NUM_WRITERS = 200
NUM_READY = 48
"""Writers whose text is complete, three for each slot. They show how fast the machine is."""
PIECES = ("One two ", "three.")
PAUSE_S = 0.3
PATIENCE = 3.0
"""A wait may be so many times the time of the audio in the queue."""


class Writer:
    """An honest client whose text comes in pieces, some time apart."""

    def __init__(self, server: LiveServer, number: int, pieces: tuple[str, ...]) -> None:
        self.client, self.seed, self.pieces = NativeClient(server, checked=False), number, pieces
        self.heard: Heard | None = None
        self.first_s = 0.0
        """Seconds until the first audio, or until the refusal."""

    def run(self) -> None:
        """Write everything and hear to the end."""
        start = time.monotonic()
        for number, piece in enumerate(self.pieces):
            time.sleep(PAUSE_S if number else 0)
            self.client.speak("a", piece, seed=self.seed)
        self.client.send(End("a"))
        while not isinstance(self.client.receive(LIMIT_S), (AudioChunk, Error)):
            pass
        self.first_s = time.monotonic() - start
        self.heard = self.client.hear("a", LIMIT_S)
        self.client.socket.close()

    @property
    def refusal(self) -> Error | None:
        return next(iter(self.heard.of(Error)), None)


class Crowd:
    """Run writers that begin together. Each text is spoken to its end, or refused."""

    def __init__(self, server: LiveServer, count: int, pieces: tuple[str, ...]) -> None:
        writers = [Writer(server, number, pieces) for number in range(count)]
        threads = [threading.Thread(target=writer.run, daemon=True) for writer in writers]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, start + LIMIT_S - time.monotonic()))
        elapsed_s = time.monotonic() - start
        assert not [writer for writer in writers if writer.heard is None]
        self.refused = [writer for writer in writers if writer.refusal is not None]
        self.spoken = [writer for writer in writers if writer.refusal is None]
        self.audio_s = sum(writer.heard.done.duration_s for writer in self.spoken)
        self.audio_per_s = self.audio_s / elapsed_s
        self.longest_s = max(writer.first_s for writer in self.spoken)


@pytest.mark.slow
def test_two_hundred_slow_writers_on_sixteen_slots(brief_base, recording, report):
    """Each text is spoken, or told at once when to come back. No slot stands idle in this time."""
    options = ("--num-slots", "16", "--max-connections", "250", "--max-queue-s", "20")
    server = LiveServer("--model", str(brief_base), "--speaker-ref", str(recording), *options)
    try:
        server.wait_until_ready()
        before = Crowd(server, NUM_READY, ("".join(PIECES),))
        crowd = Crowd(server, NUM_WRITERS, PIECES)
        after = Crowd(server, NUM_READY, ("".join(PIECES),))
    finally:
        server.kill()
    audio_per_s = min(before.audio_per_s, after.audio_per_s)
    report(
        f"{len(crowd.spoken)} spoken, {len(crowd.refused)} refused; {crowd.audio_s:.0f} s of audio at "
        f"{crowd.audio_per_s:.1f} s a second; complete texts: {before.audio_per_s:.1f} before and "
        f"{after.audio_per_s:.1f} after; the longest wait: {crowd.longest_s:.1f} s"
    )
    for writer in crowd.refused:
        assert (writer.refusal.code, writer.refusal.retry_after_s >= 1) == ("overloaded", True)
        assert [type(message) for message in writer.heard.messages] == [Error, Done]  # not after a wait
    assert {writer.heard.done.finish_reason for writer in crowd.spoken} <= {"stop", "length"}
    assert all(writer.heard.done.samples for writer in crowd.spoken)
    assert len(crowd.spoken) >= 16
    assert crowd.longest_s <= PATIENCE * crowd.audio_s / audio_per_s
