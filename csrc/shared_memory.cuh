// What a CTA keeps in shared memory. What is left of it is the weight ring.
#pragma once

#include "kv_tile.cuh"
#include "ring.cuh"

namespace qwen_tts {

constexpr int kGroup = 3;                              // tiles whose partial sums meet at one barrier
constexpr int kTileFloats = kStripRows * kMaxColumns;  // of one warp's result

// What a CTA must know of one of its items of the talker's attention (AttentionItem), the same in all layers.
struct alignas(16) ItemRows {
  uint32_t bits;
  int head;       // of the cache: slot * kv_heads + kv_head
  int end;        // the position after its last
  int first_new;  // from here on, rows come from the exchange
};

// Of a CTA, where all streams are as long as can be and the grid is as small as can be; and an end.
constexpr int kMaxItems = kMaxSplits * T::kKvHeads + 1;

struct alignas(16) Scratch {  // of float4s
  float partial[2][kGroup][kWarps][kTileFloats];
  float sum_of_squares[2][kWarps][kMaxColumns];
  int codes[kWarps][kMaxColumns];  // the last ones of the streams; each warp's own copy
  ItemRows items[kMaxItems];       // this CTA's of the talker's attention
};

struct SamplerShared {
  uint32_t key[kWarps], score[kWarps];
  int index[kWarps];
  int count[kWarps];
  float mass[kWarps];
};
using TalkerTile = TilePieces<T>;
constexpr int kMaxPieceBytes =
    max_of(max_of(TalkerProducts::kMaxPieceBytes, PredictorProducts::kMaxPieceBytes), TalkerTile::kBytes);
constexpr int kMinPieceBytes =
    min_of(min_of(TalkerProducts::kMinPieceBytes, PredictorProducts::kMinPieceBytes), TalkerTile::kBytes);
constexpr int kOtherBytes = sizeof(Scratch) + sizeof(SamplerShared) + sizeof(FrameParams) + 256;
constexpr int kRingBytes = ring_bytes((kSharedBytes - kOtherBytes) / kWarps, kChunkBytes, kMinPieceBytes);
static_assert(kRingBytes >= 2 * kMaxPieceBytes, "the ring must hold two pieces");
using FrameRing = RingShared<kRingBytes, kMinPieceBytes>;

}  // namespace qwen_tts
