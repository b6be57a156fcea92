"""The official implementation: the reference of the parity tests, which skip if it is missing.

transformers is pinned (requirements.txt): from 5.18 on its Mimi model has other tensor names,
and the official package no longer loads.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor  # noqa: F401
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# The 25 Hz tokenizer imports torchaudio, which has no build for every torch. The 12 Hz path never calls
# it. transformers must look for the real torchaudio before these stubs exist.
if find_spec("torchaudio") is None:
    for _name in ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"):
        sys.modules[_name] = ModuleType(_name)

pytest.importorskip("qwen_tts")
codec = import_module("qwen_tts.core.tokenizer_12hz.modeling_qwen3_tts_tokenizer_v2")
"""The module of `Qwen3TTSTokenizerV2Decoder` and its configuration class."""
model = import_module("qwen_tts.core.models.modeling_qwen3_tts")
"""The module of `Qwen3TTSForConditionalGeneration`: talker, code predictor, speaker encoder."""
inference = import_module("qwen_tts.inference.qwen3_tts_model")
"""The module of `Qwen3TTSModel`, what users of the official package call."""


def _default_rope(rope, device=None, seq_len=None, layer_type=None):
    """Unscaled RoPE for old and new configurations, see below."""
    theta = getattr(rope, "rope_theta", None) or rope.rope_parameters["rope_theta"]
    dim = getattr(rope, "head_dim", None) or rope.hidden_size // rope.num_attention_heads
    return 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim), 1.0


# The package puts an initialiser for the "default" RoPE into transformers' table. transformers then
# also finds it for its own Mimi model, whose configuration has no `rope_theta`.
_compat = import_module("qwen_tts._transformers_compat")
_compat.patch_transformers_rope_registry()
ROPE_INIT_FUNCTIONS["default"] = _default_rope
