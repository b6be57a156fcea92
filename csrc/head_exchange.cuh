// How attention reads rows of QKV and publishes the heads' output: as packets in narrow frames, as dense words in wide
// ones.
#pragma once

#include "dense_words.cuh"
#include "head_row.cuh"

namespace qwen_tts {

// Polls kCount rows of QKV of a column. They begin at rows first, first + stride, ... They come from the previous
// exchange or, with `first_position`, from pass 0, which published them for the predictor's position 0.
template <class Context, int kDim, int kCount>
__device__ __forceinline__ void wait_rows(const Context& c, HeadRow<kDim> (&rows)[kCount], int first, int stride,
                                          int column, bool first_position = false) {
  using Row = HeadRow<kDim>;
  if constexpr (!Context::Form::kWide) {
    const int64_t vector = first_position ? PacketLayout::kFirstPositionQkv : PacketLayout::kQkv;
    const uint64_t* from = row_packets<kDim>(c.p.packets + vector, first, column);
    wait_row_packets(rows, [&](int i) { return from + 4 * i * stride; }, c.tag - 1, c.dog);
  } else {
    const int vector = first_position ? DenseLayout::kFirstPositionQkv : DenseLayout::kQkv;
    const uint2 tag = dense_tag(first_position ? kOnceTag : dense_number(c, c.tag - 1));
    // A lane polls pair `pair` of the row, which is pair % 8 of its chunk, and the pair half a row further.
    const int pair = Row::owns() ? lane_index() : 0;
    const uint64_t* from = dense_vector(c.p, column / kTileColumns, vector);
    const int lane = column % kTileColumns * 4 + (pair & 3);
    auto at = [&](int i, int half) {
      return from + dense_at((first + i * stride) / kChunk + pair / 8 + half * (kDim / 2 / kChunk), lane);
    };
    uint64_t v[kCount][2];
    for (unsigned spin = 0;; ++spin) {
      uint32_t lack = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) v[i][half] = load_word(at(i, half));
      c.dog.after(spin, Phase::kAttention, c.tag - 1);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) lack |= dense_differs(v[i][half], tag);
      if (__all_sync(~0u, (lack & kTagMask) == 0)) break;
    }
    auto pair_of = [&](uint64_t word) {
      return Row::owns() ? dense_decode(pair & 4 ? high_half(word) : uint32_t(word)) : 0u;
    };
#pragma unroll
    for (int i = 0; i < kCount; ++i) rows[i].set(pair_of(v[i][0]), pair_of(v[i][1]));
  }
}

// Publishes the heads' output, rows {row, row + 1} of a column. Four neighbouring lanes pass the same rows. Whole warps
// call it together, each with sixteen rows that begin at a multiple of sixteen.
template <class Context>
__device__ __forceinline__ void publish_heads(const Context& c, int row, int column, float low, float high) {
  if constexpr (!Context::Form::kWide) {
    if (lane_index() % 4 == 0) publish_pair(c, c.p.packets + PacketLayout::kHeadsOut, row, column, low, high);
  } else {
    const float2 other = make_float2(__shfl_down_sync(~0u, low, 16), __shfl_down_sync(~0u, high, 16));
    if (lane_index() % 4 != 0) return;
    dump_pair(c, row, column, low, high);
    if (lane_index() >= 16) return;
    uint64_t* to = dense_vector(c.p, column / kTileColumns, DenseLayout::kHeadsOut) +
                   dense_at(row / kChunk, column % kTileColumns * 4 + lane_index() / 4);
    publish_word(c, to, make_float2(low, high), other, dense_number(c, c.tag));
  }
}

// Makes the tiles of partial sums free for attention. In a narrow frame, the products before and after attention use
// other tiles. In a wide frame, all warps wait until nobody reads the tiles.
template <class Context>
__device__ __forceinline__ void free_tiles(const Context&) {
  if constexpr (Context::Form::kWide) sync_compute();
}

}  // namespace qwen_tts
