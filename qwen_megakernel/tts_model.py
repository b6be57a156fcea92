"""`TTSDecoder`: a loaded checkpoint that speaks. The package's front door.

    tts = TTSDecoder.load("Qwen/Qwen3-TTS-12Hz-0.6B-Base")
    tts.add_voice("anna", tts.clone_voice(Path("anna.wav").read_bytes()))
    for chunk in tts.stream("Hello there.", voice="anna"):   # float32 [n], 24 kHz
        play(chunk)

Each text goes through a `Turn`: whole text, live text, and many turns at once. `stream` and
`synthesize` put a queue around a turn.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from qwen_megakernel.checkpoint import Checkpoint, CheckpointError, resolve
from qwen_megakernel.codec.encoder import CodecEncoder
from qwen_megakernel.config import SAMPLE_RATE, SAMPLINGS, GenerationParams
from qwen_megakernel.engine.active_turn import TurnRequest
from qwen_megakernel.engine.backends import BACKENDS, Backends, in_daemon_thread
from qwen_megakernel.engine.capacity import Capacity
from qwen_megakernel.engine.engine import Engine
from qwen_megakernel.engine.memory import CacheSizes, choose_sizes
from qwen_megakernel.engine.model_loader import ModelLoader
from qwen_megakernel.engine.pace import thread_cpu_s
from qwen_megakernel.engine.slot_order import Owner
from qwen_megakernel.engine.standby import Standby, StandbyPlan
from qwen_megakernel.model.generation_config import read_generation_config
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.builder import PromptBuilder
from qwen_megakernel.prompt.speaker_encoder import SpeakerEncoder
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.prompt.voice import Voice, VoiceCloner, load_voices, voice_name_ok
from qwen_megakernel.turn import Audio, Finished, RequestError, Sink, Turn, TurnEvent

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Progress = Callable[[str], None]

_WARM_UP_TEXT = "Hello there."
_WARM_UP_FRAMES = 4
_FEW_WEIGHTS = 50_000_000
"""With fewer weights, one thread is better. Several wait for each other at every operation: they are no
faster, and a hundred times slower on a busy machine."""


class SynthesisError(RuntimeError):
    """A turn has failed, or its speech was cut off. The message says why."""


def choose_device(name: str) -> torch.device:
    """The device of a name. `auto` is the first CUDA GPU, else the CPU. Raises `CheckpointError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckpointError(f"device is {name!r}, allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(f"device is {name!r}, but torch finds no CUDA GPU; see `doctor`")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name. `auto` is bf16 on a GPU and fp32 on a CPU. Raises `CheckpointError`."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise CheckpointError(f"dtype is {name!r}, allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


class TTSDecoder:
    """A checkpoint on a device, its voices, and the engine that runs its turns.

    It is thread-safe. Make one with `load`. Then `close` it, or use it as a context manager.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        sizes: CacheSizes,
        max_positions: int,
        params: GenerationParams,
        text_cleaning: bool,
        sms: int | None,
        standby: StandbyPlan,
        name: str,
        progress: Progress,
    ) -> None:
        config = checkpoint.config
        self.config = config
        # fp32 shall be fp32. By default convolutions on CUDA use TF32; matrix products do not.
        torch.backends.cudnn.allow_tf32 = False
        self.sample_rate = SAMPLE_RATE
        self.languages = config.talker.languages
        """Values for `language`, `auto` first."""
        self.voices: dict[str, Voice] = {}
        self.default_params = params
        """The sampling of a turn that chooses none. Its seed is not used."""
        self.default_voice: str | None = None
        """The voice of a request that names none; None lets the model choose."""

        checkpoint.verify()
        # Its imports take seconds, and run while weights are read.
        tokenizer = in_daemon_thread(load_tokenizer, checkpoint.folder, config.talker.text_vocab_size)
        backends = Backends(backend, config, device, dtype, progress, sms)
        self._checkpoint, self._device = checkpoint, device
        self._cloners: dict[torch.device, VoiceCloner] = {}
        for speaker in config.talker.speaker_ids:
            self.add_voice(speaker, Voice.preset(speaker))
        self._designed = Voice.designed()
        loader = ModelLoader(
            checkpoint, backends, device=device, dtype=dtype, sizes=sizes, max_positions=max_positions,
            progress=progress,
        )  # fmt: skip

        def make_prompts(talker: Talker) -> None:
            progress("loading the tokenizer")
            self._prompts = PromptBuilder(talker, config, tokenizer.result(), clean_text=text_cleaning)

        decoder, frame_codec = loader.load(make_prompts)
        loader.also_free = self._cloners.clear
        small = device.type == "cpu" and loader.num_weights < _FEW_WEIGHTS
        self._engine = Engine(
            decoder,
            frame_codec,
            self._prompts,
            eos_id=config.talker.codec_eos_id,
            cpu_threads=1 if small else None,
            standby=Standby(standby, loader, self._prompts),
        )
        self.description = {
            "model": name,
            "mode": config.mode,
            "device": _device_name(device),
            "dtype": next(k for k, v in DTYPES.items() if v == dtype),
            **backends.description,
        }
        """What runs, and where, for banners and reports."""

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        num_slots: int | None = None,
        memory: int | None = None,
        sms: int | None = None,
        standby: StandbyPlan | None = None,
        max_positions: int = 3072,
        sampling: str = "original",
        text_cleaning: bool = True,
        revision: str | None = None,
        offline: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Load a checkpoint.

        Args:
            model: a local folder or a Hugging Face id.
            backend: `auto`, `torch` or `megakernel`.
            device: `auto`, `cpu`, `cuda`, `cuda:N`.
            dtype: `auto`, `bf16`, `fp32`.
            num_slots: turns that can speak at a time; None is as many as fit, on a CPU 16.
            memory: bytes for keys, values and the codec's state; None is 5.8 GB. A turn begins when
                there is memory for all that it may come to need.
            sms: streaming multiprocessors that a frame takes (frame kernel only); None is all.
            standby: what is done while nobody speaks; None is nothing.
            max_positions: prompt rows plus frames of one turn (12.5 frames a second).
            sampling: the sampling of a turn that chooses none: `original` (the talker at temperature
                0.3 and top-k 15) or `checkpoint` (its `generation_config.json`; the released ones say
                0.9 and 50).
            text_cleaning: leave out of every text what cannot be spoken (docs/text.md). Without it,
                every text becomes the same tokens as in the official package.
            revision: commit of a Hugging Face id.
            offline: use only what is in the cache.
            progress: called with a line for each step.

        Raises:
            CheckpointError: something is missing or wrong; one line names it.
        """
        report = progress or (lambda line: None)
        if backend not in BACKENDS:
            raise CheckpointError(f"backend is {backend!r}, allowed: {', '.join(BACKENDS)}")
        chosen = choose_device(device)
        precision = choose_dtype(dtype, chosen)
        if num_slots is not None and num_slots < 1:
            raise CheckpointError(f"num_slots is {num_slots}, allowed: at least 1")
        if sampling not in SAMPLINGS:
            raise CheckpointError(f"sampling is {sampling!r}, allowed: {', '.join(SAMPLINGS)}")
        report(f"opening {model}")
        checkpoint = Checkpoint(resolve(model, revision=revision, offline=offline))
        try:
            params = GenerationParams()
            if sampling == "checkpoint":
                params = read_generation_config(checkpoint.folder)
            max_positions = min(max_positions, checkpoint.config.talker.max_positions)
            sizes = choose_sizes(
                checkpoint.config,
                precision,
                max_positions=max_positions,
                num_slots=num_slots,
                memory=memory,
                on_cpu=chosen.type == "cpu",
            )
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return cls(
            checkpoint,
            backend=backend,
            device=chosen,
            dtype=precision,
            sizes=sizes,
            max_positions=max_positions,
            params=params,
            text_cleaning=text_cleaning,
            sms=sms,
            standby=standby or StandbyPlan(),
            name=str(model),
            progress=report,
        )

    # -- voices -----------------------------------------------------------------------------

    def clone_voice(self, data: bytes, ref_text: str | None = None) -> Voice:
        """Make a voice from a WAV or FLAC file of 1 to 30 s.

        Args:
            data: the file's content.
            ref_text: the words in it, for ICL mode. Without them, the speaker embedding alone is used.

        Raises:
            VoiceError: the audio cannot be used; RequestError: the checkpoint cannot clone.
        """
        return self._voice_cloner().clone(data, ref_text)

    def clone_voice_aside(self, data: bytes, ref_text: str | None = None) -> Future[Voice]:
        """`clone_voice` while others speak: on the CPU, in a thread that yields to every other.

        It also refuses a recording that was too loud. The future raises what `clone_voice` raises.
        """

        def clone() -> Voice:
            _yield_to_others()
            return self._voice_cloner(torch.device("cpu")).clone(data, ref_text, refuse_clipped=True)

        return in_daemon_thread(clone)

    def design_voice(self, description: str) -> Voice:
        """Make a voice from a description, with a VoiceDesign checkpoint.

        Raises:
            VoiceError: the description is blank or too long; RequestError: it is another checkpoint.
        """
        if self.config.mode != "voice_design":
            raise RequestError(
                "unsupported",
                f"a {self.config.mode} checkpoint cannot design voices, only voice_design can",
            )
        return Voice.designed(description)

    def load_voices(self, folder: Path) -> None:
        """Add every voice of an operator's folder (see `voice.load_voices`).

        The operator's own voices come first, so that no client's voice becomes the default.
        """
        designs = self.config.mode == "voice_design"
        cloner = None if designs else self._voice_cloner()
        loaded = load_voices(folder, cloner)
        for name in sorted(loaded, key=lambda name: "origin" in loaded[name].notes):
            self.add_voice(name, loaded[name])

    def add_voice(self, name: str, voice: Voice) -> None:
        """Make a voice available by name. The first voice becomes the default.

        Raises:
            ValueError: the name has characters other than letters, digits, `-` and `_`.
        """
        if not voice_name_ok(name):
            raise ValueError(f"voice name {name!r}, allowed: letters, digits, - and _, up to 64")
        self.voices = {**self.voices, name: voice}
        self.default_voice = self.default_voice or name

    def remove_voice(self, name: str) -> None:
        """Remove a voice, if it is there. Turns that speak with it go on.

        If it was the default, the first of the others becomes the default.
        """
        self.voices = {other: voice for other, voice in self.voices.items() if other != name}
        if self.default_voice == name:
            self.default_voice = next(iter(self.voices), None)

    def _voice_cloner(self, device: torch.device | None = None) -> VoiceCloner:
        """The voice cloner, loaded at its first use: a server with ready-made voices never needs it."""
        device = device or self._device
        if device not in self._cloners:
            if self.config.speaker_encoder is None:
                raise RequestError(
                    "unsupported", f"a {self.config.mode} checkpoint cannot clone voices, only base can"
                )
            codec_config = self.config.codec_encoder
            with torch.device("meta"):
                speaker = SpeakerEncoder(self.config.speaker_encoder)
                codec = CodecEncoder(codec_config) if codec_config is not None else None
            # In fp32: they run once for each voice, and their results are kept.
            for prefix, module in (("speaker_encoder.", speaker), ("encoder.", codec)):
                if module is not None:
                    self._checkpoint.load(prefix, module, dtype=torch.float32, device=device)
            self._cloners[device] = VoiceCloner(speaker, codec)
        return self._cloners[device]

    def _find_voice(self, voice: str | Voice | None) -> Voice:
        if isinstance(voice, Voice):
            return voice
        name = voice or self.default_voice
        if name is None:
            return self._designed
        if name not in self.voices:
            known = ", ".join(list(self.voices)[:10]) or "none"
            raise RequestError("unknown_voice", f"voice {name[:64]!r} is unknown; known: {known}")
        return self.voices[name]

    # -- speech -----------------------------------------------------------------------------

    def check(self, voice: str | Voice | None, language: str, *, instruct: str | None = None) -> None:
        """Raise `RequestError` if `open_turn` would refuse these."""
        found = self._find_voice(voice)
        self._prompts.check(found, language, instruct=instruct or found.description)

    def open_turn(
        self,
        text: str = "",
        *,
        sink: Sink,
        ended: bool = False,
        voice: str | Voice | None = None,
        language: str = "auto",
        instruct: str | None = None,
        streaming: bool | None = None,
        params: GenerationParams | None = None,
        chunk_frames: int | None = None,
        max_lead_s: float | None = None,
        owner: Owner = (),
    ) -> Turn:
        """Begin a turn whose events go to `sink`, on the engine's thread.

        Args:
            text: the first text; `Turn.append` adds more.
            sink: called with `Started`, `Audio` ..., `Finished`. It must return at once.
            ended: whether the text is complete.
            voice: a name of `voices`, a `Voice`, or None for the default.
            language: one of `languages`, in any case.
            instruct: how to speak (VoiceDesign and 1.7B CustomVoice checkpoints); None is the
                voice's description, if it has one.
            streaming: text layout; None is the checkpoint's own. Live text starts early only
                in the streaming layout.
            params: sampling, seed and limits; None is `default_params` with a random seed.
            chunk_frames: frames of 80 ms in a chunk; None is a ramp that begins with one.
            max_lead_s: seconds by which audio may be ahead of playback; None is as fast as possible.
            owner: whom the turn is for. If slots are short, owners take turns.

        Raises:
            RequestError: the turn cannot be served; see its `code`.
        """
        found = self._find_voice(voice)
        request = TurnRequest(
            voice=found,
            language=language,
            instruct=instruct or found.description,
            streaming=streaming,
            params=params or replace(self.default_params, seed=secrets.randbits(64)),
            chunk_frames=chunk_frames,
            max_lead_s=max_lead_s,
            owner=owner,
        )
        return self._engine.open_turn(request, sink, text, end=ended)

    def stream(
        self, text: str, voice: str | Voice | None = None, **options: Any
    ) -> Iterator[np.ndarray]:
        """Speak a text. Yields float32 chunks [n] at 24 kHz as they are made.

        Closing the iterator cancels the turn. The options are those of `open_turn`.

        Raises:
            RequestError: at once, if the turn cannot be served.
            SynthesisError: from the iterator, if the turn fails; or at its end, if the speech was cut
                off (`length`) although `params` set no `max_frames`.
        """
        events: queue.SimpleQueue[TurnEvent] = queue.SimpleQueue()
        turn = self.open_turn(text, voice=voice, sink=events.put, ended=True, **options)
        return _chunks(turn, events)

    def synthesize(self, text: str, voice: str | Voice | None = None, **options: Any) -> np.ndarray:
        """The joined chunks of `stream`: float32 [samples] at 24 kHz. Raises what `stream` raises."""
        chunks = list(self.stream(text, voice, **options))
        return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.float32)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Speak a few frames with every voice, so that the first client need not wait for a warm-up."""
        params = replace(self.default_params, max_frames=_WARM_UP_FRAMES)
        for name in self.voices or ("",):
            if progress:
                progress(f"warming up{f': voice {name}' if name else ''}")
            try:
                self.synthesize(_WARM_UP_TEXT, name or None, params=params)
            except SynthesisError as error:
                raise SynthesisError(f"the first turn failed: {self.error or error}") from error

    # -- life -------------------------------------------------------------------------------

    @property
    def num_active(self) -> int:
        """The number of turns that hold a slot."""
        return self._engine.num_speaking

    @property
    def num_waiting(self) -> int:
        """The number of turns that wait for a slot or for their first text."""
        return self._engine.num_waiting

    @property
    def num_slots(self) -> int:
        """The number of turns that can hold a slot at a time."""
        return self._engine.num_slots

    def capacity(self, owner: Owner = ()) -> Capacity:
        """The engine's load, as a new turn of `owner` would meet it. Any thread may call it."""
        return self._engine.capacity(owner)

    @property
    def engine_cpu_s(self) -> float:
        """Seconds of CPU time that the engine's thread has taken."""
        return thread_cpu_s(self._engine.thread)

    @property
    def standby(self) -> Standby:
        """What is done while nobody speaks, and whether the model is on the device."""
        return self._engine.standby

    @property
    def error(self) -> Exception | None:
        """The error that stopped the engine. A decoder with an error serves no more turns."""
        return self._engine.error

    def close(self, drain_s: float = 0.0) -> None:
        """End all turns, after up to `drain_s` seconds of grace, and end the engine's thread."""
        self._engine.close(drain_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _chunks(turn: Turn, events: queue.SimpleQueue[TurnEvent]) -> Iterator[np.ndarray]:
    try:
        while True:
            event = events.get()
            if isinstance(event, Audio):
                yield event.samples
            elif isinstance(event, Finished):
                if event.error is not None:
                    raise SynthesisError(event.error)
                return
    finally:
        turn.cancel()


def _yield_to_others() -> None:
    """Compute with this thread alone, at the lowest priority if the system has priorities of threads."""
    torch.set_num_threads(1)
    if hasattr(os, "setpriority"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
