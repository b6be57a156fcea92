// How keys and values of the talker lie in their caches, and come through the weight ring.
#pragma once

#include "products.cuh"

namespace qwen_tts {

constexpr int kTilePositions = 16;  // of one warp

// How a warp's tile of positions of the talker's attention comes through the ring: its keys, then its
// values, in pieces of kRows positions.
template <class D>
struct TilePieces {
  static constexpr int kRows = kSmallShared ? 4 : kTilePositions;
  static constexpr int kRowBytes = 2 * D::kHeadDim;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kBytes % kChunkBytes == 0, "rows begin where addresses end in zeros");
};

// A row of the caches stands in 16-byte words, the word w of dims 8w to 8w + 7 at w ^ swizzle(position): so what a
// warp reads at once of several rows lies in different banks. decoding/kv_cache.py has the same for PyTorch.
__device__ __forceinline__ int swizzle(int position) {
  return (position & 1) << 2 | (position & 2) | (position >> 2 & 1);
}

}  // namespace qwen_tts
