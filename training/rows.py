"""Utterances as the talker's input rows: the prompt of `prompt.builder`, then the frames.

Every row is the sum of a text embedding and of a codec embedding or a frame's sixteen. One row also has
the speaker's. Here rows are still integers, so that embedding them has gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_megakernel.config import NUM_CODEBOOKS, ModelConfig

NONE = -1
"""No embedding from this side, or no target."""


@dataclass(frozen=True)
class Utterance:
    """An utterance before its layout is chosen."""

    text: np.ndarray
    """Token ids [t]."""
    codes: np.ndarray
    """[frames, 16]."""
    voice: int


@dataclass
class Rows:
    """One utterance laid out in r rows. All tensors are int64."""

    text: np.ndarray
    """[r] text token ids."""
    control: np.ndarray
    """[r] ids of the talker's codec vocabulary, in rows that are not frames."""
    codes: np.ndarray
    """[r, 16] the frame that is fed, in rows that are frames."""
    speaker: int
    """The row that has the speaker embedding."""
    first: int
    """The row that predicts frame 0. Row `first` + f predicts frame f, and the last row predicts EOS."""


class Layout:
    """The prompts of one model."""

    def __init__(self, config: ModelConfig, role_ids: list[int]) -> None:
        """`role_ids`: the tokens of `<|im_start|>assistant` and of the line end after it."""
        self._config, self._role = config, role_ids

    def rows(self, utterance: Utterance, *, streaming: bool, language: str) -> Rows:
        """Lay one utterance out. `language` is that of a request (`auto` or a tag's name)."""
        config, codec = self._config, self._config.talker
        if language == "auto":
            tags = [codec.codec_nothink_id, codec.codec_think_bos_id, codec.codec_think_eos_id]
        else:
            tags = [codec.codec_think_id, codec.codec_think_bos_id, codec.language_ids[language]]
            tags.append(codec.codec_think_eos_id)
        text = [*utterance.text.tolist(), config.tts_eos_id]
        control = [NONE] * len(self._role) + tags
        speaker = len(control)
        control += [NONE, codec.codec_pad_id]
        side = list(self._role)
        side += [config.tts_pad_id] * (len(control) - len(side) - 1) + [config.tts_bos_id]
        if not streaming:
            side += text
            control += [codec.codec_pad_id] * len(text)
            text = [config.tts_pad_id]
        first = len(control)
        control.append(codec.codec_bos_id)
        frames = len(utterance.codes)
        count = first + 1 + frames
        side += (text + [config.tts_pad_id] * frames)[: count - len(side)]
        codes = np.full((count, NUM_CODEBOOKS), NONE, dtype=np.int64)
        codes[first + 1 :] = utterance.codes
        control += [NONE] * frames
        return Rows(np.array(side), np.array(control), codes, speaker, first)

    def count(self, utterance: Utterance, *, streaming: bool) -> int:
        """The most rows that `rows` gives."""
        text = 0 if streaming else len(utterance.text) + 1
        return len(self._role) + 7 + text + len(utterance.codes)
