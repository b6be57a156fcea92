"""The talker and the code predictor in plain PyTorch.

This is the readable specification of one frame, the arithmetic of the torch backend, and the reference
for the kernel's tests. Names of modules and parameters are the checkpoint's (official module
`Qwen3TTSTalkerForConditionalGeneration`), so weights are loaded strictly by name. A layer hands q, k and
v to an `Attend`, which decides how keys and values are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_megakernel.config import NUM_CODEBOOKS, PredictorConfig, TalkerConfig, TransformerConfig
from qwen_megakernel.model.batch_invariant import linear_by_stream

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [n, t, heads, head_dim], k and v [n, t, kv_heads, head_dim], RoPE applied) -> shaped like
q."""


class RMSNorm(nn.Module):
    """Root mean square norm in fp32. The weight is applied in the model's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size], any dtype. The result has the same shape and dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_tables(config: TransformerConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles: fp32 [..., head_dim]. Both halves are the same."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    angle = positions[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def mrope_tables(config: TalkerConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Interleaved multimodal RoPE: each axis has one of every three frequencies.

    In speech the three axes are always equal, so this is plain rotate-half RoPE.

    Args:
        config: the talker's.
        positions: [3, t], temporal, height and width position of each row.

    Returns:
        Cosine and sine, fp32 [t, head_dim].
    """
    cos, sin = rope_tables(config, positions)  # [3, t, head_dim]
    half = config.head_dim // 2
    frequency = torch.arange(half, device=positions.device)
    axis = frequency % 3
    limit = torch.tensor(config.mrope_section, device=positions.device)[axis] * 3
    axis = torch.where((axis > 0) & (frequency < limit), axis, 0).repeat(2)[None, None]
    index = axis.expand(1, positions.shape[1], -1)
    return cos.gather(0, index)[0], sin.gather(0, index)[0]


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves. x is [n, t, heads, head_dim]. cos and sin are [n or 1, t, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return x * cos[:, :, None].to(x.dtype) + rotated * sin[:, :, None].to(x.dtype)


class Embedding(nn.Embedding):
    """torch's Embedding, made fast to create on the meta device: there torch's own imports a compiler
    for 2 s to draw values."""

    def reset_parameters(self) -> None:
        """Draw the weights, unless they are on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()


class StreamLinear(nn.Linear):
    """`linear_by_stream` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [streams, ..., in_features]. Returns [streams, ..., out_features]."""
        return linear_by_stream(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention with an RMSNorm over head_dim on q and k, before RoPE."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.head_dim = dim
        self.q_proj = StreamLinear(hidden, config.num_heads * dim, bias=False)
        self.k_proj = StreamLinear(hidden, config.num_kv_heads * dim, bias=False)
        self.v_proj = StreamLinear(hidden, config.num_kv_heads * dim, bias=False)
        self.o_proj = StreamLinear(config.num_heads * dim, hidden, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        """x: [n, t, hidden]. The result has the same shape."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = apply_rope(self.q_norm(q), cos, sin)
        k = apply_rope(self.k_norm(k), cos, sin)
        return self.o_proj(attend(layer, q, k, v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = StreamLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = StreamLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = StreamLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden]. The result has the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        """x: [n, t, hidden]. The result has the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class TalkerModel(nn.Module):
    """Embeddings, layers and final norm of the talker."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.codec_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.text_embedding = Embedding(config.text_vocab_size, config.text_hidden_size)


class TextProjection(nn.Module):
    """Text embeddings to the talker's width: linear, SiLU, linear."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.text_hidden_size, config.text_hidden_size)
        self.linear_fc2 = nn.Linear(config.text_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., text_hidden]. Returns [..., hidden]."""
        return self.linear_fc2(F.silu(self.linear_fc1(x)))


class PredictorModel(nn.Module):
    """Embeddings of codes 1..15, layers and final norm of the code predictor."""

    def __init__(self, config: PredictorConfig, talker_hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.codec_embedding = nn.ModuleList(
            Embedding(config.vocab_size, talker_hidden) for _ in range(NUM_CODEBOOKS - 1)
        )


class CodePredictor(nn.Module):
    """Codes 1..15 of a frame, given the talker's hidden row and code 0. Each code has its own head."""

    def __init__(self, config: PredictorConfig, talker_hidden: int) -> None:
        super().__init__()
        self.model = PredictorModel(config, talker_hidden)
        self.lm_head = nn.ModuleList(
            StreamLinear(config.hidden_size, config.vocab_size, bias=False)
            for _ in range(NUM_CODEBOOKS - 1)
        )
        self.small_to_mtp_projection = (
            nn.Identity()
            if config.hidden_size == talker_hidden
            else StreamLinear(talker_hidden, config.hidden_size)
        )

    def forward(self, rows: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Talker-width rows [n, t, talker_hidden] -> normed hidden states [n, t, hidden]."""
        x = self.small_to_mtp_projection(rows)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, index, attend)
        return self.model.norm(x)


class Talker(nn.Module):
    """Everything under the checkpoint's `talker.` prefix."""

    def __init__(self, config: TalkerConfig, predictor: PredictorConfig) -> None:
        super().__init__()
        self.model = TalkerModel(config)
        self.text_projection = TextProjection(config)
        self.codec_head = StreamLinear(config.hidden_size, config.vocab_size, bias=False)
        self.code_predictor = CodePredictor(predictor, config.hidden_size)
        self.text_table: Tensor | None = None
        """Set by `tabulate_text`."""

    def forward(self, rows: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Input rows [n, t, hidden] -> normed hidden states [n, t, hidden]."""
        x = rows
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, index, attend)
        return self.model.norm(x)

    def text_rows(self, token_ids: Tensor) -> Tensor:
        """Text tokens int64 [t] -> rows [t, hidden]."""
        if self.text_table is not None:
            return self.text_table[token_ids]
        return self.text_projection(self.model.text_embedding(token_ids))

    @torch.inference_mode()
    def tabulate_text(self) -> Tensor:
        """Replace the text embedding and projection by a table of all rows: [text vocabulary, hidden].

        The table is half as large as those weights. A row from it does not depend on how many rows are
        computed at a time.
        """
        if self.text_table is None:
            tokens = torch.arange(
                len(self.model.text_embedding.weight), device=self.codec_head.weight.device
            )
            parts = [self.text_rows(part) for part in tokens.split(16_384)]
            self.text_table = torch.cat(parts)
            del self.model.text_embedding, self.text_projection
        return self.text_table

    def code_rows(self, codes: Tensor) -> Tensor:
        """Frames of codes int64 [n, 16] -> the sum of each frame's embeddings [n, hidden]."""
        embedded = [self.model.codec_embedding(codes[:, 0])]
        for codebook, embedding in enumerate(self.code_predictor.model.codec_embedding, start=1):
            embedded.append(embedding(codes[:, codebook]))
        return torch.stack(embedded, dim=1).sum(1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of the last t positions over all positions.

    Args:
        q: [n, t, heads, head_dim].
        k, v: [n, kv_heads, length, head_dim] with length >= t. Query i sees the first length - t + i +
            1.

    Returns:
        [n, t, heads, head_dim].
    """
    n, t, heads, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    if t == 1:  # query heads of a group share their keys, so they can take the place of positions
        grouped = q.reshape(n, kv_heads, heads // kv_heads, dim)
        return F.scaled_dot_product_attention(grouped, k, v).reshape(n, 1, heads, dim)
    mask = torch.ones(t, length, dtype=torch.bool, device=q.device).tril(length - t)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)
