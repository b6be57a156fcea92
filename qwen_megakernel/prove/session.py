"""Processes, models and voices that the parts of a run share. Each is made at its first use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from qwen_megakernel.checkpoint import Checkpoint
from qwen_megakernel.config import GenerationParams
from qwen_megakernel.model.generation_config import read_generation_config
from qwen_megakernel.prompt.text_feed import TextTokenizer
from qwen_megakernel.prompt.tokenizer import load_tokenizer
from qwen_megakernel.prompt.voice import Voice, VoiceCloner, load_voices
from qwen_megakernel.prove import draws, reference_voices
from qwen_megakernel.prove.official import OfficialProcess, official_python
from qwen_megakernel.prove.plan import Plan
from qwen_megakernel.prove.resume import Findings
from qwen_megakernel.prove.subject import Drawn, Subject, load_cloner
from qwen_megakernel.prove.utterances import Utterance, item, paired, sentences
from qwen_megakernel.tts_model import TTSDecoder

Report = Callable[[str], None]


class Session:
    """One run; leaving its context ends its processes."""

    def __init__(self, plan: Plan, python: Path | None, report: Report) -> None:
        """`python`: an interpreter that has the official package; None makes an environment for it."""
        self.plan, self.report, self._python = plan, report, python
        self._stack = ExitStack()
        self.findings = Findings(plan.out / "parts", plan.base)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened checkpoint."""
        return Checkpoint(self.plan.folder)

    @cached_property
    def voices(self) -> Mapping[str, Voice]:
        """The voices to speak with, by name.

        With a list, they are clones of its recordings. Otherwise a CustomVoice checkpoint has its
        presets, and a VoiceDesign checkpoint its own choice. A Base checkpoint has the voices of the
        folder. Without a folder it clones recordings of the demonstration voice.
        """
        if self.plan.texts:
            cloner = self.cloner
            if cloner is None:
                raise ValueError("a list of recordings needs a checkpoint that clones")
            in_context = cloner.codec_encoder is not None
            return {
                text.name: cloner.clone(
                    text.recording.read_bytes(), text.ref_text if in_context else None
                )
                for text in self.plan.texts
            }
        config, folder = self.checkpoint.config, self.plan.voices or self.plan.folder / "voices"
        if config.talker.speaker_ids:
            return {name: Voice.preset(name) for name in config.talker.speaker_ids}
        if self.cloner is None:
            return {"designed": Voice.designed()}
        if folder.is_dir():
            return load_voices(folder, self.cloner)
        return reference_voices.cloned(self.cloner, self.report)

    @cached_property
    def cloner(self) -> VoiceCloner | None:
        """The encoders for cloning; None if the checkpoint cannot clone."""
        if self.checkpoint.config.speaker_encoder is None:
            return None
        return load_cloner(self.checkpoint, self.plan.device)

    @cached_property
    def _official(self) -> tuple[OfficialProcess, Mapping[str, Any]]:
        python = self._python or official_python(self.report)
        self.report("loading the official package")
        process = self._stack.enter_context(OfficialProcess(python, self.plan.out))
        loaded = process.ask(
            "load", model=str(self.plan.folder), device=str(self.plan.device), dtypes=["fp32", "bf16"]
        )
        return process, loaded

    @property
    def official(self) -> OfficialProcess:
        """The official package with the checkpoint in both precisions."""
        return self._official[0]

    @property
    def official_loaded(self) -> Mapping[str, Any]:
        """`versions` and `sampling` of the official process."""
        return self._official[1]

    @cached_property
    def subjects(self) -> Mapping[str, Subject]:
        """This implementation: first as a server would run it, then PyTorch in other precisions."""
        wanted = [(self.plan.backend, self.plan.dtype), ("torch", "bf16")]
        if self.plan.dtype != "fp32":
            wanted.append(("torch", "fp32"))
        found: dict[str, Subject] = {}
        for backend, dtype in wanted:
            subject = Subject(
                self.checkpoint, self.voices,
                backend=backend, device=self.plan.device, dtype=dtype, report=self.report,
            )  # fmt: skip
            kind = "kernel" if subject.runs["backend"] == "megakernel" else "PyTorch"
            found.setdefault(f"{kind} {dtype}", subject)
        return found

    @property
    def subject(self) -> Subject:
        """The subject that is judged."""
        return next(iter(self.subjects.values()))

    @cached_property
    def tts(self) -> TTSDecoder:
        """The engine, with the checkpoint's own sampling."""
        self.report("loading the engine")
        tts = TTSDecoder.load(
            self.plan.folder, backend=self.plan.backend, device=str(self.plan.device),
            sampling="checkpoint", num_slots=16,
        )  # fmt: skip
        return self._stack.enter_context(tts)

    @cached_property
    def params(self) -> GenerationParams:
        """The sampling that we read from the checkpoint."""
        return read_generation_config(self.plan.folder)

    def count_tokens(self, text: str) -> int:
        """The number of tokens of a text."""
        return len(self._tokenizer.encode(text))

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        vocab = self.checkpoint.config.talker.text_vocab_size
        return TextTokenizer(load_tokenizer(self.plan.folder, vocab))

    @cached_property
    def server_options(self) -> list[str | Path]:
        """Options for a server on the checkpoint, with the voices that can be saved as files."""
        plan = self.plan
        options: list[str | Path] = ["--model", plan.folder, "--backend", plan.backend]
        options += ["--device", str(plan.device), "--offline", "--log-format", "json"]
        folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="prove-voices-")))
        for name, voice in self.voices.items():
            if voice.speaker_embedding is not None:
                voice.save(folder / f"{name}.safetensors")
        return [*options, "--voices", folder] if any(folder.iterdir()) else options

    # -- utterances --------------------------------------------------------------------------

    def utterances(self, count: int) -> list[Utterance]:
        """The first `count` utterances of those that both sides speak."""
        plan = self.plan
        if plan.texts:
            return [
                Utterance(text.text, text.name, seed, plan.language)
                for seed, text in enumerate(itertools.islice(itertools.cycle(plan.texts), count))
            ]
        return paired(sentences(), sorted(self.voices), count, plan.language)

    def item(self, utterance: Utterance) -> dict[str, Any]:
        """An utterance in the form that the official process takes."""
        return item(utterance, self.voices)

    def varied(self, count: int) -> list[Utterance]:
        """Utterances of different texts in different voices."""
        names = sorted(self.voices)
        if self.plan.texts:
            return self.utterances(count)
        texts = sentences()
        return [
            Utterance(texts[i * 7 % len(texts)], names[i % len(names)], i, self.plan.language)
            for i in range(count)
        ]

    @cached_property
    def spoken(self) -> tuple[Sequence[Utterance], Sequence[Drawn]]:
        """Utterances as a server would draw them, with the checkpoint's sampling."""
        said = self.varied(self.plan.size.natural)
        self.report(f"speaking {len(said)} utterances")
        return said, draws.natural(self.subject, said, self.params)
