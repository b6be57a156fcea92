"""Train talker and code predictor on the codec's codes.

    python -m training.train_talker build/training --seconds 200

Reads `tokens.npz`, `codes-*.npz` and `speakers.safetensors` of the folder. Writes `talker.safetensors`,
with averaged weights, from time to time and at the end. Codes that are made meanwhile are learnt too.
Time is bounded: schedules follow the clock. On CUDA each batch shape is one graph, because otherwise the
layers are too small to keep the GPU busy.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen_megakernel.config import NUM_CODEBOOKS, ModelConfig
from qwen_megakernel.model.talker import Attend, DecoderLayer, Talker, rope_tables
from training import batches, corpus, geometry, teacher
from training.batches import Material
from training.graphs import Batch, Steps, clock
from training.rows import NONE, Layout, Utterance

DROPOUT = 0.05
"""Share of a layer's additions that is dropped at random. Without it, codes are learnt by heart."""
UNSEEN = 100
"""One sentence in this many is not learnt. It shows whether what is learnt holds for other sentences."""
LEAST = 200
"""Sentences with which training begins: a batch of the shortest."""
SAVED_S = 60
"""Seconds between two saves."""
_CODE_WEIGHTS = tuple(1 / math.sqrt(k) for k in range(1, NUM_CODEBOOKS))
"""Weights of the fifteen predicted codes in the loss. The first codes are the most audible."""


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each sequence; see `qwen_megakernel.model.talker.Attend`."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, 2).transpose(1, 2).to(q.dtype) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)


def _with_none(table: Tensor) -> Tensor:
    """The table and a row of zeros, which index -1 selects."""
    return torch.cat((table, table.new_zeros(1, table.shape[1])))


def _look_up(table: Tensor, ids: Tensor) -> Tensor:
    table = _with_none(table)
    flat = torch.where(ids < 0, len(table) - 1, ids).flatten()
    return table.index_select(0, flat).unflatten(0, ids.shape)


def input_rows(talker: Talker, batch: Batch, speakers: Tensor) -> Tensor:
    """The rows [n, rows, hidden] of a batch. `speakers` is [n, hidden]."""
    model = talker.model
    texts = talker.text_projection(model.text_embedding.weight).float()
    x = _look_up(texts, batch["text"]) + _look_up(model.codec_embedding.weight, batch["control"])
    size = talker.code_predictor.lm_head[0].out_features
    tables = [model.codec_embedding.weight[:size]]
    tables += [embedding.weight for embedding in talker.code_predictor.model.codec_embedding]
    # A product with ones and zeros: its backward pass is a product too, and the tables are small.
    chosen = batch["codes"][..., None] == torch.arange(size, device=x.device)
    x = x + (chosen.flatten(-2).to(torch.bfloat16 if x.is_cuda else x.dtype) @ torch.cat(tables)).float()
    is_speaker = torch.arange(x.shape[1], device=x.device) == batch["speaker"][:, None]
    return x + is_speaker[..., None] * speakers[:, None]


def losses(talker: Talker, config: ModelConfig, batch: Batch, speakers: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of code 0 with EOS, and of codes 1..15 [15]."""
    x = input_rows(talker, batch, speakers)
    positions = torch.arange(x.shape[1], device=x.device)
    # The three axes of the talker's RoPE are equal in speech, so plain RoPE is enough.
    cos, sin = (table[None] for table in rope_tables(config.talker, positions))
    hidden = talker(F.dropout(x, DROPOUT, talker.training), cos, sin, attend).flatten(0, 1)
    logits = talker.codec_head(hidden).float()
    first = F.cross_entropy(logits, batch["target"].flatten(), ignore_index=NONE)
    return first, _predictor_losses(talker, config, hidden, batch)


def _predictor_losses(talker: Talker, config: ModelConfig, hidden: Tensor, batch: Batch) -> Tensor:
    predictor, codes = talker.code_predictor, batch["picked_codes"]
    tables = [talker.model.codec_embedding, *predictor.model.codec_embedding[:-1]]
    known = [table.weight.index_select(0, codes[:, i]) for i, table in enumerate(tables)]
    rows = torch.stack([hidden.index_select(0, batch["picked"]), *known], 1)
    positions = torch.arange(NUM_CODEBOOKS, device=rows.device)
    cos, sin = (table[None] for table in rope_tables(config.predictor, positions))
    x = predictor(rows, cos, sin, attend)[:, 1:]
    heads = torch.stack([head.weight for head in predictor.lm_head])
    logits = torch.bmm(x.transpose(0, 1), heads.to(x.dtype).transpose(1, 2)).float()
    loss = F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].T.flatten(), reduction="none")
    return loss.view(NUM_CODEBOOKS - 1, -1).mean(1)


def _layer(
    layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, dropout: float
) -> Tensor:
    """`DecoderLayer.forward` with dropout on what it adds."""
    x = x + F.dropout(layer.self_attn(layer.input_layernorm(x), cos, sin, 0, attend), dropout)
    return x + F.dropout(layer.mlp(layer.post_attention_layernorm(x)), dropout)


def prepare_layers(talker: Talker, *, compiled: bool) -> None:
    """Give every layer its dropout, in place, and fuse the operations between its products."""
    call = torch.compile(_layer, dynamic=False) if compiled else _layer
    for stack, dropout in ((talker.model, DROPOUT), (talker.code_predictor.model, DROPOUT / 2)):
        for layer in stack.layers:

            def forward(x, cos, sin, _index, attend, layer=layer, dropout=dropout):  # noqa: ANN001, ANN202
                return call(layer, x, cos, sin, attend, dropout)

            layer.forward = forward


@dataclass
class Trainer:
    """Model, optimiser and averaged weights, and one step with them."""

    talker: Talker
    config: ModelConfig
    clips: Tensor
    """[voices, clips, hidden] speaker embeddings to draw from."""
    device: torch.device

    def __post_init__(self) -> None:
        self.params = list(self.talker.parameters())
        self.average = [p.detach().clone() for p in self.params]
        self.rate = torch.tensor(0.0, device=self.device)
        self.keep = torch.tensor(0.0, device=self.device)
        on_gpu = self.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            self.params, self.rate, (0.9, 0.95), weight_decay=0.02, fused=on_gpu, capturable=on_gpu
        )
        self.weights = torch.tensor(_CODE_WEIGHTS, device=self.device)

    def step(self, batch: Batch) -> Tensor:
        """One update. Returns the losses [code 0, codes 1..15]."""
        found = self._forward(batch)
        first, others = found[0], found[1:]
        loss = first + 2 * (others * self.weights).sum() / self.weights.sum()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimiser.step()
        with torch.no_grad():
            difference = torch._foreach_sub(self.params, self.average)
            torch._foreach_mul_(difference, 1 - self.keep)
            torch._foreach_add_(self.average, difference)
        return found.detach()

    def losses(self, batch: Batch) -> Tensor:
        """The losses [code 0, codes 1..15] of the present weights."""
        # Gradients are on although nobody uses them: without them the compiled layers would be compiled
        # again.
        return self._forward(batch).detach()

    def warm_up(self) -> None:
        """Compile the layers for every shape of a batch. Nothing is learnt."""
        for rows, count in batches.SHAPES:
            batch = batches.blank_batch((rows, count))
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            self._forward(batch).sum().backward()
            self.optimiser.zero_grad(set_to_none=True)

    def _forward(self, batch: Batch) -> Tensor:
        clip = torch.randint(self.clips.shape[1], batch["voice"].shape, device=self.device)
        speakers = self.clips[batch["voice"], clip]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            first, others = losses(self.talker, self.config, batch, speakers)
        return torch.cat((first[None], others))


def train(
    trainer: Trainer,
    stream: Iterator[Batch],
    unseen: Batch,
    seconds: float,
    rates: tuple[float, float],
    out: Path,
) -> None:
    """Train for the given time. Saves and shows the losses at intervals, also of a batch that is not
    learnt."""
    steps, shown, saved = Steps(trainer.device), 0.0, monotonic()
    unseen = {name: tensor.to(trainer.device) for name, tensor in unseen.items()}
    recent = torch.zeros(NUM_CODEBOOKS, device=trainer.device)
    for step, share in clock(seconds):
        batch = next(stream)
        warm = min(1.0, (step + 1) / 300)
        peak, last = rates
        rate = last + (peak - last) * 0.5 * (1 + math.cos(math.pi * share))
        trainer.rate.fill_(warm * rate)
        trainer.keep.fill_(min(0.998, step / (step + 10)))
        found = steps.run(batch["text"].shape, trainer.step, batch)
        recent += (found - recent) * 0.02 if step > 50 else (found - recent)
        if share >= shown:
            shown += 0.04
            text = ", unseen ".join(_shown(found) for found in (recent, trainer.losses(unseen)))
            print(f"talker {share:5.1%} step {step} code 0, 1-3, 4-15: {text}", flush=True)
        if monotonic() > saved + SAVED_S:
            save(trainer, out)
            saved = monotonic()
    save(trainer, out)


def _shown(losses: Tensor) -> str:
    values = [losses[0], losses[1:4].mean(), losses[4:].mean()]
    return " ".join(f"{float(value):.3f}" for value in values)


class Sentences:
    """The utterances of a folder, as their codes come."""

    def __init__(self, folder: Path, only: int | None = None) -> None:
        self._codes, self._only = corpus.Codes(folder), only
        names = ("plain", "dropped")
        self._tokens = [corpus.read_tokens(folder / "tokens.npz", name) for name in names]

    def take(self, *, unseen: bool = False) -> list[list[Utterance]]:
        """The utterances that have come, in each reading: all but one in `UNSEEN`, or only those."""
        codes = self._codes.take()
        chosen = [i for i in sorted(codes)[: self._only] if (i % UNSEEN == 0) == unseen]
        return [
            [Utterance(tokens[i], codes[i], teacher.voice_of(i)) for i in chosen]
            for tokens in self._tokens
        ]


def read_material(
    folder: Path, only: int | None = None, least: int = LEAST
) -> tuple[Material, Material]:
    """Read what to learn from, and a hundredth that is not learnt. Waits until there is enough.

    Args:
        folder: of tokens and codes.
        only: use this many of the sentences.
        least: number of sentences to wait for, at least `LEAST`.
    """
    config = geometry.config()
    role = [config.im_start_id, *corpus.read_tokens(folder / "tokens.npz", "role")[0].tolist()]
    layout, eos = Layout(config, role), config.talker.codec_eos_id
    sentences = Sentences(folder, only)
    material = Material(layout, sentences.take(), eos, sentences.take)
    while len(material.readings[0]) < max(least, LEAST):
        sleep(1)
        material.grow()
    return material, Material(layout, Sentences(folder, only).take(unseen=True), eos)


def new_talker(config: ModelConfig) -> Talker:
    """A talker with fresh weights."""
    torch.manual_seed(0)
    talker = Talker(config.talker, config.predictor)
    for name, parameter in talker.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "codec_embedding" in name:
            nn.init.normal_(parameter, std=0.1)  # sixteen of them make a row
        elif "text_embedding" in name:
            nn.init.normal_(parameter, std=1.0)
        else:
            nn.init.normal_(parameter, std=0.7 / math.sqrt(parameter.shape[1]))
    return talker


def save(trainer: Trainer, folder: Path) -> None:
    """Write the averaged weights, in the checkpoint's bf16."""
    names = [f"talker.{name}" for name, _ in trainer.talker.named_parameters()]
    stored = [value.to("cpu", torch.bfloat16).contiguous() for value in trainer.average]
    partial = folder / "talker.partial"
    save_file(dict(zip(names, stored, strict=True)), partial)
    partial.rename(partial.with_suffix(".safetensors"))


def main() -> None:
    """Train from fresh or earlier weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=200, help="of training")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--last-rate", type=float, default=3e-5, help="learning rate at the end")
    parser.add_argument("--resume", type=Path, default=None, help="folder of weights to go on from")
    parser.add_argument("--sentences", type=int, default=None, help="use only so many")
    parser.add_argument("--least", type=int, default=LEAST, help="sentences with codes to wait for")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 2) - 2))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="default: the folder")
    args = parser.parse_args()
    device, config = torch.device(args.device), geometry.config()
    talker = new_talker(config)
    if args.resume:
        weights = load_file(args.resume / "talker.safetensors")
        talker.load_state_dict({k.removeprefix("talker."): v for k, v in weights.items()})
    clips = load_file(args.folder / "speakers.safetensors")["clips"].to(device)
    trainer = Trainer(talker.to(device), config, clips, device)
    prepare_layers(talker, compiled=device.type == "cuda")
    if device.type == "cuda":
        trainer.warm_up()
    print("talker: waiting for codes", flush=True)
    material, unseen = read_material(args.folder, args.sentences, args.least)
    stream = batches.loader(material, args.workers, seed=0)
    print(f"talker: begins with {len(material.readings[0])} sentences", flush=True)
    out: Path = args.out or args.folder
    rates = args.rate, args.last_rate
    train(trainer, stream, batches.plain_batch(unseen), args.seconds, rates, out)


if __name__ == "__main__":
    main()
