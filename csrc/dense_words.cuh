// The exchanges of wide frames. A 64-bit word holds four bf16 values and a tag of four bits. It takes half the bytes of
// packets. From nine streams on, CTAs poll more bytes than they read of weights.
//
// Values are scaled by 2^-32. The scaling is exact and leaves bit 14 of each value 0, so these four bits can carry the
// tag (dense_tags.h). Before a launch, all words are set to a tag that no first write has (launch_frame). A value that is
// too large or not a number is an error (refuse_number), because its bits would change the tag, and readers would wait
// forever.
#pragma once

#include "context.cuh"
#include "dense_tags.h"

namespace qwen_tts {

constexpr uint32_t kTagMask = 0x40004000u;  // bit 14 of both values of half a word
constexpr float kDenseScale = 0x1p-32f;
constexpr uint32_t kDenseUnscale = 0x4f804f80u;  // 2^32 twice, bf16
constexpr float kDenseLimit = 0x1p32f;

// Where the vectors of one tile of columns lie, in words. Two chunks of 16 values of a vector stand together, in mma
// B-fragment order: lane n * 4 + t has two words, one for each chunk. A word has values {2t, 2t + 1, 2t + 8, 2t + 9} of
// its chunk, of column n.
__device__ constexpr int dense_words(int k) { return ceil_div(k, 2 * kChunk) * 64; }

struct DenseLayout {
  using L = PacketLayout;
  static constexpr int kQkv = 0;
  static constexpr int kHeadsOut = kQkv + dense_words(L::kQkvRows);
  static constexpr int kFed = kHeadsOut + dense_words(L::kHeadRows);  // the residual, as products read it
  static constexpr int kAfterOut = kFed + dense_words(L::kHidden);
  static constexpr int kAfterDown = kAfterOut + dense_words(L::kHidden);
  static constexpr int kMlpInner = kAfterDown + dense_words(L::kHidden);
  static constexpr int kNormed = kMlpInner + dense_words(L::kInner);  // the projection's input
  static constexpr int kProjected = kNormed + (kProjects ? dense_words(T::kHidden) : 0);
  static constexpr int kFirstPositionQkv = kProjected + dense_words(P::kHidden);
  static constexpr int kTileWords = kFirstPositionQkv + dense_words(L::kQkvRows);
  static constexpr int64_t kWords = int64_t(kTileWords) * kMaxColumns / kTileColumns;
  static constexpr int64_t kTotal = L::kDense + kWords;  // of FrameParams::packets
};

// The index of a word, counted from the first word of its vector in its tile.
__device__ __forceinline__ int dense_at(int chunk, int lane) { return ((chunk >> 1) * 32 + lane) * 2 + (chunk & 1); }

__device__ __forceinline__ uint64_t* dense_vector(const FrameParams& p, int tile, int vector) {
  return p.packets + PacketLayout::kDense + tile * DenseLayout::kTileWords + vector;
}

// The bits of a tag, as they stand in the lower and the upper half of a word.
__device__ __forceinline__ uint2 dense_tag(uint32_t tag) {
  return make_uint2((tag & 1) << 14 | (tag & 2) << 29, (tag & 4) << 12 | (tag & 8) << 27);
}
// The bits of kTagMask are 0 in the result if the word carries `tag`.
__device__ __forceinline__ uint32_t dense_differs(uint64_t word, uint2 tag) {
  return (uint32_t(word) ^ tag.x) | (high_half(word) ^ tag.y);
}

// The two values of half a word, as a pair of bf16.
__device__ __forceinline__ uint32_t dense_decode(uint32_t half) {
  const uint32_t bits = half & ~kTagMask, unscale = kDenseUnscale;
  const __nv_bfloat162 pair =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&bits), *reinterpret_cast<const __nv_bfloat162*>(&unscale));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Ends the launch with an error that names the exchange.
__device__ __noinline__ void refuse_number(const FrameParams& p, uint32_t tag) {
  store_whole(p.watchdog, make_uint4(kWatchdogNumber, block_index(), 0, tag - p.epoch));
  __threadfence_system();
  __trap();
}

// Publishes a word of four values. For lane t of a column they are rows {2t, 2t + 1, 2t + 8, 2t + 9} of a chunk.
template <class Context>
__device__ __forceinline__ void publish_word(const Context& c, uint64_t* to, float2 low, float2 high, uint32_t tag) {
  // One comparison of the sum: a NaN in any value makes it false.
  if (!(fabsf(low.x) + fabsf(low.y) + fabsf(high.x) + fabsf(high.y) < kDenseLimit)) refuse_number(c.p, c.tag);
  const uint2 bits = dense_tag(tag);
  const uint32_t a = pack_bf16(low.x * kDenseScale, low.y * kDenseScale) | bits.x;
  const uint32_t b = pack_bf16(high.x * kDenseScale, high.y * kDenseScale) | bits.y;
  store_word(to, uint64_t(b) << 32 | a);
}

// Publishes half a word: two values and two bits of the tag. The upper two bits of the tag must equal the lower two.
template <class Context>
__device__ __forceinline__ void publish_half(const Context& c, uint64_t* to, int half, float low, float high,
                                             uint32_t tag) {
  if (!(fabsf(low) + fabsf(high) < kDenseLimit)) refuse_number(c.p, c.tag);
  store_half_word(reinterpret_cast<uint32_t*>(to) + half,
                  pack_bf16(low * kDenseScale, high * kDenseScale) | dense_tag(tag).x);
}

// The number of an exchange in this launch, from its packet tag.
template <class Context>
__device__ __forceinline__ uint32_t dense_number(const Context& c, uint32_t tag) {
  return tag - c.p.epoch + kFirstNumber;
}

// Dumps two neighbouring rows of a column, rounded to bf16, for the tests.
template <class Context>
__device__ __forceinline__ void dump_pair(const Context& c, int row, int column, float low, float high) {
  if (!c.dumps()) return;
  float* at = c.p.dump_exchanges + (((c.tag - c.p.epoch) * PacketLayout::kDumpRows + row) * kMaxColumns + column);
  const float2 rounded = unpack_bf16(pack_bf16(low, high));
  at[0] = rounded.x;
  at[kMaxColumns] = rounded.y;
}

}  // namespace qwen_tts
