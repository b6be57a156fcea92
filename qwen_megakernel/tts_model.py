"""`TTSDecoder`: a loaded checkpoint that speaks. The package's front door.

    tts = TTSDecoder.load("Qwen/Qwen3-TTS-12Hz-0.6B-Base")
    tts.add_voice("anna", tts.clone_voice(Path("anna.wav").read_bytes()))
    for chunk in tts.stream("Hello there.", voice="anna"):   # float32 [n], 24 kHz
        play(chunk)

Whole text, live text and many turns at once all go through a `Turn`. `stream` and `synthesize` put a
queue around it.
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
"""Fewer are too little to share out between threads, which wait for each other at every operation:
at best no faster, and on a busy machine a hundred times slower."""


class SynthesisError(RuntimeError):
    """A turn that failed, or whose speech was cut off; the message says why."""


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA GPU, else the CPU. Raises `CheckpointError`."""
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
    """`auto` is bf16 on a GPU and fp32 on a CPU. Raises `CheckpointError`."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise CheckpointError(f"dtype is {name!r}, allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


class TTSDecoder:
    """A checkpoint on a device, its voices, and the engine that runs its turns.

    Thread-safe. Make one with `load`; `close` it, or use it as a context manager.
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
        # fp32 shall mean fp32: convolutions on CUDA would take TF32, matrix products would not.
        torch.backends.cudnn.allow_tf32 = False
        self.sample_rate = SAMPLE_RATE
        self.languages = config.talker.languages
        """Names for `language`, `auto` first."""
        self.voices: dict[str, Voice] = {}
        self.default_params = params
        """Sampling of a turn that chooses none; its seed is not used."""
        self.default_voice: str | None = None
        """The voice of a request that names none; None is the model's own choice."""

        checkpoint.verify()
        # Seconds of imports, while weights are read.
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
        """What runs where, for banners and reports."""

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
            sampling: what turns draw with that choose nothing: `original` (the talker at temperature
                0.3 and top-k 15) or `checkpoint` (its `generation_config.json`; the released ones say
                0.9 and 50).
            text_cleaning: leave out of every text what cannot be spoken (docs/text.md); without it
                a text becomes the official package's tokens whatever is in it.
            revision: commit of a Hugging Face id.
            offline: use only what is in the cache.
            progress: told what is being done, a line each.

        Raises:
            CheckpointError: one line that names what is missing or wrong.
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
        """A voice from the bytes of a WAV or FLAC file of 1 to 30 s.

        Args:
            data: the file's content.
            ref_text: what is said in it: ICL mode. Without it, the speaker embedding alone.

        Raises:
            VoiceError: audio that cannot be used; RequestError: a checkpoint that cannot clone.
        """
        return self._voice_cloner().clone(data, ref_text)

    def clone_voice_aside(self, data: bytes, ref_text: str | None = None) -> Future[Voice]:
        """The same while others speak: on the CPU, in a thread that yields to every other.

        A recording that was too loud is refused too. The future raises what `clone_voice` raises.
        """

        def clone() -> Voice:
            _yield_to_others()
            return self._voice_cloner(torch.device("cpu")).clone(data, ref_text, refuse_clipped=True)

        return in_daemon_thread(clone)

    def design_voice(self, description: str) -> Voice:
        """A voice that a VoiceDesign checkpoint makes up from a description.

        Raises:
            VoiceError: a description that is blank or too long; RequestError: another checkpoint.
        """
        if self.config.mode != "voice_design":
            raise RequestError(
                "unsupported",
                f"a {self.config.mode} checkpoint cannot design voices, only voice_design can",
            )
        return Voice.designed(description)

    def load_voices(self, folder: Path) -> None:
        """Add every voice of an operator's folder (see `voice.load_voices`).

        The operator's own come first, so that none that a client added becomes the default instead.
        """
        designs = self.config.mode == "voice_design"
        cloner = None if designs else self._voice_cloner()
        loaded = load_voices(folder, cloner)
        for name in sorted(loaded, key=lambda name: "origin" in loaded[name].notes):
            self.add_voice(name, loaded[name])

    def add_voice(self, name: str, voice: Voice) -> None:
        """Make a voice available by name; the first becomes the default.

        Raises:
            ValueError: a name other than letters, digits, `-` and `_`.
        """
        if not voice_name_ok(name):
            raise ValueError(f"voice name {name!r}, allowed: letters, digits, - and _, up to 64")
        self.voices = {**self.voices, name: voice}
        self.default_voice = self.default_voice or name

    def remove_voice(self, name: str) -> None:
        """Take a voice away, if it is there; turns that speak with it go on.

        If it was the default, the first of the others is.
        """
        self.voices = {other: voice for other, voice in self.voices.items() if other != name}
        if self.default_voice == name:
            self.default_voice = next(iter(self.voices), None)

    def _voice_cloner(self, device: torch.device | None = None) -> VoiceCloner:
        """Loaded at the first use: a server with ready-made voices never needs it."""
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
            # In fp32: they run once a voice, and what they make is kept.
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
        """Whether `open_turn` would take these. Raises `RequestError`."""
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
            sink: takes `Started`, `Audio` ..., `Finished`; must return at once.
            ended: whether the text is complete.
            voice: a name of `voices`, a `Voice`, or None for the default.
            language: one of `languages`, in any case.
            instruct: how to speak (VoiceDesign and 1.7B CustomVoice checkpoints); None is the
                voice's description, where it has one.
            streaming: text layout; None is the checkpoint's own. Live text starts early only
                in the streaming layout.
            params: sampling, seed and limits; None is `default_params` with a random seed.
            chunk_frames: 80 ms frames a chunk; None is a ramp that begins with one.
            max_lead_s: how far ahead of playback to run; None is as fast as possible.
            owner: whom the turn is for; owners take turns where slots are short.

        Raises:
            RequestError: what cannot be served; see its `code`.
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
        """Speak a text: float32 chunks [n] at 24 kHz, as they are made.

        Closing the iterator cancels the turn. Options are those of `open_turn`.

        Raises:
            RequestError: at once, for what cannot be served.
            SynthesisError: from the iterator, when the turn fails; or at its end, when the speech was
                cut off (`length`) although `params` set no `max_frames`.
        """
        events: queue.SimpleQueue[TurnEvent] = queue.SimpleQueue()
        turn = self.open_turn(text, voice=voice, sink=events.put, ended=True, **options)
        return _chunks(turn, events)

    def synthesize(self, text: str, voice: str | Voice | None = None, **options: Any) -> np.ndarray:
        """The stream joined: float32 [samples] at 24 kHz. Raises what `stream` raises."""
        chunks = list(self.stream(text, voice, **options))
        return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.float32)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Speak a few frames with every voice, so that the first client does not pay for it."""
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
        """Turns that hold a slot."""
        return self._engine.num_speaking

    @property
    def num_waiting(self) -> int:
        """Turns that wait for a slot or for their first text."""
        return self._engine.num_waiting

    @property
    def num_slots(self) -> int:
        """Turns that can hold a slot."""
        return self._engine.num_slots

    def capacity(self, owner: Owner = ()) -> Capacity:
        """What the engine can take now of a new turn of `owner`; from any thread."""
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
        """What killed the engine; a decoder with an error serves nothing more."""
        return self._engine.error

    def close(self, drain_s: float = 0.0) -> None:
        """End all turns (after up to `drain_s` seconds of grace) and the engine's thread."""
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
    """Compute with this thread alone, at the lowest priority; where threads have none, as all do."""
    torch.set_num_threads(1)
    if hasattr(os, "setpriority"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
