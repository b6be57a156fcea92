// How attention reads its rows of QKV and publishes the heads' output, in packets and in dense words.
#pragma once

#include "dense_words.cuh"
#include "head_row.cuh"

namespace qwen_tts {

// Poll kCount rows of QKV of a column, which begin at rows first, first + stride, ...: those of the exchange before, or
// those of the predictor's position 0 that pass 0 left.
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
    // A lane's pair, of a chunk the pair % 8; its other one is half a row further.
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

// Publish the heads' output: rows {row, row + 1} of a column, the same in four neighbouring lanes. Whole warps, each
// with sixteen rows from a multiple of sixteen on.
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

// Attention borrows tiles of partial sums. A narrow frame's products use others before and after it; a wide frame waits
// until all warps are done with them.
template <class Context>
__device__ __forceinline__ void free_tiles(const Context&) {
  if constexpr (Context::Form::kWide) sync_compute();
}

}  // namespace qwen_tts
