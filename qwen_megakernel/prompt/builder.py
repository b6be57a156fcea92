"""Text and voice to rows: the prompt that is prefilled, then one text row for each frame.

Layouts are those of the official `Qwen3TTSForConditionalGeneration.generate`. Every row is a text
embedding plus a codec embedding. There are C codec rows: the bos and, in ICL mode, the reference's
frames. The text rows T begin with the reference's text in ICL mode, and end with EOS:

    streaming       prefix, T[:C] + codec rows        then one of T[C:] a frame, then padding
    non-streaming   prefix, T + pad, pad + codec rows  then padding

A turn's text may still grow. `Prompt` says when there is enough text to start. It returns None while the
next text row has not come. It never pads in place of late text.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qwen_megakernel.config import ModelConfig
from qwen_megakernel.model.talker import Talker
from qwen_megakernel.prompt.shared_rows import SharedRows
from qwen_megakernel.prompt.text_cleaning import TextCleaner
from qwen_megakernel.prompt.text_feed import TextFeed, TextTokenizer
from qwen_megakernel.prompt.voice import Voice
from qwen_megakernel.turn import RequestError

_MAX_CACHED_PREFIXES = 64
_OF_THE_TALKER = (
    "_talker", "_text_table", "_bos_row", "eos_row", "pad_row", "codec_pad_row", "_role_rows",
)  # fmt: skip
"""Attributes of a `PromptBuilder` that hold the device's memory."""
_ROWS_AHEAD = 64
"""Text rows that are made together. Each frame uses one."""


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The part of a prompt that depends on voice and language alone."""

    voice: Voice
    key: int
    """Different for each prefix."""
    rows: Tensor
    """[p, hidden]: template, language and speaker tags."""
    codec_rows: Tensor
    """[C, hidden]: bos, then the reference's frames in ICL mode."""
    ref_text_rows: Tensor
    """[r, hidden]: the reference's text in ICL mode, otherwise no rows."""


class Prompt:
    """The rows of one turn. They grow with its text."""

    def __init__(self, builder: PromptBuilder, prefix: _Prefix, *, streaming: bool) -> None:
        self._builder, self._prefix, self.streaming = builder, prefix, streaming
        self._token_ids: list[int] = []
        self._text_rows = list(prefix.ref_text_rows)
        """The text rows made so far. The rows of a long text are made when they are needed."""
        self._num_ref_rows = len(self._text_rows)
        # Kept as numbers, because the length of a tensor takes a microsecond and long queues ask for it.
        self._num_codec_rows, num_shared = len(prefix.codec_rows), len(prefix.rows)
        self._num_fixed_rows = num_shared + self._num_codec_rows
        if streaming:  # the reference's text without its last row, which is decoded
            num_shared += min(self._num_ref_rows, self._num_codec_rows - 1)
        self.shared = SharedRows(prefix.key, num_shared)
        """The first of `rows` that are the same for every text with this voice and language."""
        self._next = 0
        self._ended = False

    def extend(self, token_ids: list[int]) -> None:
        """Add tokens to the turn's text (see `TextFeed`)."""
        self._token_ids += token_ids

    def end(self) -> None:
        """End the text. EOS follows it."""
        self._ended = True

    @property
    def num_text_tokens(self) -> int:
        """Tokens of the turn's own text so far."""
        return len(self._token_ids)

    @property
    def _num_text_rows(self) -> int:
        """Text rows that can be made so far: the reference's text, the text, EOS."""
        return self._num_ref_rows + len(self._token_ids) + self._ended

    def _make_rows(self, count: int) -> list[Tensor]:
        """The first `count` text rows, at most `_num_text_rows`."""
        while len(self._text_rows) < count:
            made, needed = len(self._text_rows) - self._num_ref_rows, count - self._num_ref_rows
            ids = self._token_ids[made : max(needed, made + _ROWS_AHEAD)]
            self._text_rows += self._builder.each_text_row(ids) if ids else [self._builder.eos_row]
        return self._text_rows[:count]

    def sibling(self) -> Prompt:
        """An empty prompt of the same voice, language, instruction and layout."""
        return Prompt(self._builder, self._prefix, streaming=self.streaming)

    @property
    def ended(self) -> bool:
        """Whether the text is complete."""
        return self._ended

    @property
    def empty(self) -> bool:
        """Whether the text is complete and has nothing to say."""
        return self._ended and not self._token_ids

    @property
    def ready(self) -> bool:
        """Whether there is enough text for `rows`."""
        if not self.streaming:
            return self._ended
        return self._ended or self._num_text_rows >= self._num_codec_rows

    @property
    def num_rows(self) -> int:
        """How many `rows` there are for the text so far."""
        return self._num_fixed_rows if self.streaming else self._num_fixed_rows + self._num_text_rows

    def rows(self) -> Tensor:
        """Prompt rows [p, hidden] to prefill. Call it once, when `ready`."""
        prefix, codec, builder = self._prefix, self._prefix.codec_rows, self._builder
        if not self.streaming:
            text = torch.stack(self._make_rows(self._num_text_rows)) + builder.codec_pad_row
            self._next = len(text)
            return torch.cat([prefix.rows, text, builder.pad_row + codec])
        text = self._make_rows(min(len(codec), self._num_text_rows))
        self._next = len(text)
        text = text + [builder.pad_row] * (len(codec) - len(text))
        return torch.cat([prefix.rows, torch.stack(text) + codec])

    @property
    def late(self) -> bool:
        """Whether the next frame's text row cannot be made yet."""
        return not self._ended and self._next >= self._num_text_rows

    def next_text_row(self) -> Tensor | None:
        """The text row [hidden] of the next frame, or None if the text is late.

        A caller may ask again. `advance` goes on to the next row.
        """
        if self._next < self._num_text_rows:
            if self._next >= len(self._text_rows):
                self._make_rows(self._next + 1)
            return self._text_rows[self._next]
        return self._builder.pad_row if self._ended else None

    def advance(self) -> None:
        """Mark the row of `next_text_row` as used."""
        self._next += 1

    @property
    def text_exhausted(self) -> bool:
        """Whether all text rows, with EOS, have been used."""
        return self._ended and self._next >= self._num_text_rows


class PromptBuilder:
    """Makes prompts. Holds what all of them share, which is computed once."""

    def __init__(
        self, talker: Talker, config: ModelConfig, tokenizer: Tokenizer, *, clean_text: bool = True
    ) -> None:
        """`clean_text`: whether feeds drop what cannot be spoken (see docs/text.md)."""
        self._config, self._clean_text = config, clean_text
        self.tokenizer = TextTokenizer(tokenizer)
        self._newline = self.tokenizer.encode("\n")
        self._keys = itertools.count()
        self._prefixes: OrderedDict[tuple[int, str], _Prefix] = OrderedDict()
        self.load(talker)

    def load(self, talker: Talker) -> None:
        """Make rows with this talker from now on."""
        config, self._talker = self._config, talker
        weight = talker.codec_head.weight
        self._device, self._dtype = weight.device, weight.dtype
        # On a CPU the table takes longer to make than a thousand turns take to speak.
        self._text_table = talker.tabulate_text() if self._device.type == "cuda" else None
        special = self.text_rows([config.tts_bos_id, config.tts_eos_id, config.tts_pad_id])
        self._bos_row, self.eos_row, self.pad_row = special
        self.codec_pad_row = self._codec_rows([config.talker.codec_pad_id])[0]
        self._role_rows = self.text_rows([config.im_start_id, *self.tokenizer.encode("assistant\n")])
        self._num_role_rows = len(self._role_rows)

    def unload(self) -> None:
        """Forget the talker and all rows. What touches tensors needs `load` first."""
        self._prefixes.clear()
        for name in _OF_THE_TALKER:
            self.__dict__.pop(name, None)

    def open_feed(self) -> TextFeed:
        """A feed that turns one turn's text into the tokens of its `Prompt`. It uses no tensors."""
        return TextFeed(self.tokenizer, TextCleaner() if self._clean_text else None)

    @torch.inference_mode()
    def text_rows(self, token_ids: list[int]) -> Tensor:
        """Rows [t, hidden] of text tokens."""
        return self._talker.text_rows(self._on_device(token_ids))

    @torch.inference_mode()
    def each_text_row(self, token_ids: list[int]) -> Sequence[Tensor]:
        """The rows [hidden] of text tokens, one by one. If there is a table, they are views of it."""
        if self._text_table is None:
            return self.text_rows(token_ids).unbind()
        return [self._text_table[token] for token in token_ids]

    @torch.inference_mode()
    def _codec_rows(self, codec_ids: list[int]) -> Tensor:
        return self._talker.model.codec_embedding(self._on_device(codec_ids))

    def _on_device(self, ids: list[int]) -> Tensor:
        ids_on_host = torch.tensor(ids, dtype=torch.int64)
        if self._device.type != "cuda":
            return ids_on_host.to(self._device)
        # If this memory were not pinned, the copy would wait for the running frame.
        return ids_on_host.pin_memory().to(self._device, non_blocking=True)

    def check(self, voice: Voice, language: str = "auto", *, instruct: str | None = None) -> None:
        """Check the arguments of `open`. Uses no tensors, so any thread may call it.

        Raises:
            RequestError: the language or preset is unknown, or the checkpoint does not take such a voice
                or an instruction.
        """
        self._check_voice(voice)
        allowed = self._config.talker.languages
        if language.lower() not in allowed:
            raise RequestError(
                "unknown_language", f"language {language[:40]!r}, allowed: {', '.join(allowed)}"
            )
        config = self._config
        no_instruct = config.mode == "base" or (config.mode == "custom_voice" and config.size == "0b6")
        if instruct and instruct.strip() and no_instruct:
            raise RequestError(
                "unsupported", "instruct needs a VoiceDesign or a 1.7B CustomVoice checkpoint"
            )

    def count_fixed_rows(
        self, voice: Voice, language: str, *, instruct: str | None, streaming: bool
    ) -> int:
        """Count the prompt rows that do not come from the turn's own text. Uses no tensors, as
        `check`."""
        tags = self._language_tags(voice, language.lower())
        count = self._num_role_rows + len(tags) + (voice.mode != "designed") + 1
        count += 1 if voice.ref_codes is None else 1 + len(voice.ref_codes)
        if instruct and instruct.strip():
            count += len(self._instruct_ids(instruct.strip()))
        if not streaming:
            count += 1
            if voice.ref_text is not None:  # icl
                count += len(self.tokenizer.encode(voice.ref_text.strip()))
        return count

    def streams(self, streaming: bool | None) -> bool:
        """Whether the text layout is streaming. None means the checkpoint's own layout."""
        return self._config.mode == "base" if streaming is None else streaming

    @torch.inference_mode()
    def open(
        self,
        voice: Voice,
        language: str = "auto",
        *,
        instruct: str | None = None,
        streaming: bool | None = None,
    ) -> Prompt:
        """An empty prompt, for text to come.

        Args:
            voice: of the kind that the checkpoint takes.
            language: one of `TalkerConfig.languages`, in upper or lower case.
            instruct: a description of how to speak (VoiceDesign, 1.7B CustomVoice).
            streaming: the text layout. The default is the official package's: streaming for Base.

        Raises:
            RequestError: see `check`.
        """
        self.check(voice, language, instruct=instruct)
        prefix = self._prefix(voice, language.lower())
        if instruct and instruct.strip():
            prefix = self._with_instruct(prefix, instruct.strip())
        return Prompt(self, prefix, streaming=self.streams(streaming))

    def _prefix(self, voice: Voice, language: str) -> _Prefix:
        key = (id(voice), language)
        if key not in self._prefixes:
            self._prefixes[key] = self._build_prefix(voice, language)
            if len(self._prefixes) > _MAX_CACHED_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def _build_prefix(self, voice: Voice, language: str) -> _Prefix:
        codec = self._config.talker
        tags = [self._codec_rows(self._language_tags(voice, language))]
        speaker = self._speaker_row(voice)
        if speaker is not None:
            tags.append(speaker)
        tags.append(self.codec_pad_row[None])
        codec_side = torch.cat(tags)
        text_side = torch.cat([self.pad_row.expand(len(codec_side) - 1, -1), self._bos_row[None]])
        codec_rows, ref_text_rows = (
            self._codec_rows([codec.codec_bos_id]),
            self.pad_row[:0].reshape(0, 0),
        )
        if voice.ref_codes is not None and voice.ref_text is not None:  # icl
            ref_codes = voice.ref_codes.to(self._device)
            codec_rows = torch.cat([codec_rows, self._talker.code_rows(ref_codes)])
            ref_text_rows = self.text_rows(self.tokenizer.encode(voice.ref_text.strip()))
        rows = torch.cat([self._role_rows, text_side + codec_side])
        return _Prefix(voice, next(self._keys), rows, codec_rows, ref_text_rows)

    def _check_voice(self, voice: Voice) -> None:
        config = self._config
        allowed = {
            "base": ("x_vector", "icl", "designed"),
            "custom_voice": ("preset",),
            "voice_design": ("designed",),
        }[config.mode]
        if voice.mode not in allowed:
            raise RequestError(
                "unsupported",
                f"a {config.mode} checkpoint cannot take a voice of kind {voice.mode}, "
                f"only {' or '.join(allowed)}",
            )
        if voice.speaker is not None and voice.speaker.lower() not in config.talker.speaker_ids:
            known = ", ".join(sorted(config.talker.speaker_ids))
            raise RequestError("unknown_voice", f"preset {voice.speaker!r}, allowed: {known}")
        if voice.speaker_embedding is not None:
            width, hidden = voice.speaker_embedding.shape[0], config.talker.hidden_size
            if width != hidden:
                raise RequestError(
                    "unsupported", f"the voice is for a model of width {width}, this one has {hidden}"
                )

    def _language_tags(self, voice: Voice, language: str) -> list[int]:
        """Codec ids [think, think_bos, language, think_eos], or the untagged form for auto."""
        codec = self._config.talker
        name = language
        if voice.speaker is not None and language in ("auto", "chinese"):
            name = codec.speaker_dialects.get(voice.speaker.lower(), language)
        if name == "auto":
            return [codec.codec_nothink_id, codec.codec_think_bos_id, codec.codec_think_eos_id]
        tag = codec.language_ids[name]
        return [codec.codec_think_id, codec.codec_think_bos_id, tag, codec.codec_think_eos_id]

    def _speaker_row(self, voice: Voice) -> Tensor | None:
        """[1, hidden] of the voice's speaker, or None if it has none."""
        if voice.speaker is not None:
            return self._codec_rows([self._config.talker.speaker_ids[voice.speaker.lower()]])
        if voice.speaker_embedding is None:
            return None
        return voice.speaker_embedding.to(self._device, self._dtype)[None]

    def _with_instruct(self, prefix: _Prefix, instruct: str) -> _Prefix:
        config = self._config
        if config.mode == "base" or (config.mode == "custom_voice" and config.size == "0b6"):
            raise RequestError(
                "unsupported", "instruct needs a VoiceDesign or 1.7B CustomVoice checkpoint"
            )
        rows = torch.cat([self.text_rows(self._instruct_ids(instruct)), prefix.rows])
        return _Prefix(prefix.voice, next(self._keys), rows, prefix.codec_rows, prefix.ref_text_rows)

    def _instruct_ids(self, instruct: str) -> list[int]:
        config, ids = self._config, self.tokenizer.encode(f"user\n{instruct}")
        return [config.im_start_id, *ids, config.im_end_id, *self._newline]
