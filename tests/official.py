"""The official implementation: the reference of the parity tests, which skip if it is missing.

`codec` is the module of `Qwen3TTSTokenizerV2Decoder` and its configuration class. `model` is that of
`Qwen3TTSForConditionalGeneration`: talker, code predictor, speaker encoder. `inference` is that of
`Qwen3TTSModel`, what users of the official package call. The first use imports them, which takes 8 s.

transformers is pinned (requirements.txt): from 5.18 on its Mimi model has other tensor names,
and the official package no longer loads.
"""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

MODULES = {
    "codec": "qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2",
    "model": "qwen_tts.core.models.modeling_qwen3_tts",
    "inference": "qwen_tts.inference.qwen3_tts_model",
}

if find_spec("qwen_tts") is None:
    pytest.skip("no official package", allow_module_level=True)


def __getattr__(name: str) -> ModuleType:
    if name not in MODULES:
        raise AttributeError(name)
    prepare()
    return import_module(MODULES[name])


@functools.cache
def prepare() -> None:
    """Make transformers and the official package fit each other."""
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor  # noqa: F401
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # The 25 Hz tokenizer imports torchaudio, which has no build for every torch. The 12 Hz path never
    # calls it. transformers must look for the real torchaudio before these stubs exist.
    if find_spec("torchaudio") is None:
        for name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
            sys.modules[name] = ModuleType(name)

    # The package puts an initialiser for the "default" RoPE into transformers' table. transformers then
    # also finds it for its own Mimi model, whose configuration has no `rope_theta`.
    import_module("qwen_tts._transformers_compat").patch_transformers_rope_registry()
    ROPE_INIT_FUNCTIONS["default"] = _default_rope


def _default_rope(rope, device=None, seq_len=None, layer_type=None):
    """Unscaled RoPE for old and new configurations, see above."""
    theta = getattr(rope, "rope_theta", None) or rope.rope_parameters["rope_theta"]
    dim = getattr(rope, "head_dim", None) or rope.hidden_size // rope.num_attention_heads
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim), 1.0
