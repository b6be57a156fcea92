"""Train the codec while the teacher still reads.

    python -m training.train_codec build/training --seconds 300
    python -m training.train_codec build/training --seconds 300 --start demo_voice
    python -m training.train_codec build/training --seconds 300 --resume build/training --frozen

Reads `sentences.txt` of the folder and the files in its `speech/`. The teacher reads out the rest
meanwhile. Writes `codec-decoder.safetensors`, `codec-encoder.safetensors` and
`codec-critics.safetensors`. The second form begins with the decoder and the codebooks of a checkpoint. A
checkpoint has no encoder, so at first only a new encoder learns, to fit them. The third form trains the
decoder alone, so that codes keep their meaning. Time is bounded: schedules follow the clock, not a
number of steps.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_megakernel.checkpoint import SPEECH_FOLDER
from qwen_megakernel.config import HOP
from training import geometry, precompile, teacher
from training.codec_model import ENCODER_MARGIN, TrainedCodec, decode_latents
from training.critics import Critics, critic_loss, generator_losses
from training.graphs import Batch, Steps, clock
from training.spectra import spectral_distance

SEGMENT = 24
"""Frames of a sample. More than the decoder's attention window."""
JUDGED = 8
"""Frames of a sample that become audio."""
CONTEXT = 4
"""Frames before those that the slow layers see. Their convolutions look back almost as far."""
FRESH = 0.25
"""Share of the steps whose samples are the first of an utterance. Every first word is made this way."""
SPECTRAL_WEIGHT = 20
TRAINING_FRAMES = 400_000
"""Frames of speech for training. Nine hours are enough for four voices."""
FIRST_SPEECH_S = 60
"""Seconds that the teacher may take for its first sentences."""
COMPILERS = 12
"""Processes that compile the GPU's kernels."""
FIRST_CHUNKS = 8
"""Chunks of speech with which training begins."""
_DECODER, _ENCODER = "codec-decoder.safetensors", "codec-encoder.safetensors"
_CRITICS = "codec-critics.safetensors"


@dataclass(frozen=True)
class Plan:
    """The length of the training, its sizes, and the shares of the time at which quantiser, decoder and
    critics join."""

    seconds: float
    batch: int
    peak_rate: float
    quantised_from: float
    critics_from: float
    decoder_from: float = 0.0
    """Until then the decoder and the codebooks stay as they are."""


class SpeechStore:
    """Utterances as they are read, on the device as int16, with silence between them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._taken: set[Path] = set()
        self.chunks: list[tuple[int, list[int], Tensor]] = []
        """Index of the first sentence, frames of each sentence, samples int16."""
        self.flat = torch.zeros(0, dtype=torch.int16, device=device)
        self._beginnings = torch.zeros(0, dtype=torch.int64, device=device)

    def take(self, most_frames: float = math.inf) -> None:
        """Add what is new in the folder, up to `most_frames` in all."""
        fresh = sorted(set(self._folder.glob("*.npz")) - self._taken)
        for path in fresh:
            if self.num_frames >= most_frames:
                break
            first, frames, audio = teacher.read_chunk(path)
            self.chunks.append((first, frames.tolist(), torch.from_numpy(audio)))
            self._taken.add(path)

    @property
    def num_frames(self) -> int:
        """Frames taken so far."""
        return sum(sum(frames) for _, frames, _ in self.chunks)

    def settle(self) -> None:
        """Make the training set from what is there, if that is much more than the set has."""
        if self.num_frames * HOP < 1.5 * len(self.flat):
            return
        gap = torch.zeros(ENCODER_MARGIN * HOP, dtype=torch.int16)
        parts, beginnings, length = [gap], [], 0
        for _, frames, audio in self.chunks:
            for one in audio.split([n * HOP for n in frames]):
                parts += [one, gap]
                beginnings.append(length)
                length += len(one) // HOP + ENCODER_MARGIN
        self.flat = torch.cat(parts).to(self._device)
        self._beginnings = torch.tensor(beginnings, device=self._device)

    def sample(self, batch: int, *, beginnings: bool = False) -> Tensor:
        """Stretches at random places or at beginnings, float32 [batch, (SEGMENT + 2 margins) * 1920]."""
        length = (SEGMENT + 2 * ENCODER_MARGIN) * HOP
        last = len(self.flat) // HOP - SEGMENT - 2 * ENCODER_MARGIN
        starts = torch.randint(last + 1, (batch, 1), device=self._device)
        if beginnings:
            starts = self._beginnings[starts % len(self._beginnings)].clamp(max=last)
        starts = starts * HOP
        return self.flat[starts + torch.arange(length, device=self._device)].float() / 32768


class Trainer:
    """Codec, critics and their optimisers, and one step of each kind."""

    def __init__(self, codec: TrainedCodec, device: torch.device, *, frozen: bool) -> None:
        self.codec, self.critics, self.device, self.frozen = codec, Critics().to(device), device, frozen
        self.rate = torch.tensor(0.0, device=device)
        on_gpu = device.type == "cuda"
        options = {"betas": (0.8, 0.95), "weight_decay": 1e-3, "fused": on_gpu, "capturable": on_gpu}
        self.params = list((codec.decoder if frozen else codec).parameters())
        self.generator = torch.optim.AdamW(self.params, self.rate, **options)
        self.judge = torch.optim.AdamW(self.critics.parameters(), 2e-4, **options)

    def step(
        self, batch: Batch, *, quantised: bool, judged: bool, context: int, alone: bool = False
    ) -> Tensor:
        """One update. Returns the spectral distance, the commitment loss, and how badly the critics are
        fooled.

        `batch` has audio [n, samples] with margins, a window of [context + JUDGED] frames of which the
        last are made, and a scalar weight of the critics. With `alone`, only the encoder learns.
        """
        if not self.frozen:
            self.codec.decoder.requires_grad_(not alone)
            self.codec.quantizer.requires_grad_(not alone).train(not alone)
        audio, window = batch["audio"], batch["window"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            x, commitment = self._codes(audio, quantised)
            made = decode_latents(self.codec.decoder, x, window, context)
        made_of = window[context:] + ENCODER_MARGIN
        frames = audio.unflatten(1, (-1, HOP)).index_select(1, made_of)
        true = frames.flatten(1)
        spectral = spectral_distance(made, true)
        loss, fooled = SPECTRAL_WEIGHT * spectral + commitment, spectral.new_zeros(())
        if judged:
            heard = (len(made) + 1) // 2  # half of the batch: critics cost twice as much as the codec
            adversarial, fooled = self._judge(made[:heard], true[:heard])
            loss = loss + batch["weight"] * adversarial
        self.generator.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 10.0)
        self.generator.step()
        return torch.stack((spectral.detach(), commitment.detach(), fooled.detach()))

    def _codes(self, audio: Tensor, quantised: bool) -> tuple[Tensor, Tensor]:
        """The decoder's input, and the commitment loss."""
        margin = ENCODER_MARGIN
        with torch.set_grad_enabled(not self.frozen):
            latents = self.codec.encoder(audio)[:, margin:-margin].float()
            with torch.autocast(self.device.type, enabled=False):
                if not quantised:
                    return self.codec.quantizer.bypass(latents), latents.new_zeros(())
                kept = None if self.frozen else _random_kept(len(audio), self.device)
                x, _, commitment = self.codec.quantizer(latents, kept)
        return x, commitment

    def _judge(self, made: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the critics. Returns what they and their features add to the generator's loss.

        The features of the true audio are those from before the step, which saves a pass.
        """
        with torch.autocast(made.device.type, torch.bfloat16, enabled=made.is_cuda):
            both = self.critics(torch.cat((made.detach(), true)))
            false = [[x[: len(made)] for x in one] for one in both]
            real = [[x[len(made) :] for x in one] for one in both]
            loss = critic_loss(false, real)
            self.judge.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.critics.parameters(), 10.0)
            self.judge.step()
            self.critics.requires_grad_(False)
            fooled, likeness = generator_losses(self.critics(made), real)
            self.critics.requires_grad_(True)
        return fooled + 2 * likeness, fooled


def _random_kept(batch: int, device: torch.device) -> Tensor:
    """All codebooks for most samples, fewer for some, so that the first codebooks carry most."""
    fewer = torch.randint(2, 16, (batch,), device=device)
    return torch.where(torch.rand(batch, device=device) < 0.25, fewer, 16)


def train(trainer: Trainer, store: SpeechStore, plan: Plan) -> None:
    """Train in place."""
    device, steps, shown = trainer.device, Steps(trainer.device), 0.0
    for step, share in clock(plan.seconds):
        warm = min(1.0, (step + 1) / 100)
        trainer.rate.fill_(plan.peak_rate * warm * max(0.03, 0.5 * (1 + math.cos(math.pi * share))))
        if step % 100 == 99 and store.num_frames < TRAINING_FRAMES:
            store.take(TRAINING_FRAMES)
            store.settle()
        quantised, judged = share >= plan.quantised_from, share >= plan.critics_from
        context = 0 if torch.rand(()) < FRESH else CONTEXT
        first = int(torch.randint(SEGMENT - JUDGED - CONTEXT + 1, ())) if context else 0
        batch = {
            "audio": store.sample(plan.batch, beginnings=not context),
            "window": torch.arange(first, first + context + JUDGED, device=device),
            "weight": torch.tensor(min(1.0, max(0.0, share - plan.critics_from) * 20), device=device),
        }
        kind = {"quantised": quantised, "judged": judged, "context": context}
        kind["alone"] = share < plan.decoder_from
        found = steps.run(tuple(kind.values()), lambda b, k=kind: trainer.step(b, **k), batch)
        if share >= shown:
            shown += 0.05
            spectral, commitment, fooled = found.tolist()
            print(
                f"codec {share:5.1%} step {step} spectral {spectral:.3f} commitment {commitment:.3f} "
                f"fooled {fooled:.2f} hours {store.num_frames * HOP / 24_000 / 3600:.2f}",
                flush=True,
            )


def load_codec(folder: Path) -> TrainedCodec:
    """Load what `save_codec` wrote."""
    codec = TrainedCodec(geometry.config().codec)
    codec.load_state_dict(load_file(folder / _DECODER) | load_file(folder / _ENCODER))
    return codec


def start_codec(checkpoint: Path) -> TrainedCodec:
    """A codec with the decoder and codebooks of a checkpoint, and a fresh encoder."""
    codec = TrainedCodec(geometry.config().codec)
    weights = load_file(checkpoint / SPEECH_FOLDER / "model.safetensors")
    decoder = {name.removeprefix("decoder."): w.float() for name, w in weights.items()}
    codec.decoder.load_state_dict(decoder)
    codec.adopt()
    return codec


def save_codec(codec: TrainedCodec, out: Path) -> None:
    """Write the decoder, and in another file what only training needs."""
    codec.publish()
    state = {name: tensor.contiguous() for name, tensor in codec.state_dict().items()}
    decoder = {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
    rest = {name: tensor for name, tensor in state.items() if name not in decoder}
    save_file(decoder, out / _DECODER)
    save_file(rest, out / _ENCODER)


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=180, help="of training")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--critics-from", type=float, default=0.5, help="share of the time")
    parser.add_argument("--resume", type=Path, default=None, help="folder of a codec to go on from")
    parser.add_argument("--start", type=Path, default=None, help="checkpoint to take a decoder from")
    parser.add_argument("--alone", type=float, default=0.2, help="share of the time before it learns")
    parser.add_argument("--frozen", action="store_true", help="train the decoder alone")
    parser.add_argument("--speech", type=Path, default=None, help="default: speech/ of the folder")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2),
        help="processes of the teacher; 0 where training.teacher runs beside",
    )  # fmt: skip
    parser.add_argument("--sentences", type=int, default=None, help="read only so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: the folder")
    return parser.parse_args()


def _wait_for_speech(store: SpeechStore, readers: list[Process]) -> None:
    """Wait until the readers, which have just begun, have something. Raises `TimeoutError`."""
    deadline = time.monotonic() + FIRST_SPEECH_S
    while len(store.chunks) < FIRST_CHUNKS and (
        not readers or any(reader.is_alive() for reader in readers)
    ):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
        store.take(TRAINING_FRAMES)
    store.take(TRAINING_FRAMES)
    if not store.chunks:
        raise TimeoutError(f"the teacher has read nothing out after {FIRST_SPEECH_S} s")
    store.settle()


def _codec_to_train(args: argparse.Namespace, device: torch.device) -> TrainedCodec:
    """A fresh codec, or the one in a folder. With `--frozen` only its decoder learns."""
    torch.manual_seed(0)
    if args.resume:
        codec = load_codec(args.resume)
    else:
        codec = start_codec(args.start) if args.start else TrainedCodec(geometry.config().codec)
    if args.frozen:
        codec.encoder.eval().requires_grad_(False)
        codec.quantizer.eval().requires_grad_(False)
    return codec.to(device)


def main() -> None:
    """Run the teacher, the training and the encoding."""
    args = read_arguments()
    out, device = args.out or args.folder, torch.device(args.device)
    speech = args.speech or args.folder / "speech"
    sentences = (args.folder / "sentences.txt").read_text(encoding="utf-8").splitlines()
    sentences = sentences[: args.sentences]
    readers = teacher.start(sentences, speech, args.workers) if args.workers else []
    if device.type == "cuda":
        precompile.compile_all(geometry.config().codec, COMPILERS)
    torch.backends.cudnn.benchmark = True
    codec = _codec_to_train(args, device)
    store = SpeechStore(speech, device)
    _wait_for_speech(store, readers)
    from_quantised = 0.0 if args.resume else 0.08
    from_decoder = args.alone if args.start else 0.0
    plan = Plan(args.seconds, args.batch, args.rate, from_quantised, args.critics_from, from_decoder)
    trainer = Trainer(codec, device, frozen=args.frozen)
    if args.resume and (args.resume / _CRITICS).is_file():
        trainer.critics.load_state_dict(load_file(args.resume / _CRITICS))
    train(trainer, store, plan)
    save_codec(codec.eval(), out)
    critics = trainer.critics.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in critics.items()}, out / _CRITICS)
    for reader in readers:
        reader.terminate()


if __name__ == "__main__":
    main()
