"""Settings of the speech that may change at run time, and the figures that the server reports."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from pipecat.metrics.metrics import MetricsData
from pipecat.services.settings import NOT_GIVEN, NotGiven, TTSSettings

from pipecat_client.playback import Gaps
from qwen_megakernel.serving.lexicon import Lexicon
from qwen_megakernel.serving.native_messages import Done, Ready, Speak, check_values
from qwen_megakernel.serving.spoken_text import TextReader
from qwen_megakernel.serving.wire import ProtocolError, language_name


@dataclass
class MegakernelTTSSettings(TTSSettings):
    """Settings that a `TTSUpdateSettingsFrame` can change at run time. None leaves one to the server.

    `voice` is the name of a voice of the server. `language` is a `Language` or a name; with None the
    model tells it from the text. A change applies from the next sentence on.
    """

    instruct: str | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """How to speak, for checkpoints that accept instructions; up to 1000 characters."""
    temperature: float | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """0 to 10; 0 takes the most likely code."""
    top_k: int | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """0 to 65536; 0 keeps all codes."""
    seed: int | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """The same seed, text and voice give the same speech; None draws one for each sentence."""
    chunk_frames: int | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """Frames of 80 ms in one audio message, 1 to 8; None begins with one frame and grows."""
    trim_leading_silence: bool | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """Whether the silence before a reply's first sound is left out, up to 1 s."""
    markup: bool | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """Whether `<spell>` and `<break>` in the text are followed; True also keeps them in one sentence."""
    lexicon: dict[str, str] | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """Words, and how they are spelt so that the model says them right."""
    speed: float | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    """Rate of speech, 0.25 to 4, at the same pitch; 2 takes half as long."""

    @classmethod
    def defaults(cls) -> MegakernelTTSSettings:
        """Settings that leave everything to the server. `model` is a name for metrics."""
        nothing: dict[str, Any] = dict.fromkeys(
            each.name for each in fields(cls) if each.name != "extra"
        )
        return cls(**nothing | {"model": "qwen3-tts"})

    def check(self) -> None:
        """Raise `ValueError`, with one line, for a value that no server takes."""
        try:
            check_values(Speak, self.speak_fields())
        except ProtocolError as error:
            raise ValueError(f"settings: {error}") from None

    def unserved(self, ready: Ready) -> str | None:
        """One line that says which setting this server cannot serve; None if it can serve all."""
        voice, language = self.voice, self.language
        if isinstance(voice, str) and voice.lower() not in map(str.lower, ready.voices):
            return f"voice {voice} is unknown; known: {', '.join(ready.voices) or 'none'}"
        if isinstance(language, str) and language_name(language) not in ready.languages:
            return f"language {language} is unknown; known: {', '.join(ready.languages)}"
        return None

    def follows_tags(self, ready: Ready | None) -> bool:
        """Whether tags are followed; a server that is not known yet follows none unasked."""
        if isinstance(self.markup, bool):
            return self.markup
        return ready is not None and bool(ready.markup)

    def reader(self, ready: Ready | None) -> TextReader:
        """A reader of a sentence's text that works as the server's does, but without the server's own
        lexicon."""
        words = self.lexicon if isinstance(self.lexicon, dict) else {}
        return TextReader(Lexicon(words) if words else None, markup=self.follows_tags(ready))

    def speak_fields(self) -> dict[str, Any]:
        """The options for `native_messages.Speak`."""
        names = (
            "voice", "language", "instruct", "temperature", "top_k", "seed", "chunk_frames",
            "trim_leading_silence", "markup", "lexicon", "speed",
        )  # fmt: skip
        return {name: value for name in names if (value := getattr(self, name)) is not NOT_GIVEN}


class ServerTTSMetricsData(MetricsData):
    """The server's own figures of one turn, in a `MetricsFrame`. They are None without audio."""

    ttfc_ms: float | None
    """Milliseconds from the first text at the server to the first audio that its socket got."""
    rtf: float | None
    """Generation over duration; below 1 is faster than real time."""
    duration_s: float
    finish_reason: str
    gaps: int = 0
    """Times that audio came too late, as the service saw it, and playback stood still."""
    gap_s: float = 0.0
    """Seconds of all gaps together."""

    @classmethod
    def of(
        cls, done: Done, processor: str, model: str | NotGiven | None, gaps: Gaps
    ) -> ServerTTSMetricsData:
        """The figures of a `done`, and the gaps that the service saw."""
        return cls(
            processor=processor,
            model=model if isinstance(model, str) else None,
            ttfc_ms=done.ttfc_ms,
            rtf=done.rtf,
            duration_s=done.duration_s,
            finish_reason=done.finish_reason,
            gaps=gaps.count,
            gap_s=round(gaps.seconds, 3),
        )
