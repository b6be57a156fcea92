#!/usr/bin/env python3
"""Speak a text through the server and measure it. It needs only `websockets` and `numpy`.

    python test_client.py --text "Hello there." --out hello.wav

The exit code is 0 if the server spoke the whole text, and otherwise 1, with one line on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import ipaddress
import json
import os
import queue
import re
import struct
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

SAMPLE_RATE = 24_000
SYNTHETIC = "Synthetic speech, made by a text-to-speech model"
"""The comment in the metadata of a written file."""
AUDIBLE_DBFS = -50.0
_WINDOW = SAMPLE_RATE // 100  # loudness is judged over 10 ms

EPILOG = f"""\
figures:
  TTFC       request accepted by the server -> first chunk handed to its socket (server's clock)
  TTFB       text sent -> first chunk received (this clock; includes the network)
  TTFA       text sent -> first audible sample would be heard: the first 10 ms above
             {AUDIBLE_DBFS:.0f} dBFS, at the time a player that starts with the first chunk plays them
  RTF        generation time over audio time (server's clock); below 1 is faster than real time
  underruns  how often, and for how long in all, that player would have run dry
"""

Reply = np.ndarray | dict[str, Any]
PROBE_BYTES = 65_536
"""Bytes that must fit on the disk before a turn begins: more than a second of audio."""


class ClientError(Exception):
    """An error for the user, in one line."""

    retry_after_s: float | None = None
    """Seconds after which a busy server will take the same text."""


FAILURES = (ClientError, InvalidHandshake, InvalidURI, ConnectionClosed, OSError, TimeoutError)
"""The errors with which a turn can fail without a fault of this program."""


@dataclass
class Playhead:
    """A player that starts with the first chunk and stops whenever it runs dry. Times are in seconds."""

    chunks: int = 0
    underruns: int = 0
    stalled_s: float = 0.0
    first_chunk_s: float | None = None
    first_audible_s: float | None = None
    _dry_at: float = 0.0
    _tail: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    def add(self, samples: np.ndarray, now: float) -> None:
        """Take a chunk, float32 [n], that arrived at `now`."""
        self.chunks += 1
        if self.first_chunk_s is None:
            self.first_chunk_s = self._dry_at = now
        elif now > self._dry_at:
            self.underruns += 1
            self.stalled_s += now - self._dry_at
            self._dry_at = now
        if self.first_audible_s is None:
            self._listen(samples)
        self._dry_at += len(samples) / SAMPLE_RATE

    def _listen(self, samples: np.ndarray) -> None:
        heard_from = self._dry_at - len(self._tail) / SAMPLE_RATE
        samples = np.concatenate([self._tail, samples])
        windows = samples[: len(samples) // _WINDOW * _WINDOW].reshape(-1, _WINDOW)
        rms = np.sqrt(np.mean(np.square(windows, dtype=np.float64), axis=1))
        loud = np.flatnonzero(rms > 10 ** (AUDIBLE_DBFS / 20))
        if len(loud):
            self.first_audible_s = max(0.0, heard_from + loud[0] * _WINDOW / SAMPLE_RATE)
        self._tail = samples[windows.size :]


@dataclass(frozen=True)
class Summary:
    """The figures that `--json` prints. None is a figure that does not exist."""

    ttfc_ms: float
    ttfb_ms: float | None
    ttfa_ms: float | None
    rtf: float
    duration_s: float
    samples: int
    chunks: int
    underruns: int
    stalled_ms: float
    finish_reason: str
    out: str | None

    def lines(self) -> str:
        """The figures as text for people."""
        return (
            f"TTFC {self.ttfc_ms:.1f} ms   TTFB {_ms(self.ttfb_ms)}   TTFA {_ms(self.ttfa_ms)}   "
            f"RTF {self.rtf:.3f}\n"
            f"{self.duration_s:.2f} s of audio in {self.chunks} chunks, "
            f"{self.underruns} underruns ({self.stalled_ms:.0f} ms), finished: {self.finish_reason}"
            + (f"\nwrote {self.out}" if self.out else "")
        )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


class Speaker:
    """Plays chunks in a thread of its own, so that a full sound card never delays the socket."""

    def __init__(self) -> None:
        try:
            import sounddevice
        except ImportError as error:
            raise ClientError(f"--play needs sounddevice (pip install sounddevice): {error}") from None
        except OSError as error:  # the package is here, but not the library that it needs
            hint = "apt install libportaudio2, or brew install portaudio"
            raise ClientError(f"--play needs PortAudio ({hint}): {error}") from None
        try:
            self._stream = sounddevice.OutputStream(samplerate=SAMPLE_RATE, channels=1, dtype="float32")
            self._stream.start()
        except sounddevice.PortAudioError as error:
            raise ClientError(f"--play: no sound output: {error}") from None
        self._chunks: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._stream.write(chunk)
        self._stream.stop()

    def play(self, samples: np.ndarray) -> None:
        """Queue a chunk, float32 [n]."""
        self._chunks.put(samples)

    def finish(self) -> None:
        """Wait until all chunks were played."""
        self._chunks.put(None)
        self._thread.join()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.allow_abbrev = False
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="what to say")
    source.add_argument("--file", type=Path, help="file with what to say")
    source.add_argument("--stdin", action="store_true", help="read what to say from standard input")
    parser.add_argument("--url", default="ws://127.0.0.1:8765", help="server (default: %(default)s)")
    secret = os.environ.get("QWEN_MEGAKERNEL_TOKEN")
    where = "the server's secret (default: the variable QWEN_MEGAKERNEL_TOKEN)"
    parser.add_argument("--token", default=secret, help=where)
    parser.add_argument("--voice", help="name of a voice on the server (default: the server's)")
    parser.add_argument("--language", help="english, en, ... (default: auto)")
    parser.add_argument("--temperature", type=float, help="of the talker, 0 to 10; 0 is greedy")
    parser.add_argument("--top-k", type=int, help="of the talker; 0 keeps all")
    parser.add_argument("--chunk-tokens", type=int, help="frames of 80 ms in a chunk, 1 to 64")
    parser.add_argument("--seed", type=int, help="the same seed, text and voice give the same speech")
    parser.add_argument("--stream-text", action="store_true", help="send the text word by word")
    words = "with --stream-text (default: %(default)s)"
    parser.add_argument("--words-per-second", type=_positive, default=8.0, help=words)
    parser.add_argument("--out", type=Path, help="WAV file to write, 16 bit")
    parser.add_argument("--play", action="store_true", help="play while receiving (needs sounddevice)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    wait = "seconds to wait for the server, each time, and for a busy one in all (default: %(default)s)"
    parser.add_argument("--timeout", type=_positive, default=30.0, help=wait)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line of its own."""
    parser = argparse.ArgumentParser(description="Speak a text through the server and measure it.")
    add_arguments(parser)
    return parser.parse_args(argv)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0: {text!r}")
    return value


def read_text(args: argparse.Namespace) -> str:
    """The text to speak, without a byte order mark."""
    try:
        if args.text is not None:
            text = repair(args.text.removeprefix("\ufeff"))
        elif args.file is not None:
            text = args.file.read_text(encoding="utf-8-sig")
        else:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
            text = sys.stdin.read()
    except UnicodeError:
        raise ClientError("the text must be UTF-8; iconv -f latin1 -t utf-8 converts Latin-1") from None
    except OSError as error:
        raise ClientError(f"cannot read the text: {error}") from None
    if not text.strip():
        raise ClientError("the text is empty")
    return text


def repair(text: str) -> str:
    """Join the halves of surrogate pairs. A single half becomes U+FFFD.

    Raises:
        UnicodeError: a half stands for a byte that could not be decoded.
    """
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    text = re.sub("[\ud800-\udbff\udd00-\udfff]", "\ufffd", text)
    text.encode()
    return text


def build_request(args: argparse.Namespace, text: str) -> dict[str, Any]:
    """The message that opens the turn."""
    request = {
        "text": text,
        "speaker_ref": args.voice,
        "language": args.language,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "chunk_tokens": args.chunk_tokens,
        "seed": args.seed,
    }
    return {key: value for key, value in request.items() if value is not None}


async def send_text(socket: ClientConnection, args: argparse.Namespace, text: str) -> None:
    """Send the request, at once or word by word."""
    if not args.stream_text:
        await socket.send(json.dumps(build_request(args, text)))
        return
    first, *rest = re.findall(r"\s*\S+|\s+$", text)  # keep white space: it can change the speech
    await socket.send(json.dumps({**build_request(args, first), "more": True}))
    for word in rest:
        await asyncio.sleep(1 / args.words_per_second)
        await socket.send(json.dumps({"text": word, "more": True}))
    await socket.send(json.dumps({"text": "", "more": False}))


async def receive(socket: ClientConnection, timeout_s: float) -> AsyncIterator[Reply]:
    """Yields chunks, float32 [n], then the `done` message. Raises `ClientError` for an error message."""
    while True:
        try:
            message = await asyncio.wait_for(socket.recv(), timeout_s)
        except TimeoutError:
            raise ClientError(f"no message from the server for {timeout_s:g} s (--timeout)") from None
        try:
            reply = np.frombuffer(message, "<f4") if isinstance(message, bytes) else json.loads(message)
        except ValueError:
            raise ClientError("the server does not speak this protocol") from None
        if isinstance(reply, np.ndarray):
            yield reply
        elif "error" in reply:
            later = f"; try again in {reply['retry_after_s']} s" if "retry_after_s" in reply else ""
            refusal = ClientError(f"server: {reply['error']} ({reply.get('code', 'no code')}){later}")
            refusal.retry_after_s = reply.get("retry_after_s")
            raise refusal
        elif reply.get("done"):
            yield reply
            return


async def hear(args: argparse.Namespace, text: str) -> AsyncIterator[tuple[Reply, float]]:
    """Yields what `receive` gives, and the seconds since the text was sent. Retries on a busy server."""
    patience_ends = time.monotonic() + args.timeout
    while True:
        try:
            async with open_connection(args) as socket:
                sent_at = time.perf_counter()
                sending = asyncio.create_task(send_text(socket, args, text))
                try:
                    async for message in receive(socket, args.timeout):
                        yield message, time.perf_counter() - sent_at
                    return
                finally:
                    sending.cancel()
                    await asyncio.gather(sending, return_exceptions=True)
        except ClientError as refusal:
            if (later_s := refusal.retry_after_s) is None or time.monotonic() + later_s > patience_ends:
                raise
            print(refusal, file=sys.stderr)
            await asyncio.sleep(later_s)


async def speak(args: argparse.Namespace, text: str) -> Summary:
    """Run one turn, from checking the output to the summary. Audio that came is kept in any case."""
    if args.out is not None:
        check_writable(args.out)
    speaker = Speaker() if args.play else None
    playhead, chunks = Playhead(), []
    try:
        async for message, now in hear(args, text):
            if isinstance(message, dict):
                done = message
                continue
            playhead.add(message, now)
            chunks.append(message)
            if speaker is not None:
                speaker.play(message)
    except BaseException as error:
        if args.out is None or not chunks:
            raise
        write_wav(args.out, np.concatenate(chunks))
        if not isinstance(error, FAILURES):
            raise
        duration_s = sum(map(len, chunks)) / SAMPLE_RATE
        kept = f"wrote the {duration_s:.2f} s that came to {args.out}"
        raise ClientError(f"{explain(error, args.url)}; {kept}") from None
    if speaker is not None:
        speaker.finish()
    if args.out is not None:
        write_wav(args.out, np.concatenate(chunks) if chunks else np.zeros(0, np.float32))
    return summarise(done, playhead, args.out)


def open_connection(args: argparse.Namespace) -> connect:
    """The connection to open with `async with`."""
    headers = {"Authorization": f"Bearer {args.token}"} if args.token else None
    options: dict[str, Any] = {"additional_headers": headers, "max_size": None, "compression": None}
    options["proxy"] = None if is_loopback(host_of(args.url)) else True  # no proxy reaches loopback
    return connect(args.url, open_timeout=args.timeout, **options)


def host_of(url: str) -> str:
    """The host of a WebSocket address. Raises `InvalidURI` if the host or the port cannot be read."""
    try:
        address = urlsplit(url)
        host, _ = address.hostname or "", address.port
    except ValueError as error:
        raise InvalidURI(url, str(error)) from error
    return host


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def summarise(done: dict[str, Any], playhead: Playhead, out: Path | None) -> Summary:
    """The summary: the server's figures and the client's."""
    first, audible = playhead.first_chunk_s, playhead.first_audible_s
    return Summary(
        ttfc_ms=done.get("ttfc_ms", 0.0),
        ttfb_ms=None if first is None else round(first * 1000, 1),
        ttfa_ms=None if audible is None else round(audible * 1000, 1),
        rtf=done.get("rtf", 0.0),
        duration_s=done.get("duration_s", 0.0),
        samples=done.get("samples", 0),
        chunks=playhead.chunks,
        underruns=playhead.underruns,
        stalled_ms=round(playhead.stalled_s * 1000, 1),
        finish_reason=done.get("finish_reason", "unknown"),
        out=None if out is None else str(out),
    )


def check_writable(path: Path) -> None:
    """Raise `ClientError` if a file cannot be written, before anything is synthesised for it."""
    if not path.absolute().parent.is_dir():
        raise ClientError(f"cannot write {path}: its folder does not exist")
    if path.is_dir():
        raise ClientError(f"cannot write {path}: it is a folder")
    exists = path.exists()
    if exists and not path.is_file():
        return  # a device or a pipe: opening it could block
    try:
        with path.open("ab") as file:
            if not exists:
                file.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise ClientError(f"cannot write {path}: {error.strerror}") from None
    finally:
        if not exists:
            path.unlink(missing_ok=True)


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write float32 [n] in [-1, 1] to a 16-bit mono WAV file. Its metadata says that it is synthetic.

    Raises:
        ClientError: the file cannot be written. A temporary file has the audio, if there is room for it.
    """
    pcm = np.round(np.clip(samples, -1.0, 1.0) * 32_767).astype("<i2")
    comment = SYNTHETIC.encode("ascii") + b"\0"
    comment += b"\0" * (len(comment) % 2)
    form = _chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16))
    data = _chunk(b"data", pcm.tobytes())
    info = _chunk(b"LIST", b"INFO" + _chunk(b"ICMT", comment))
    content = _chunk(b"RIFF", b"WAVE" + form + data + info)
    try:
        path.write_bytes(content)
    except OSError as error:
        if path.is_file():
            path.unlink()  # half a file: its space may be what the temporary file needs
        try:
            number, name = tempfile.mkstemp(".wav", "speech-")
            with open(number, "wb") as file:
                file.write(content)
            kept = f"the audio is in {name}"
        except OSError:
            kept = "nor is there room for a temporary file"
        raise ClientError(f"cannot write {path}: {error.strerror}; {kept}") from None


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content


def explain(error: Exception, url: str) -> str:
    """Explain one of `FAILURES` in one line."""
    if isinstance(error, ClientError):
        return str(error)
    if isinstance(error, InvalidStatus):
        status, body = error.response.status_code, error.response.body or b""
        try:
            reason = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            reason = "refused"
        hint = {401: "; give it with --token", 503: "; try again shortly"}.get(status, "")
        return f"{url}: HTTP {status}: {reason}{hint}"
    if isinstance(error, InvalidURI):
        return f"{url}: not a WebSocket address (ws://host:port)"
    if isinstance(error, ConnectionRefusedError):
        return f"{url}: connection refused; is the server running, and the tunnel open?"
    if isinstance(error, ConnectionClosed):
        return f"{url}: the server closed the connection ({error})"
    return f"{url}: {type(error).__name__}: {' '.join(str(error).split())}"


def run(args: argparse.Namespace) -> int:
    """Run the client. Returns the exit code."""
    try:
        summary = asyncio.run(speak(args, read_text(args)))
    except FAILURES as error:
        print(f"error: {explain(error, args.url)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    status = show(json.dumps(asdict(summary)) if args.json else summary.lines())
    if summary.finish_reason == "length":
        print("error: the server cut the speech off (finish_reason length)", file=sys.stderr)
        return 1
    return status


def show(figures: str) -> int:
    """Print to standard output. Returns the exit code. A reader that has left is not an error."""
    try:
        print(figures, flush=True)
    except OSError as error:
        # Python writes the rest of its buffer when it exits: send that to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: cannot print the figures: {error.strerror}", file=sys.stderr)
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the client from a command line of its own. Returns the exit code."""
    return run(parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
