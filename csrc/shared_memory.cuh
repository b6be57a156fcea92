// What a CTA keeps in shared memory. What is left of it is the weight ring.
#pragma once

#include "kv_tile.cuh"
#include "ring.cuh"

namespace qwen_tts {

constexpr int kTileFloats = kStripRows * kTileColumns;  // of one warp's result

// Tiles of partial sums that a product uses. It brings as many items to one barrier. Between a barrier and the next,
// slow warps still read what the product before it left, so products that follow each other use different tiles:
//   QKV 0 1    attention 0 1 2 and 3 (talker), 2 (predictor)    O 3    gate-up 0 1 2    down 3    head 0 1
//   projection 3    draws 3
// One item a CTA is what O and down have on 128 SMs and more.
template <int kFirst_, int kCount_>
struct TileRange {
  static constexpr int kFirst = kFirst_, kCount = kCount_;
};
using FirstTiles = TileRange<0, 2>;
using WideTiles = TileRange<0, 3>;
using LastTile = TileRange<3, 1>;
constexpr int kPredictorAttentionTile = 2;

// What a CTA must know of one of its items of the talker's attention (AttentionItem), the same in all layers.
struct alignas(16) ItemRows {
  uint32_t bits;
  int page;       // of the cache, among those of all heads: kv_head * num_pages + page
  int end;        // the position after its last
  int first_new;  // from here on, rows come from the exchange
};

// Of a CTA, where all streams are as long as can be on 64 CTAs; and an end. Fewer CTAs hold shorter streams
// (max_positions in decoding/frame_launcher.py).
__device__ constexpr int max_items(int columns) { return columns * T::kKvHeads * kMaxSplits / 64 + 1; }

template <int kColumns_, int kTiles_>
struct alignas(16) ScratchOf {  // of float4s
  static constexpr int kColumns = kColumns_, kTiles = kTiles_, kMaxItems = max_items(kColumns);
  float partial[kTiles][kWarps][kTileFloats];
  float sum_of_squares[2][kWarps][kColumns];
  uint16_t codes[kWarps][kColumns];  // the last ones of the streams; each warp's own copy
  ItemRows items[kMaxItems];         // this CTA's of the talker's attention
};

// In the tile that no product of the head or of QKV uses.
struct SamplerShared {
  uint32_t key[kWarps], score[kWarps];
  int index[kWarps];
  int count[kWarps];
  float mass[kWarps];
};

// A longer ring is slower on an H200: 1159, 1286 us a frame with 22 and 42 slots (docs/experiments.md).
#ifndef QWEN_TTS_RING_SLOTS  // geometry.h may have another number, which `tune` found better on its GPU
#define QWEN_TTS_RING_SLOTS 22
#endif
__device__ constexpr int most_ring_slots(int scratch_bytes) {
  return ring_slots(kSharedBytes - scratch_bytes - int(sizeof(FrameParams)));
}

// The two kernels. A frame of up to kTileColumns streams has one tile of columns; its exchanges are packets, and every
// CTA keeps the residual. A wide frame has up to four tiles; its exchanges are dense words (dense_words.cuh), and a
// strip of the residual is kept by the CTA that makes it (wide_layer.cuh). Both draw the same codes, bit for bit.
template <bool kWide_, int kColumns, int kTiles>
struct Form {
  static constexpr bool kWide = kWide_;
  using Scratch = ScratchOf<kColumns, kTiles>;
  static constexpr int kMostSlots = most_ring_slots(sizeof(Scratch));
  static constexpr int kSlots = min_of(QWEN_TTS_RING_SLOTS, kMostSlots);
  using Ring = RingShared<kSlots>;
  static_assert(kSlots >= kWarps / 2, "the ring must hold an item of most products");
};

// In a wide frame: this CTA's first strip of O and of down, whose other strips follow a grid apart.
__device__ __forceinline__ int out_owner_first() { return block_index(); }
template <class D>
__device__ __forceinline__ int down_owner_first() {
  const int grid = gridDim.x;
  return (block_index() + grid - D::kHidden / kStripRows % grid) % grid;
}

using NarrowForm = Form<false, kTileColumns, 4>;
// An item's partial sums of all tiles of columns; twice where there is room.
using WideForm = Form<true, kMaxColumns, kMaxColumns / kTileColumns*(kSharedBytes >= 160 * 1024 ? 2 : 1)>;

}  // namespace qwen_tts
