"""The subject of `prove`: this implementation's parts, without the engine that usually drives them.

A subject answers the same questions as `official_worker`: prompt rows, greedy codes, teacher-forced
logits, drawn codes, samples, speaker embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.codec.decoder import CodecDecoder
from qwen_megakernel.codec.encoder import CodecEncoder
from qwen_megakernel.codec.interface import FrameCodec
from qwen_megakernel.config import GenerationParams, ModelConfig
from qwen_megakernel.decoding.interface import DecoderBackend
from qwen_megakernel.decoding.kernel_backend import FrameDumps, MegakernelBackend
from qwen_megakernel.engine.backends import Backends
from qwen_megakernel.engine.reference_states import ReferenceStates
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.builder import Prompt, PromptBuilder
from qwen_megakernel.prompt.speaker_encoder import SpeakerEncoder
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.prompt.voice import Voice, VoiceCloner
from qwen_megakernel.prove.utterances import Utterance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_POSITIONS = 2048

Report = Callable[[str], None]
Logits = tuple[np.ndarray, np.ndarray]
"""Logits of the talker [frames, vocabulary] and of the predictor [frames, 15, vocabulary], fp32."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Codes of one utterance."""

    codes: list[list[int]]
    """[frames, 16]; the last one is EOS if `stopped`."""
    stopped: bool


class Subject:
    """A checkpoint on one backend in one precision."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        voices: Mapping[str, Voice],
        *,
        backend: str,
        device: torch.device,
        dtype: str,
        report: Report,
    ) -> None:
        """Load it.

        Args:
            checkpoint: opened.
            voices: by name, for the utterances.
            backend: as `TTSDecoder.load` takes it.
            device: where it runs.
            dtype: `fp32` or `bf16`.
            report: told what is being done.

        Raises:
            CheckpointError: the checkpoint or the backend cannot be used.
        """
        config, kind = checkpoint.config, DTYPES[dtype]
        torch.backends.cudnn.allow_tf32 = False
        self.config: ModelConfig = config
        self.dtype, self.voices = dtype, voices
        backends = Backends(backend, config, device, kind, report)
        with torch.device("meta"):
            talker, codec = Talker(config.talker, config.predictor), CodecDecoder(config.codec)
        checkpoint.load("talker.", talker, dtype=kind, device=device)
        checkpoint.load("decoder.", codec, dtype=kind, device=device)
        self.device = device
        tokenizer = load_tokenizer(checkpoint.folder, config.talker.text_vocab_size)
        # The official package cleans no text.
        self.prompts = PromptBuilder(talker, config, tokenizer, clean_text=False)
        most = min(MAX_POSITIONS, config.talker.max_positions)
        self.decoder: DecoderBackend = backends.make_decoder(talker, num_slots=8, max_positions=most)
        self.codec: FrameCodec = backends.make_codec(codec, 8, self.decoder.max_batch)
        self.runs: dict[str, str] = backends.description

    # -- prompts -----------------------------------------------------------------------------

    def prompt(self, utterance: Utterance) -> Prompt:
        """The utterance's prompt, with its whole text."""
        voice = self.voices[utterance.voice]
        prompt = self.prompts.open(voice, utterance.language, streaming=utterance.streaming)
        feed = self.prompts.open_feed()
        prompt.extend(feed.append(utterance.text))
        prompt.extend(feed.flush())
        prompt.end()
        return prompt

    def rows(self, utterance: Utterance, num_text_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt rows [p, hidden], and the text rows [num_text_rows, hidden] that follow, fp32."""
        prompt = self.prompt(utterance)
        rows, trailing = prompt.rows(), []
        for _ in range(num_text_rows):
            trailing.append(_next_row(prompt))
        return rows.float().cpu().numpy(), torch.stack(trailing).float().cpu().numpy()

    # -- codes and logits --------------------------------------------------------------------

    @torch.inference_mode()
    def draw(
        self, utterances: Sequence[Utterance], params: Sequence[GenerationParams], frames: int
    ) -> list[Drawn]:
        """Codes of utterances side by side, each until EOS or `frames` frames."""
        found: list[Drawn] = []
        width = min(self.decoder.max_batch, self.decoder.num_slots)
        for begin in range(0, len(utterances), width):
            part = slice(begin, begin + width)
            found += self._draw_together(utterances[part], params[part], frames)
        return found

    def _draw_together(
        self, utterances: Sequence[Utterance], params: Sequence[GenerationParams], frames: int
    ) -> list[Drawn]:
        eos = self.config.talker.codec_eos_id
        prompts = [self.prompt(utterance) for utterance in utterances]
        for slot, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            self.decoder.prefill(slot, prompt.rows(), sampling, prompt.shared)
        codes: list[list[list[int]]] = [[] for _ in utterances]
        live = list(range(len(utterances)))
        text = {slot: torch.zeros_like(self.prompts.pad_row) for slot in live}
        for _ in range(frames):
            if not live:
                break
            made = self.decoder.launch(live, torch.stack([text[slot] for slot in live])).codes().tolist()
            for slot, frame in zip(tuple(live), made, strict=True):
                codes[slot].append(frame)
                if frame[0] == eos:
                    live.remove(slot)
                text[slot] = _next_row(prompts[slot])
        for slot in range(len(utterances)):
            self.decoder.release(slot)
        return [Drawn(frames, slot not in live) for slot, frames in enumerate(codes)]

    @torch.inference_mode()
    def forced(self, utterance: Utterance, codes: Sequence[Sequence[int]]) -> Logits:
        """Teacher-forced logits of the frames `codes` [frames, 16]."""
        prompt, forced = self.prompt(utterance), torch.tensor(codes)
        self.decoder.prefill(0, prompt.rows(), GenerationParams(), prompt.shared)
        talker, predictor = [], []
        text = torch.zeros_like(self.prompts.pad_row)
        for frame in forced:
            first, rest = self._forced_frame(text, frame)
            talker.append(first)
            predictor.append(rest)
            text = _next_row(prompt)
        self.decoder.release(0)
        return np.stack(talker), np.stack(predictor)

    def _forced_frame(self, text: Tensor, codes: Tensor) -> Logits:
        """One frame of slot 0: logits [vocabulary] and [15, vocabulary]."""
        decoder: Any = self.decoder
        if isinstance(decoder, MegakernelBackend):
            vocab = self.config.talker.vocab_size
            logits = torch.zeros(1, 16, vocab, device=self.device)
            launched = decoder.launch(
                [0], text[None], forced_codes=codes[None], dumps=FrameDumps(logits=logits)
            )
            launched.codes()
            made = logits[0].cpu().numpy()
            return made[0], made[1:, : self.config.predictor.vocab_size]
        frame = decoder.decode_frame([0], text[None], forced_codes=codes[None])
        return frame.talker_logits[0].cpu().numpy(), frame.predictor_logits[0].cpu().numpy()

    # -- sound -------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(self, codes: Sequence[Sequence[int]], voice: Voice | None = None) -> np.ndarray:
        """Samples float32 [n] of frames [frames, 16], frame by frame, after the voice's reference."""
        if voice is None:
            self.codec.reset(0)
        else:
            ReferenceStates().begin(self.codec, 0, voice)
        made = [self.codec.launch([0], frame[None]).samples()[0] for frame in torch.tensor(codes)]
        return np.concatenate(made)


def _next_row(prompt: Prompt) -> Tensor:
    row = prompt.next_text_row()
    assert row is not None  # its text is complete
    prompt.advance()
    return row


def load_cloner(checkpoint: Checkpoint, device: torch.device) -> VoiceCloner:
    """The encoders of a Base checkpoint, in fp32."""
    config = checkpoint.config
    assert config.speaker_encoder is not None
    with torch.device("meta"):
        speaker = SpeakerEncoder(config.speaker_encoder)
        codec = CodecEncoder(config.codec_encoder) if config.codec_encoder is not None else None
    checkpoint.load("speaker_encoder.", speaker, dtype=torch.float32, device=device)
    if codec is not None:
        checkpoint.load("encoder.", codec, dtype=torch.float32, device=device)
    return VoiceCloner(speaker, codec)
