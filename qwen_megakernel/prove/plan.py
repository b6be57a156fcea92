"""The plan of a run: what is measured, how much of it, and on which device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qwen_megakernel.prove.resume import Found, checkpoint_digest, sources_digest
from qwen_megakernel.prove.utterances import ListedText


@dataclass(frozen=True, slots=True)
class Size:
    """How much a run measures."""

    texts: int
    """Utterances of the fidelity part."""
    frames: int
    """Greedy frames of each utterance."""
    draws: int
    """The least number of predictor codes that are drawn and ranked. The talker draws a fifteenth of
    it."""
    natural: int
    """Utterances drawn with the checkpoint's own sampling, until EOS."""
    pairs: int
    """Utterances that both sides speak."""
    turns: int
    """Turns of each measurement of speed."""
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
    """Folder of the checkpoint."""
    model: str
    """Name of the checkpoint for the report, without a path."""
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
    """Texts of a list in Seed-TTS-eval's format. If there are none, the sixty sentences are spoken."""
    language: str = "english"

    @property
    def dtype(self) -> str:
        """Precision of our side: the one in which the server would run."""
        return "fp32" if self.device.type == "cpu" else "bf16"

    @property
    def base(self) -> Found:
        """The values on which every part of the run depends."""
        return {
            "sources": sources_digest(),
            "checkpoint": checkpoint_digest(self.folder),
            "backend": self.backend,
            "device": device_name(self.device),
            "torch": torch.__version__,
        }


def device_name(device: torch.device) -> str:
    """The device's name for the report: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
