"""A launched frame, from its launch until its audio is delivered."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_megakernel.codec.interface import LaunchedAudio
from qwen_megakernel.decoding.interface import LaunchedFrame
from qwen_megakernel.engine.active_turn import ActiveTurn
from qwen_megakernel.turn import FinishReason


@dataclass(slots=True)
class FrameSlot:
    """One turn's part of a launched frame."""

    turn: ActiveTurn
    part: int
    """The number of the part of the turn's text."""
    text_exhausted: bool
    """Whether all text of the part, EOS included, was fed up to this frame."""
    ending: FinishReason | None
    """Why the part ends after this frame, if it does."""

    @property
    def over(self) -> bool:
        """Whether the turn no longer needs the frame."""
        return self.turn.turn.finished or self.part != self.turn.part


@dataclass(frozen=True, slots=True)
class InFlightFrame:
    """A launched frame, from its launch until its audio is delivered."""

    slots: list[FrameSlot]
    frame: LaunchedFrame
    audio: LaunchedAudio
