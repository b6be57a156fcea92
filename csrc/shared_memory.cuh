// What a CTA keeps in shared memory. The weight ring takes the rest.
#pragma once

#include "kv_tile.cuh"
#include "ring.cuh"

namespace qwen_tts {

constexpr int kTileFloats = kStripRows * kTileColumns;  // of one warp's result

// The tiles of partial sums that a product uses. A product computes that many items before one barrier. After a
// barrier, slow warps may still read the tiles of the previous product, so consecutive products use different tiles:
//   QKV 0 1    attention 0 1 2 and 3 (talker), 2 (predictor)    O 3    gate-up 0 1 2    down 3    head 0 1
//   projection 3    draws 3
// O and down need one tile, because on 128 or more SMs they have one item a CTA.
template <int kFirst_, int kCount_>
struct TileRange {
  static constexpr int kFirst = kFirst_, kCount = kCount_;
};
using FirstTiles = TileRange<0, 2>;
using WideTiles = TileRange<0, 3>;
using LastTile = TileRange<3, 1>;
constexpr int kPredictorAttentionTile = 2;

// What a CTA knows about one of its items of the talker's attention (AttentionItem). It is the same in all layers.
struct alignas(16) ItemRows {
  uint32_t bits;
  int page;       // in the cache, counted over all heads: kv_head * num_pages + page
  int end;        // the position after the item's last
  int first_new;  // the first position whose row comes from the exchange
};

// Of a CTA, where all streams are as long as can be on 64 CTAs; and an end. Fewer CTAs hold shorter streams
// (max_positions in decoding/frame_launcher.py).
__device__ constexpr int max_items(int columns) { return columns * T::kKvHeads * kMaxSplits / 64 + 1; }

template <int kColumns_, int kTiles_>
struct alignas(16) ScratchOf {  // read as float4
  static constexpr int kColumns = kColumns_, kTiles = kTiles_, kMaxItems = max_items(kColumns);
  float partial[kTiles][kWarps][kTileFloats];
  float sum_of_squares[2][kWarps][kColumns];
  uint16_t codes[kWarps][kColumns];  // the streams' last codes; each warp has a copy
  ItemRows items[kMaxItems];         // this CTA's items of the talker's attention
};

// The sampler's memory, in the tile that neither the head nor QKV uses.
struct SamplerShared {
  uint32_t key[kWarps], score[kWarps];
  int index[kWarps];
  int count[kWarps];
  float mass[kWarps];
};

// A longer ring is slower on an H200: a frame takes 1159 us with 22 slots and 1286 us with 42 (docs/experiments.md).
#ifndef QWEN_TTS_RING_SLOTS  // geometry.h defines it if `tune` found a better number for this GPU
#define QWEN_TTS_RING_SLOTS 22
#endif
// The size of a CTA's copy of the parameters, which has the streams of `columns` columns.
__device__ constexpr int param_bytes(int columns) {
  return int(offsetof(FrameParams, streams) + columns * sizeof(Stream));
}
__device__ constexpr int most_ring_slots(int columns, int scratch_bytes) {
  return ring_slots(kSharedBytes - scratch_bytes - param_bytes(columns));
}

// The two kernels. A narrow frame has up to kTileColumns streams, in one tile of columns. Its exchanges are packets,
// and every CTA keeps the residual. A wide frame has up to four tiles. Its exchanges are dense words (dense_words.cuh),
// and each strip of the residual stays with the CTA that computes it (wide_layer.cuh). Both draw the same codes, bit
// for bit.
template <bool kWide_, int kColumns, int kTiles>
struct Form {
  static constexpr bool kWide = kWide_;
  using Scratch = ScratchOf<kColumns, kTiles>;
  static constexpr int kMostSlots = most_ring_slots(kColumns, sizeof(Scratch));
  static constexpr int kSlots = min_of(QWEN_TTS_RING_SLOTS, kMostSlots);
  using Ring = RingShared<kSlots>;
  static_assert(kSlots >= kWarps / 2, "the ring must hold an item of most products");
};

// This CTA's first strip of O and of down in a wide frame. Its other strips follow, each gridDim.x further.
__device__ __forceinline__ int out_owner_first() { return block_index(); }
template <class D>
__device__ __forceinline__ int down_owner_first() {
  const int grid = gridDim.x;
  return (block_index() + grid - D::kHidden / kStripRows % grid) % grid;
}

using NarrowForm = Form<false, kTileColumns, 4>;
// A wide frame needs one tile of partial sums for each tile of columns, and twice as many if shared memory has room.
using WideForm = Form<true, kMaxColumns, kMaxColumns / kTileColumns*(kSharedBytes >= 160 * 1024 ? 2 : 1)>;

}  // namespace qwen_tts
