"""The state that all sessions of a server share: the decoder, the limits, the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_megakernel.serving import speaking_rate
from qwen_megakernel.serving.admission import Admission
from qwen_megakernel.serving.lexicon import Lexicon
from qwen_megakernel.serving.mailbox import Mailbox
from qwen_megakernel.serving.observe import Metrics
from qwen_megakernel.serving.options import SpeechOptions, TurnOptions
from qwen_megakernel.serving.spoken_text import TextReader
from qwen_megakernel.turn import RequestError

if TYPE_CHECKING:
    from qwen_megakernel.serving.session_rules import SessionRules
    from qwen_megakernel.tts_model import TTSDecoder

ENGINE_STOPPED = "the engine has stopped; the server must be restarted"
MAX_NAMES_SHOWN = 10
"""The most known names that an error about an unknown name lists."""


@dataclass(slots=True)
class ServerState:
    """The part of the server that speaks."""

    decoder: TTSDecoder
    metrics: Metrics
    max_text_chars: int = 4096
    max_message_bytes: int = 65_536
    admission: Admission = field(default_factory=Admission)
    max_messages_per_s: float = 500.0
    """A session's messages a second; twice as many may come at once."""
    idle_s: float = 600.0
    """A session that is silent for so many seconds is over; 0 is no limit."""
    voice_aliases: Mapping[str, str] = field(default_factory=dict)
    """Names of this server's voices, by the names that clients of other services send."""
    voices_folder: Path | None = None
    """The folder for voices that clients add. Without it they cannot add any."""
    trim_leading_silence: bool = False
    """Whether the silence before a context's first sound is left out, unless the client chooses."""
    markup: bool = False
    """Whether tags in a text are followed, unless the client chooses."""
    lexicons: Mapping[str | None, Mapping[str, str]] = field(default_factory=dict)
    """Words and respellings by voice. Those under the key None are for all voices."""
    max_lead_s: float = math.inf
    """Seconds of audio that any context may be ahead of its playback, beside the limit of its rules."""
    draining: bool = False
    """Whether the server shuts down: running turns go on, and no turn may begin."""
    mailbox: Mailbox = field(default_factory=Mailbox)
    """Brings the engine's events to the event loop."""

    def lead_limit_s(self, rules: SessionRules) -> float:
        """Seconds of audio that a context under these rules may be ahead of its playback."""
        return rules.max_lead_s if rules.file else min(rules.max_lead_s, self.max_lead_s)

    def check_accepting(self) -> None:
        """Raise `RequestError` while no turn may begin."""
        if self.draining:
            raise RequestError("overloaded", "the server is shutting down")
        if self.decoder.error is not None:
            raise RequestError("internal", ENGINE_STOPPED)

    def voice_name(self, given: str | None) -> str | None:
        """The decoder's name for a voice. Raises `RequestError` if there is no such voice."""
        if given is None or given in self.decoder.voices:
            return given
        if given.lower() in self.decoder.voices:  # presets have lower-case names
            return given.lower()
        known = name_list(list(self.decoder.voices))
        raise RequestError("unknown_voice", f"voice {given[:64]} is unknown; known: {known}")

    def choose(self, before: TurnOptions, choices: SpeechOptions) -> TurnOptions:
        """The earlier options with a client's choices. Raises `RequestError` for a wrong choice."""
        voice = self.voice_name(choices.voice or None)
        chosen = before.updated(replace(choices, voice=voice))
        if chosen.speed != 1.0 and not speaking_rate.available():
            raise RequestError("unsupported", "speed other than 1 needs PyAV on the server")
        self.decoder.check(chosen.voice, chosen.language, instruct=chosen.instruct)
        return chosen

    def reader(self, options: TurnOptions) -> TextReader:
        """A reader for the text of a segment with these options."""
        voice = options.voice or self.decoder.default_voice
        words = {**self.lexicons.get(None, {}), **self.lexicons.get(voice, {}), **options.lexicon}
        return TextReader(Lexicon(words) if words else None, markup=options.markup)


def name_list(names: list[str]) -> str:
    """At most ten of the names, for an error message."""
    shown = ", ".join(sorted(names)[:MAX_NAMES_SHOWN]) or "none"
    return f"{shown}, ..." if len(names) > MAX_NAMES_SHOWN else shown
