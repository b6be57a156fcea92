"""The text tokenizer of a random checkpoint: Qwen2's files, with merges learned from the text below.

It splits text as the released tokenizer does, has the same special tokens and takes any text. Its
vocabulary is small, so a text has more tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import models, pre_tokenizers, trainers

from qwen_megakernel.prompt.tokenizer import qwen2_tokenizer

# Special tokens at their true ids. In a tiny vocabulary they begin at _TINY_FIRST_SPECIAL.
_SPECIALS = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
    "<|audio_start|>": 151669, "<|audio_end|>": 151670, "<tts_pad>": 151671,
    "<tts_text_bos>": 151672, "<tts_text_eod>": 151673, "<tts_text_bos_single>": 151674,
    "<|audio_pad|>": 151675,
}  # fmt: skip
_TINY_FIRST_SPECIAL = 1000
_ASSISTANT_ID = 77091


def special_ids(tiny: bool) -> dict[str, int]:
    """Special tokens and their ids: the true ones, or those of a tiny vocabulary."""
    if not tiny:
        return dict(_SPECIALS)
    return {token: _TINY_FIRST_SPECIAL + i for i, token in enumerate(_SPECIALS)}


_SAMPLE_TEXT = """\
Good morning, and thank you for calling. My name is Ada, and I will be your guide today.
If you would like to change an appointment, please tell me the day that suits you best.
The weather is mild this afternoon, with a light wind from the west and some rain after seven.
Your order has left the warehouse and should arrive between nine and eleven tomorrow morning.
I am sorry, I did not catch that. Could you say it again, a little more slowly?
There are three trains to the coast every hour; the next one leaves from platform four.
She opened the window, listened to the street for a moment, and then went back to her book.
We measured the time from the last word of the question to the first sound of the answer.
A voice should begin while the sentence is still being written, and it should never stutter.
The quick brown fox jumps over the lazy dog, while five boxing wizards jump quickly.
Would you rather have the window seat or the aisle? Both of them are free at the moment.
Please hold the line. I am looking for the document, and it will only take a second or two.
The library closes at eight, the museum at six, and the little café on the corner at ten.
It costs 24 dollars and 50 cents, which you can pay in cash, by card, or when it is delivered.
Turn left after the bridge, follow the river for about a mile, and you will see the house.
He had promised to write every week, and to everyone's surprise he really did so for years.
What's the matter? I can't hear you. We'll try again, and then they've got to let us know.
This is a test of the speech model. Hello world! How are you? I'm fine, thanks for asking.
One, two, three, four, five, six, seven, eight, nine, ten. Ready? Then let us start again.
Der Zug nach Hamburg fährt heute von Gleis sieben ab, und zwar erst gegen halb neun.
Le petit marché sur la place ouvre à huit heures, même quand il pleut toute la matinée.
El tren de la tarde sale a las cinco y media, pero mañana habrá otro un poco más tarde.
Il treno per la costa parte fra dieci minuti dal binario quattro, vicino all'uscita.
O mercado abre às oito da manhã e fecha às seis, mas hoje vai ficar aberto até mais tarde.
Поезд отправляется в семь часов утра, и билеты лучше купить заранее.
今天天气很好，我们下午去公园走一走，然后一起吃晚饭。
今日はとても良い天気なので、午後から公園を散歩しましょう。
오늘은 날씨가 아주 좋아서 오후에 공원을 산책하려고 합니다.
"""
# Role words and line end of the chat template must each be a single token, whatever the text is.
_ROLE_LINES = "assistant\nuser\nsystem\n" * 40


def _train_bpe(text: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn a vocabulary (token -> rank) and merges from a text."""
    tokenizer = qwen2_tokenizer(models.BPE())  # merges need the split that they are used with
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*text, _ROLE_LINES], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    return learned["vocab"], [tuple(pair) for pair in learned["merges"]]


def write_tokenizer(folder: Path, tiny: bool, text: Iterable[str] = (_SAMPLE_TEXT,)) -> None:
    """Write `vocab.json`, `merges.txt` and `tokenizer_config.json` of a Qwen2 tokenizer.

    Args:
        folder: where the files go.
        tiny: number special tokens from 1000 on, not with their true ids.
        text: the merges are learned from it.
    """
    vocab, merges = _train_bpe(text, _TINY_FIRST_SPECIAL)
    if not tiny:
        vocab["assistant"] = _ASSISTANT_ID
    specials = special_ids(tiny)
    # Without these entries the special tokens would get the ids after the last rank, whatever ids the
    # configuration asks for. (A full vocabulary ends right before them.)
    vocab.update(specials)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = {
        str(token_id): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for token, token_id in specials.items()
    }  # fmt: skip
    config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": [t for t in specials if t != "<|endoftext|>"],
        "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>",
        "errors": "replace", "model_max_length": 131072, "pad_token": "<|endoftext|>",
        "processor_class": "Qwen3TTSProcessor", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
