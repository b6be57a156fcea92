"""How the codec's layers are cut: rings of state, segments of k, tiles of a launch."""

from __future__ import annotations

from math import ceil

from qwen_megakernel.codec.cuda_packing import ROWS, padded, unit_block
from qwen_megakernel.config import CodecConfig

__all__ = [
    "UNIT_CHANNELS",
    "UNIT_TILES",
    "attention_bytes",
    "choose_tile",
    "choose_unit_shape",
    "num_tiles",
    "partial_floats",
    "ring_shapes",
    "segments_for",
]

MAX_SEGMENTS = 8
"""The largest cluster that every GPU with clusters can launch."""
ENOUGH_CTAS = 120
"""Fewer leave a GPU's memory bus idle while one stream's weights are read."""

MIN_SEGMENT_BLOCKS = 4
"""Of k in a segment: with fewer, adding up the segments takes longer than the product."""
GEMM_TILES = (8, 16, 32, 64, 128)
"""Columns of a CTA of csrc/codec_gemm.cuh."""
UNIT_CHANNELS = (96, 192)
"""Widths of residual units that csrc/codec_unit.cuh runs in one launch."""
UNIT_TILES = (16, 32, 64, 128)
"""Columns of a CTA there."""


def ring_shapes(config: CodecConfig) -> dict[str, tuple[int, int, int]]:
    """Every ring of a slot's state: name -> (frames, rows, channels).

    A ring holds whole frames, enough for the reader's history and the frame being written.
    """

    def ring(rows: int, channels: int, history: int) -> tuple[int, int, int]:
        return ceil(history / rows) + 1, rows, padded(channels)

    head_dim = 2 * padded(config.head_dim // 2)
    rings = {"codes": ring(1, config.codebook_dim, 2)}
    for i in range(config.num_layers):
        rings[f"kv.{i}"] = (config.sliding_window, 1, 2 * config.num_kv_heads * head_dim)
    rows, width = 1, config.decoder_dim
    for i, factor in enumerate(config.upsampling_ratios):
        rows *= factor
        rings[f"up.{i}"] = ring(rows, config.latent_dim, 6)
    rings["first"] = ring(rows, config.latent_dim, 6)
    for i, factor in enumerate(config.upsample_rates):
        rings[f"block.{i}"] = ring(rows, width, 1)
        rows, width = rows * factor, width // 2
        for unit, dilation in enumerate((1, 3, 9)):
            rings[f"block.{i}.{unit}"] = ring(rows, width, 6 * dilation)
    rings["last"] = ring(rows, width, 6)
    return rings


def segments_for(m: int, k_blocks: int, rows: int) -> int:
    """Into how many parts of k a layer is cut.

    A property of the layer and never of the call, since it decides the order of the sums: as
    many as a single stream needs to keep all memory channels busy.
    """
    tiles, segments = ceil(m / ROWS) * ceil(rows / 32), 1
    while (
        segments < MAX_SEGMENTS
        and tiles * segments < ENOUGH_CTAS
        and k_blocks >= 2 * segments * MIN_SEGMENT_BLOCKS
    ):
        segments *= 2
    return segments


def choose_tile(m: int, columns: int, segments: int, num_sms: int) -> int:
    """Columns of a CTA's tile: many, so that weights are read seldom, if all SMs get one.

    The results do not depend on it.
    """
    if columns <= 32:
        return next(n for n in GEMM_TILES if columns <= n)
    ctas = {n: ceil(m / ROWS) * ceil(columns / n) * segments for n in (128, 64)}
    return next((n for n in ctas if ctas[n] >= num_sms), 32)


def num_tiles(m: int, columns: int) -> int:
    """The most tiles that a product of so many columns or fewer is cut into."""
    return ceil(m / ROWS) * ceil(columns / GEMM_TILES[0])


def partial_floats(m: int, columns: int) -> int:
    """The most room that one segment's sums take, whichever tiles are chosen; csrc/codec_gemm.cuh has
    the pitch of a column."""
    widest = GEMM_TILES[-1]
    return ceil(m / ROWS) * (ROWS + 4) * ceil(columns / widest) * widest


def choose_unit_shape(
    channels: int, rows: int, streams: int, num_sms: int, sm_bytes: int
) -> tuple[int, int]:
    """(columns, pipeline stages) of a residual unit's CTA; the results do not depend on them.

    Every CTA reads all weights, at 64 bytes a clock or its share of the L2 cache's 3000, and
    multiplies at 1000 a clock: few columns read too often, many leave SMs without work. The rows
    that a tile's taps look at must fit in shared memory, with two stages of weights. Two CTAs, or
    one and the next kernel's, share an SM; only where SMs are left over may one have its own.
    """
    weights, stage = 8 * channels**2, 2 * channels * unit_block(channels)

    def clocks(tile: int) -> float:
        ctas = rows * streams // tile
        reading = 2 * weights / min(64, 3000 / min(ctas, num_sms))
        return ceil(ctas / num_sms) * (max(reading, weights * tile / 1000) + 2000)

    def stages(tile: int, ctas_an_sm: int) -> int:
        slab = (tile + 6 * 9) * (2 * channels + 16) + 128
        return min(8, (sm_bytes // ctas_an_sm - 1536 - slab) // stage)

    tiles = [tile for tile in UNIT_TILES if rows % tile == 0 and stages(tile, 1) >= 2]
    tile = min(tiles, key=clocks)
    alone = 2 * rows * streams // tile <= num_sms or stages(tile, 2) < 2
    return tile, stages(tile, 1 if alone else 2)


def attention_bytes(head_dim: int, window: int, threads: int) -> int:
    """Shared memory of a CTA of csrc/codec_attention.cuh: eight sums a thread, the query, the pieces of
    the scores, and every warp's softmax, all fp32."""
    return 4 * (8 * threads + head_dim + window * (head_dim // 16) + threads // 32 * window)
