// The matrix products of a frame, and how each is cut into 16-row strips, items and pieces. decoding/weight_packing.py
// lays weights out in this order.
#pragma once

#include "architecture.h"
#include "frame_schedule.cuh"

namespace qwen_tts {

// The tile of one mma: kStripRows x kChunk of weights, kChunk x kTileColumns of the operand.
constexpr int kStripRows = 16, kChunk = 16;
constexpr int kChunkBytes = 2 * kStripRows * kChunk;

// A piece of weights is one copy and takes one slot of the ring (ring.cuh). Its number of chunks divides a warp's
// chunks evenly. A piece that holds all chunks of a warp also holds those of neighbouring warps, as far as they fit.
constexpr int kSlotBytes = 4096;
constexpr int kSlotChunks = kSlotBytes / kChunkBytes;
constexpr int kMaxOwners = 8;  // warps that a piece is for

// If a warp's chunks do not fit one piece, a piece has at most six. More would spill registers at the 1.7B shape.
constexpr int kMaxPartChunks = 6;

__device__ constexpr int piece_chunks(int chunks) {
  if (chunks <= kSlotChunks) return chunks;
  for (int n = kMaxPartChunks; n > 1; --n)
    if (chunks % n == 0) return n;
  return 1;
}
__device__ constexpr int piece_owners(int chunks) {
  int owners = 1;
  while (2 * owners * chunks <= kSlotChunks && 2 * owners <= kMaxOwners) owners *= 2;
  return owners;
}

// A product W x. The rows of W form strips of 16, and k is cut into kSplit parts. An item is one part of one strip.
template <int kRows_, int kK_, int kSplit_>
struct Product {
  static constexpr int kRows = kRows_, kK = kK_, kSplit = kSplit_;
  static constexpr int kStrips = kRows / kStripRows;
  static constexpr int kItems = kStrips * kSplit;
  static constexpr int kRealChunks = kK / kSplit / kChunk;       // of all warps; the rest is padding
  static constexpr int kChunks = ceil_div(kRealChunks, kWarps);  // of one warp
  static constexpr int kPieceChunks = piece_chunks(kChunks);
  static constexpr int kPieces = kChunks / kPieceChunks;  // of one item, a warp
  static constexpr int kOwners = kPieces == 1 ? piece_owners(kChunks) : 1;
  static constexpr int kWarpPieceBytes = kPieceChunks * kChunkBytes;  // of one owner
  static constexpr int kPieceBytes = kOwners * kWarpPieceBytes;
  // How many chunks of the B operand, and of the weights, registers hold at once: those of a piece.
  static constexpr int kHeld = kPieceChunks;
  static constexpr bool kOneFill = kHeld == kChunks && kSplit == 1;  // one B operand serves all items
  // Whether a warp loads an item's weights into registers before it waits for the operand.
  static constexpr bool kAhead = kHeld == kChunks && kHeld <= 6;
  // For how many items it does so. Before Hopper, warps cannot hand over registers, and two items would not fit.
  static constexpr int kItemsAhead = kAhead && kOneFill && kHeld <= 4 && kHopper ? 2 : 1;
  static constexpr int64_t kItemBytes = int64_t(kWarps) * kChunks * kChunkBytes;
  static constexpr int64_t kBytes = kItems * kItemBytes;
  static_assert(kRows % kStripRows == 0, "rows come in whole strips");
  static_assert(kRealChunks % kChunks == 0, "padding is whole warps");
  // Whether a warp's chunks are not padding.
  static __device__ __forceinline__ bool real(int warp) {
    return kRealChunks == kWarps * kChunks || warp * kChunks < kRealChunks;
  }
  static_assert((kK / kSplit) % kChunk == 0, "k comes in whole chunks");
};

__device__ constexpr int split_of(int rows, int k) { return rows <= 64 * 16 && k >= 1024 ? 2 : 1; }

template <class D>
struct Products {
  static constexpr int kHeadRows = D::kHeads * D::kHeadDim;
  using Qkv = Product<kHeadRows + 2 * D::kKvHeads * D::kHeadDim, D::kHidden, 1>;
  using Out = Product<D::kHidden, kHeadRows, split_of(D::kHidden, kHeadRows)>;
  using GateUp = Product<2 * D::kIntermediate, D::kHidden, 1>;
  using Down = Product<D::kHidden, D::kIntermediate, split_of(D::kHidden, D::kIntermediate)>;
  using Head = Product<D::kVocab, D::kHidden, 1>;
  // Where a layer's products begin, in its bytes.
  static constexpr int64_t kOutFrom = Qkv::kBytes;
  static constexpr int64_t kGateUpFrom = kOutFrom + Out::kBytes;
  static constexpr int64_t kDownFrom = kGateUpFrom + GateUp::kBytes;
  static constexpr int64_t kLayerBytes = kDownFrom + Down::kBytes;
};

// If the widths of talker and predictor differ, this product and a bias make the predictor's input from the talker's
// hidden row. The embeddings of codes are projected when the weights are packed.
using Projection = Product<P::kHidden, T::kHidden, 1>;

using TalkerProducts = Products<T>;
using PredictorProducts = Products<P>;

}  // namespace qwen_tts
