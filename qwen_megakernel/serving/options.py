"""How text is spoken: a client's choices, and the options with which a turn of the engine is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from qwen_megakernel.config import GenerationParams

T = TypeVar("T")
_PHRASE_STEP = 0x9E3779B97F4A7C15
"""Keeps the seeds of a segment's phrases away from those of the segments that follow."""


@dataclass(frozen=True, slots=True)
class SpeechOptions:
    """A client's choices for the text that follows. None keeps the earlier choice."""

    voice: str | None = None
    """The name of a voice of the server."""
    language: str | None = None
    """Lower-case name; `auto` leaves it to the model."""
    instruct: str | None = None
    """How to speak, for checkpoints that accept instructions."""
    temperature: float | None = None
    """Temperature of the talker; 0 takes the most likely code."""
    top_k: int | None = None
    """Top-k of the talker; 0 keeps all codes."""
    seed: int | None = None
    """0 .. 2**64 - 1. The server draws a seed for a context that names none."""
    chunk_frames: int | None = None
    """Frames of 80 ms in a chunk of audio. The engine's ramp applies if a client never chooses."""
    top_p: float | None = None
    """Top-p of the talker; 1 keeps all codes."""
    repetition_penalty: float | None = None
    """Repetition penalty of the talker; 1 is no penalty."""
    predictor_temperature: float | None = None
    """Temperature of the code predictor; 0 takes the most likely codes."""
    predictor_top_k: int | None = None
    """Top-k of the code predictor; 0 keeps all codes."""
    min_frames: int | None = None
    """Frames of 80 ms before which the model cannot end a turn."""
    max_frames: int | None = None
    """Frames of 80 ms after which a turn is cut off."""
    streaming: bool | None = None
    """Text layout of the prompt."""
    trim_leading_silence: bool | None = None
    """Whether the silence before the first sound of a context is left out. Its first text decides."""
    markup: bool | None = None
    """Whether tags in the text are followed."""
    lexicon: Mapping[str, str] | None = None
    """Words and respellings, as `check_lexicon` allows them. They come before the server's own."""
    speed: float | None = None
    """0.25 to 4, at the same pitch; 2 takes half as long."""


@dataclass(frozen=True, slots=True)
class TurnOptions:
    """All choices of one turn; the defaults are the server's."""

    voice: str | None = None
    """None is the default voice."""
    language: str = "auto"
    instruct: str | None = None
    params: GenerationParams = field(default_factory=GenerationParams)
    chunk_frames: int | None = None
    streaming: bool | None = None
    """Text layout of the prompt; None is the checkpoint's own."""
    trim_leading_silence: bool = False
    markup: bool = False
    lexicon: Mapping[str, str] = field(default_factory=dict)
    """The client's own words and respellings."""
    speed: float = 1.0

    def updated(self, choices: SpeechOptions) -> TurnOptions:
        """These options, replaced by a client's choices where it has made any."""
        return TurnOptions(
            voice=_either(choices.voice, self.voice),
            language=_either(choices.language, self.language),
            instruct=_either(choices.instruct, self.instruct),
            params=_updated(self.params, choices),
            chunk_frames=_either(choices.chunk_frames, self.chunk_frames),
            streaming=_either(choices.streaming, self.streaming),
            trim_leading_silence=_either(choices.trim_leading_silence, self.trim_leading_silence),
            markup=_either(choices.markup, self.markup),
            lexicon=_either(choices.lexicon, self.lexicon),
            speed=_either(choices.speed, self.speed),
        )

    def params_of(self, segment: int, phrase: int = 0) -> GenerationParams:
        """The parameters of a phrase of a segment. Its seed is the context's seed plus the segment's
        number, and a large step for each earlier phrase of the segment."""
        seed = self.params.seed + segment + phrase * _PHRASE_STEP
        return replace(self.params, seed=seed % 2**64)


def _updated(params: GenerationParams, choices: SpeechOptions) -> GenerationParams:
    talker, predictor = params.talker, params.predictor
    return replace(
        params,
        talker=replace(
            talker,
            temperature=_either(choices.temperature, talker.temperature),
            top_k=_either(choices.top_k, talker.top_k),
            top_p=_either(choices.top_p, talker.top_p),
            repetition_penalty=_either(choices.repetition_penalty, talker.repetition_penalty),
        ),
        predictor=replace(
            predictor,
            temperature=_either(choices.predictor_temperature, predictor.temperature),
            top_k=_either(choices.predictor_top_k, predictor.top_k),
        ),
        seed=_either(choices.seed, params.seed),
        min_frames=_either(choices.min_frames, params.min_frames),
        max_frames=_either(choices.max_frames, params.max_frames),
    )


def _either(chosen: T | None, before: T) -> T:
    return before if chosen is None else chosen
