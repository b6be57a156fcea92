// The layout of the talker's keys and values in their caches, and how they come through the weight ring.
#pragma once

#include "products.cuh"

namespace qwen_tts {

constexpr int kTilePositions = 16;  // of one warp

// A warp's tile of the talker's keys, or of its values. It comes through the ring as one piece.
template <class D>
struct KvTile {
  static constexpr int kRowBytes = 2 * D::kHeadDim;
  static_assert(kTilePositions * kRowBytes <= kSlotBytes, "a tile fits into a slot");
  static_assert(kRowBytes % 128 == 0, "rows begin where addresses end in zeros");
};

// How many warps have positions if an item uses `rows` positions. `rows` may be negative.
__device__ __forceinline__ int warps_with_rows(int rows) {
  return max(0, min(kWarps, (rows + kTilePositions - 1) / kTilePositions));
}

// A row of the caches has 16-byte words. The word with dims 8w to 8w + 7 is at w ^ swizzle(position), so that words of
// several rows that a warp reads at once lie in different banks. decoding/kv_cache.py has the same order for PyTorch.
__device__ __forceinline__ int swizzle(int position) {
  return (position & 1) << 2 | (position & 2) | (position >> 2 & 1);
}

}  // namespace qwen_tts
