"""The same utterance over every route: alone and in a batch, streamed and whole, over every protocol."""

from __future__ import annotations

import base64
import io
import json
import queue
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from websockets.sync.client import connect

from qwen_megakernel.config import GenerationParams
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.prove.gates import Found, Section
from qwen_megakernel.prove.utterances import Utterance
from qwen_megakernel.tools.demo import running_server
from qwen_megakernel.tts_model import TTSDecoder
from qwen_megakernel.turn import Audio, Finished, TurnEvent

TIMEOUT_S = 120.0
BATCH_ROUNDING = 1e-5
"""Difference allowed in a batch, where PyTorch's codec sums in another order. The kernels do not."""
FLAC_STEP = 1.0
"""Steps of 16 bits by which FLAC may differ: FFmpeg rounds in its own way."""
HEADER_BYTES = 8
"""Bytes of the header of a binary message of the native protocol: stream and sequence."""

Report = Callable[[str], None]
Way = Callable[[], np.ndarray]


class Ways:
    """Routes through the engine of this process."""

    def __init__(self, tts: TTSDecoder, utterance: Utterance, voice: Voice) -> None:
        self._tts, self._said, self._voice = tts, utterance, voice

    def turn(self, pieces: Sequence[str], *, seed: int | None = None, **options: Any) -> Way:
        """Open a turn and give it the text in pieces. The returned function waits for its samples."""
        events: queue.SimpleQueue[TurnEvent] = queue.SimpleQueue()
        params = GenerationParams(seed=self._said.seed if seed is None else seed)
        turn = self._tts.open_turn(
            sink=events.put, voice=self._voice, language=self._said.language, params=params, **options
        )
        for piece in pieces:
            turn.append(piece)
        turn.end()
        return lambda: _collect(events)

    def in_company(self) -> np.ndarray:
        """Samples of the third of eight turns that speak together."""
        text = [self._said.text]
        turns = [self.turn(text, seed=None if i == 2 else 100 + i) for i in range(8)]
        return [samples() for samples in turns][2]

    def all(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the samples of each route."""
        whole = [self._said.text]
        yield "alone, again", self.turn(whole)()
        yield "among eight", self.in_company()
        yield "live text, word by word", self.turn(words(self._said.text))()
        yield "chunks of one frame", self.turn(whole, chunk_frames=1)()
        yield "chunks of eight frames", self.turn(whole, chunk_frames=8)()


def words(text: str) -> list[str]:
    """The text as a language model would send it."""
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]


def _collect(events: queue.SimpleQueue[TurnEvent]) -> np.ndarray:
    chunks = [np.zeros(0, np.float32)]
    while not isinstance(event := events.get(timeout=TIMEOUT_S), Finished):
        if isinstance(event, Audio):
            chunks.append(event.samples)
    return np.concatenate(chunks)


class Wires:
    """Routes through a server."""

    def __init__(self, port: int, utterance: Utterance, voice: str | None) -> None:
        self._port, self._said, self._voice = port, utterance, voice

    def all(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the samples of each route: float32, or int16 if the format has 16 bits."""
        text = self._said.text
        yield "simple, float32", self._simple([{"text": text}])
        live = [{"text": word, "more": True} for word in words(text)]
        yield "simple, live text", self._simple([*live, {"text": "", "more": False}])
        yield "native, float32", self._native([text], "pcm_f32le")
        yield "native, 16 bits", self._native([text], "pcm_s16le")
        yield "native, live text", self._native(words(text), "pcm_s16le")
        yield "OpenAI, pcm", np.frombuffer(self._post("pcm"), "<i2")
        yield "OpenAI, wav", _pcm_of_wav(self._post("wav"))
        if find_spec("av") is not None:  # the server makes FLAC with it
            yield "OpenAI, flac", _pcm_of_flac(self._post("flac"))
        yield "OpenAI, events", np.frombuffer(self._events("pcm"), "<i2")

    def _options(self, voice_key: str) -> dict[str, Any]:
        found: dict[str, Any] = {"language": self._said.language, "seed": self._said.seed}
        return found | ({voice_key: self._voice} if self._voice else {})

    def _simple(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        heard = b""
        with connect(f"ws://127.0.0.1:{self._port}/", proxy=None, max_size=None) as socket:
            for message in messages:
                socket.send(json.dumps({**message, **self._options("speaker_ref")}))
            while isinstance(data := socket.recv(timeout=TIMEOUT_S), bytes):
                heard += data
        if "error" in json.loads(data):
            raise RuntimeError(f"the server refused: {data}")
        return np.frombuffer(heard, "<f4")

    def _native(self, pieces: Sequence[str], encoding: str) -> np.ndarray:
        heard, context = b"", {"context_id": "prove"}
        with connect(f"ws://127.0.0.1:{self._port}/", proxy=None, max_size=None) as socket:
            audio = {"encoding": encoding, "sample_rate": 24_000}
            socket.send(json.dumps({"type": "hello", "protocol": 1, "audio": audio}))
            for piece in pieces:
                options = self._options("voice")
                socket.send(json.dumps({"type": "speak", "text": piece, **context, **options}))
            socket.send(json.dumps({"type": "end", **context}))
            while True:
                data = socket.recv(timeout=TIMEOUT_S)
                if isinstance(data, bytes):
                    heard += data[HEADER_BYTES:]
                elif (kind := json.loads(data)["type"]) == "done":
                    break
                elif kind == "error":
                    raise RuntimeError(f"the server refused: {data}")
        return np.frombuffer(heard, "<f4" if encoding == "pcm_f32le" else "<i2")

    def _post(self, form: str, **fields: Any) -> bytes:
        body = {"model": "tts-1", "input": self._said.text, "response_format": form, **fields}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/v1/audio/speech",
            json.dumps(body | self._options("voice")).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=TIMEOUT_S
        ) as answer:
            data: bytes = answer.read()
        return data

    def _events(self, form: str) -> bytes:
        heard = b""
        for line in self._post(form, stream_format="sse").decode().splitlines():
            if line.startswith("data:"):
                event = json.loads(line.removeprefix("data:"))
                heard += base64.b64decode(event.get("audio", ""))
        return heard


def _pcm_of_wav(data: bytes) -> np.ndarray:
    """The samples of a WAV file whose header may not know its length."""
    begin = data.index(b"data") + 8
    return np.frombuffer(data[begin:], "<i2")


def _pcm_of_flac(data: bytes) -> np.ndarray:
    """The samples of a FLAC file."""
    import av

    with av.open(io.BytesIO(data), "r") as file:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)])


def difference(samples: np.ndarray, truth: np.ndarray, allowed: float = 0.0) -> str:
    """`""`, or what differs by more than is allowed.

    `truth` is float32; 16-bit samples are held against its rounding, and `allowed` is in their unit.
    """
    if samples.dtype == np.int16:
        truth = np.rint(np.clip(truth, -1, 1) * 32_767).astype(np.int16)
    if len(samples) != len(truth):
        return f"{len(samples)} samples instead of {len(truth)}"
    off = np.abs(samples.astype(np.float64) - truth)
    wrong = np.flatnonzero(off > allowed)
    if not len(wrong):
        return ""
    return f"{len(wrong)} samples from {wrong[0]} on, by up to {off.max():.3g}"


def measure(
    tts: TTSDecoder,
    options: Sequence[str | Path],
    voices: Mapping[str, Voice],
    utterance: Utterance,
    report: Report,
) -> Found:
    """The whole part.

    Args:
        tts: this process's engine.
        options: of a server on the same checkpoint with the same voices.
        voices: by name.
        utterance: what is spoken.
        report: told what is being done.
    """
    section, voice = Section("paths"), voices[utterance.voice]
    ways = Ways(tts, utterance, voice)
    truth, table, wrong = ways.turn([utterance.text])(), [], []
    close = {"OpenAI, flac": FLAC_STEP}
    if tts.description["codec"] != "kernels":
        close["among eight"] = BATCH_ROUNDING

    def hold(found: Iterator[tuple[str, np.ndarray]]) -> None:
        for name, samples in found:
            exactly, off = difference(samples, truth), difference(samples, truth, close.get(name, 0.0))
            table.append([name, len(samples), exactly or "the same bits", "FAILED" if off else "passed"])
            if off:
                wrong.append(f"{name}: {off}")

    hold(ways.all())
    report("paths: starting a server")
    name = None if voice.mode == "designed" else utterance.voice
    with running_server(*options, show=lambda line: None) as port:
        hold(Wires(port, utterance, name).all())
    section.judge("paths", len(wrong), detail="; ".join(wrong))
    section.table(
        "The same utterance by every way", ["way", "samples", "against alone and whole", ""], table
    )
    return section.found()
