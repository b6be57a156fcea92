"""A talker with the random weights of `synth-checkpoint`'s distributions, made on the device."""

from __future__ import annotations

import torch

from qwen_megakernel.config import ModelConfig
from qwen_megakernel.model import Talker
from qwen_megakernel.synth_checkpoint import tensor_specs
from qwen_megakernel.synth_config import Shape, json_files


def shape_config(shape: Shape) -> ModelConfig:
    """The configuration that `synth-checkpoint` writes for a shape."""
    files = json_files(shape, "base")
    return ModelConfig.from_dicts(files["config.json"], files["speech_tokenizer/config.json"])


def random_talker(config: ModelConfig, device: str, *, seed: int = 0) -> Talker:
    """bf16 weights; the text embedding, which a frame does not use, stays on the meta device."""
    with torch.device("meta"):
        talker = Talker(config.talker, config.predictor)
    specs, _ = tensor_specs(config)
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name in talker.state_dict():
        if "text_" in name:
            continue
        spec = specs[f"talker.{name}"]
        make = torch.rand if spec.uniform else torch.randn
        draw = make(spec.shape, generator=generator, device=device)
        weights[name] = (draw * spec.scale + spec.offset).to(torch.bfloat16)
    talker.load_state_dict(weights, strict=False, assign=True)
    return talker
