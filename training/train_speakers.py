"""Train the speaker encoder on the teacher's voices, and embed clips of them for the talker.

    python -m training.train_speakers build/training

Reads `sentences.txt` of the folder. Writes `speaker-encoder.safetensors` and `speakers.safetensors`
(`clips` float32 [voices, clips, hidden]). Takes a few minutes on one CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from qwen_megakernel.config import SAMPLE_RATE
from qwen_megakernel.prompt.speaker_encoder import SpeakerEncoder, log_mel
from training import geometry
from training.teacher import VOICES, Teacher

CLIPS = 96
"""Recordings of each voice."""
CLIP_S = (1.0, 4.0)
"""Seconds of the shortest and of the longest stretch that is embedded."""
_SCALE = 12.0
"""Scale of the cosines in the classification."""


def recordings(sentences: list[str]) -> list[list[Tensor]]:
    """Log-mels [frames, 128] of CLIPS recordings of each voice. Each recording has some seconds."""
    teacher = Teacher()
    found = []
    for index, voice in enumerate(VOICES):
        own = sentences[index * CLIPS * 3 : (index + 1) * CLIPS * 3]
        audio = [torch.from_numpy(teacher.say(text, voice)) for text in own]
        joined = [torch.cat(audio[i : i + 3]) for i in range(0, len(audio), 3)]
        found.append([log_mel(F.pad(one, (0, SAMPLE_RATE))[: 5 * SAMPLE_RATE]) for one in joined])
    return found


def stretch(mels: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """A random part of a recording, at a random loudness."""
    first = int(torch.randint(max(len(mels) - frames, 0) + 1, (), generator=generator))
    loudness = (torch.rand((), generator=generator) - 0.5) * 2
    return mels[first : first + frames] + loudness


def train(encoder: SpeakerEncoder, mels: list[list[Tensor]], steps: int, batch: int = 16) -> None:
    """Train by classification of cosines. Embeddings have unit mean square, so they weigh as other rows
    do."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.Parameter(torch.randn(len(mels), encoder.config.enc_dim, generator=generator))
    optimiser = torch.optim.AdamW([*encoder.parameters(), centres], 1e-3, weight_decay=0.01)
    for step in range(steps):
        voices = torch.randint(len(mels), (batch,), generator=generator)
        seconds = CLIP_S[0] + (CLIP_S[1] - CLIP_S[0]) * float(torch.rand((), generator=generator))
        frames = int(seconds * SAMPLE_RATE / 256)
        picks = torch.randint(CLIPS * 3 // 4, (batch,), generator=generator)  # the rest is for the test
        pairs = zip(voices.tolist(), picks.tolist(), strict=True)
        x = encoder(torch.stack([stretch(mels[v][i], frames, generator) for v, i in pairs]))
        cosines = F.cosine_similarity(x[:, None], centres[None], dim=-1)
        margin = 0.2 * F.one_hot(voices, len(mels))
        size = (x.square().mean(-1) - 1).square().mean()
        loss = F.cross_entropy(_SCALE * (cosines - margin), voices) + 0.1 * size
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 0:
            right = (cosines.argmax(-1) == voices).float().mean()
            print(f"speakers step {step} loss {loss:.3f} right {right:.2f} size {size:.3f}", flush=True)


@torch.no_grad()
def embed(encoder: SpeakerEncoder, mels: list[list[Tensor]]) -> Tensor:
    """Embeddings [voices, CLIPS, hidden] of three seconds each."""
    frames = 3 * SAMPLE_RATE // 256
    generator = torch.Generator().manual_seed(1)
    return torch.stack(
        [encoder(torch.stack([stretch(one, frames, generator) for one in voice])) for voice in mels]
    )


def worst_cosines(clips: Tensor) -> tuple[float, float]:
    """The lowest cosine of an unseen clip to the mean of its own voice, and the highest to another's."""
    seen, unseen = clips[:, : CLIPS * 3 // 4], clips[:, CLIPS * 3 // 4 :]
    cosines = F.cosine_similarity(unseen[:, :, None], seen.mean(1)[None, None], dim=-1)
    own = torch.eye(len(clips), dtype=torch.bool)[:, None].expand_as(cosines)
    return float(cosines[own].min()), float(cosines[~own].max())


def main() -> None:
    """Train, test, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.manual_seed(0)
    sentences = (args.folder / "sentences.txt").read_text(encoding="utf-8").splitlines()
    mels = recordings(sentences)
    encoder = SpeakerEncoder(geometry.config().speaker_encoder)
    train(encoder, mels, args.steps)
    clips = embed(encoder.eval(), mels)
    print("worst cosine to the own voice {:.3f}, to another {:.3f}".format(*worst_cosines(clips)))
    state = {f"speaker_encoder.{name}": value for name, value in encoder.state_dict().items()}
    save_file(state, args.folder / "speaker-encoder.safetensors")
    save_file({"clips": clips.contiguous()}, args.folder / "speakers.safetensors")


if __name__ == "__main__":
    main()
