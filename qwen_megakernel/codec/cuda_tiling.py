"""How the codec's layers are divided: rings of state, segments of k, tiles of a launch."""

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
"""The size of the largest cluster that every GPU with clusters can launch."""
ENOUGH_CTAS = 120
"""With fewer CTAs, a GPU's memory bus is partly idle while the weights are read for one stream."""

MIN_SEGMENT_BLOCKS = 4
"""Least blocks of k in a segment. With fewer, adding the segments takes longer than the product."""
GEMM_TILES = (8, 16, 32, 64, 128)
"""Allowed columns of a CTA of csrc/codec_gemm.cuh."""
UNIT_CHANNELS = (96, 192)
"""Widths of residual units that csrc/codec_unit.cuh runs in one launch."""
UNIT_TILES = (16, 32, 64, 128)
"""Allowed columns of a CTA of csrc/codec_unit.cuh."""
_MEASURED_SMS, _MEASURED_SM_BYTES = 132, 228 * 1024
_MEASURED_UNITS = {(192, 640, 32): (32, 3), (96, 1920, 1): (16, 8), (96, 1920, 8): (64, 4)}
"""Shapes of residual units that are faster on an H200 than the estimate of `choose_unit_shape`, by
channels, rows and streams."""


def ring_shapes(config: CodecConfig) -> dict[str, tuple[int, int, int]]:
    """The rings of a slot's state: name -> (frames, rows, channels).

    A ring holds whole frames: as many as its reader's history needs, and the frame that is being
    written.
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

    The number depends on the layer alone and never on the call, because it decides the order of the
    sums. It is what a single stream needs to keep all memory channels busy.
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
    """Columns of a CTA's tile. The results do not depend on the choice.

    One tile holds up to 32 columns. For more columns it is the widest tile with which every SM gets one,
    or 32. Wide tiles read the weights less often. If these tiles leave a quarter of the SMs without
    work, they are cut until every SM has one, at most to 8 columns.
    """

    def ctas(tile: int) -> int:
        return ceil(m / ROWS) * ceil(columns / tile) * segments

    if columns <= 32:
        tile = next(n for n in GEMM_TILES if columns <= n)
    else:
        tile = next((n for n in (128, 64) if n < 2 * columns and ctas(n) >= num_sms), 32)
    if 4 * ctas(tile) >= 3 * num_sms:
        return tile
    return next((n for n in (16, 8) if n < tile and ctas(n) >= num_sms), 8)


def num_tiles(m: int, columns: int) -> int:
    """The most tiles into which a product of up to `columns` columns is cut."""
    return ceil(m / ROWS) * ceil(columns / GEMM_TILES[0])


def partial_floats(m: int, columns: int) -> int:
    """The most floats that the sums of one segment take, for any tile. csrc/codec_gemm.cuh has the pitch
    of a column."""
    widest = GEMM_TILES[-1]
    return ceil(m / ROWS) * (ROWS + 4) * ceil(columns / widest) * widest


def choose_unit_shape(
    channels: int, rows: int, streams: int, num_sms: int, sm_bytes: int
) -> tuple[int, int]:
    """(columns, pipeline stages) of a residual unit's CTA. The results do not depend on them.

    Every CTA reads all weights, at 64 bytes a clock or at its share of the 3000 of the L2 cache. It
    multiplies at 1000 a clock. With few columns the weights are read too often. With many, some SMs have
    no work. The rows that a tile's taps read must fit into shared memory beside two stages of weights.
    Two CTAs, or one and that of the next kernel, share an SM. A CTA may have an SM alone only if there
    are SMs to spare. On an H100 or H200, measured shapes come first.
    """
    measured = _MEASURED_UNITS.get((channels, rows, streams))
    if measured and num_sms == _MEASURED_SMS and sm_bytes >= _MEASURED_SM_BYTES:
        return measured
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
