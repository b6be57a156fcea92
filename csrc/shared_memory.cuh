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

constexpr int kOtherBytes = sizeof(Scratch) + sizeof(SamplerShared) + sizeof(FrameParams) + 256;
// A longer ring is slower on an H200: 1159, 1286 us a frame with 22 and 42 slots (csrc/EXPERIMENTS.md).
#ifndef QWEN_TTS_RING_SLOTS  // geometry.h may have another number, which `tune` found better on its GPU
#define QWEN_TTS_RING_SLOTS 22
#endif
constexpr int kMostRingSlots = ring_slots(kSharedBytes - kOtherBytes);
constexpr int kRingSlots = min_of(QWEN_TTS_RING_SLOTS, kMostRingSlots);
static_assert(kRingSlots >= kWarps / 2, "the ring must hold an item of most products");
using FrameRing = RingShared<kRingSlots>;

}  // namespace qwen_tts
