"""How much is measured, of what, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_megakernel.prove.resume import Found, checkpoint_digest, sources_digest
from qwen_megakernel.prove.utterances import ListedText


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    texts: int
    """Utterances of the fidelity part."""
    frames: int
    """Greedy frames of each."""
    draws: int
    """Codes of the predictor that are drawn and ranked, at least; the talker draws a fifteenth."""
    natural: int
    """Utterances drawn with the checkpoint's own sampling, until EOS."""
    pairs: int
    """Utterances that both sides speak."""
    turns: int
    """Of each measurement of speed."""
    voices_at_once: tuple[int, ...]
    """Numbers of clients that speak together."""


SIZES = {
    "quick": Size(3, 40, 10_500, 12, 8, 3, (1, 2)),
    "standard": Size(8, 96, 20_000, 40, 100, 10, (1, 4, 8, 16, 32)),
    "full": Size(16, 160, 150_000, 120, 500, 20, (1, 2, 4, 8, 16, 32, 64)),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    folder: Path
    """Of the checkpoint."""
    model: str
    """What to call it: no path."""
    out: Path
    size: Size
    backend: str
    device: torch.device
    recogniser: str | None = None
    similarity: Path | None = None
    """An independent speaker encoder, an ONNX file."""
    voices: Path | None = None
    """A folder of voices; None is the checkpoint's own `voices/`, if it has one."""
    texts: tuple[ListedText, ...] = ()
    """Of a list in Seed-TTS-eval's format; empty is the sixty sentences."""
    language: str = "english"

    @property
    def dtype(self) -> str:
        """Of our side: what the server would run."""
        return "fp32" if self.device.type == "cpu" else "bf16"

    @property
    def base(self) -> Found:
        """What every part of the run depends on."""
        return {
            "sources": sources_digest(),
            "checkpoint": checkpoint_digest(self.folder),
            "backend": self.backend,
            "device": device_name(self.device),
            "torch": torch.__version__,
        }


def device_name(device: torch.device) -> str:
    """For the report: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
