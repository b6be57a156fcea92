// The exchanges of wide frames: 64-bit words of four bf16 with a tag of four bits and nothing beside them, half the
// bytes of packets. From nine streams on, what CTAs poll is more than the weights they read.
//
// Values are scaled by 2^-32, which is exact, so that bit 14 of each is 0. The four bits carry the tag: the number of
// the exchange in its launch, from 1 on, mod 16. Two writes of a word are never a multiple of 16 exchanges apart
// (DenseReuse), so an old word does not pass for a new one. Before a launch all words are set to a tag that no first
// write has (launch_frame). A value that is not a number, or too large, is an error (refuse_number): its bits would be
// a wait without end.
#pragma once

#include "context.cuh"

namespace qwen_tts {

constexpr uint32_t kTagMask = 0x40004000u;  // bit 14 of both values of half a word
constexpr float kDenseScale = 0x1p-32f;
constexpr uint32_t kDenseUnscale = 0x4f804f80u;  // 2^32 twice, bf16
constexpr float kDenseLimit = 0x1p32f;
constexpr int kDenseTags = 16;
constexpr int kClearedTag = kDenseTags - 1;  // of words of ones: kClearedByte
constexpr int kClearedByte = 0xff;
constexpr uint32_t kOnceTag = 5;  // of words that a launch writes once
constexpr int kFirstNumber = 1;   // of a launch's first exchange; what the first layer is fed has 0

// Where vectors lie, in words, of one tile of columns. Of a vector, two chunks of 16 values stand together, in mma
// B-fragment order: lane n * 4 + t has two words. The first has values {2t, 2t + 1, 2t + 8, 2t + 9} of the first chunk
// and of column n.
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

// A word of a vector, from the vector's first one in its tile.
__device__ __forceinline__ int dense_at(int chunk, int lane) { return ((chunk >> 1) * 32 + lane) * 2 + (chunk & 1); }

__device__ __forceinline__ uint64_t* dense_vector(const FrameParams& p, int tile, int vector) {
  return p.packets + PacketLayout::kDense + tile * DenseLayout::kTileWords + vector;
}

// A tag's bits in the lower and the upper half of a word.
__device__ __forceinline__ uint2 dense_tag(uint32_t tag) {
  return make_uint2((tag & 1) << 14 | (tag & 2) << 29, (tag & 4) << 12 | (tag & 8) << 27);
}
// What is 0 in kTagMask's bits if a word carries `tag`.
__device__ __forceinline__ uint32_t dense_differs(uint64_t word, uint2 tag) {
  return (uint32_t(word) ^ tag.x) | (high_half(word) ^ tag.y);
}

// Half a word's two values, as a pair of bf16.
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

// Publish four values: the rows {0, 1, 8, 9} of a chunk, less twice the word's place in it.
template <class Context>
__device__ __forceinline__ void publish_word(const Context& c, uint64_t* to, float2 low, float2 high, uint32_t tag) {
  // One comparison of the sum: a NaN in any value makes it false.
  if (!(fabsf(low.x) + fabsf(low.y) + fabsf(high.x) + fabsf(high.y) < kDenseLimit)) refuse_number(c.p, c.tag);
  const uint2 bits = dense_tag(tag);
  const uint32_t a = pack_bf16(low.x * kDenseScale, low.y * kDenseScale) | bits.x;
  const uint32_t b = pack_bf16(high.x * kDenseScale, high.y * kDenseScale) | bits.y;
  store_word(to, uint64_t(b) << 32 | a);
}

// Publish half a word: two values with the two lower bits of a tag, whose upper two are the same.
template <class Context>
__device__ __forceinline__ void publish_half(const Context& c, uint64_t* to, int half, float low, float high,
                                             uint32_t tag) {
  if (!(fabsf(low) + fabsf(high) < kDenseLimit)) refuse_number(c.p, c.tag);
  store_half_word(reinterpret_cast<uint32_t*>(to) + half,
                  pack_bf16(low * kDenseScale, high * kDenseScale) | dense_tag(tag).x);
}

// The tag of gate-up's result, whose words come in halves: each has two bits of it. It never equals kClearedTag's in
// the first layer, and two writes of a word are no multiple of four exchanges apart (DenseReuse).
__device__ __forceinline__ uint32_t inner_tag(uint32_t number) { return (number & 3) * 5; }

// The tag of an exchange of this launch.
template <class Context>
__device__ __forceinline__ uint32_t dense_number(const Context& c, uint32_t tag) {
  return tag - c.p.epoch + kFirstNumber;
}

// For the test: two neighbouring rows of a column, rounded.
template <class Context>
__device__ __forceinline__ void dump_pair(const Context& c, int row, int column, float low, float high) {
  if (!c.dumps()) return;
  float* at = c.p.dump_exchanges + (((c.tag - c.p.epoch) * PacketLayout::kDumpRows + row) * kMaxColumns + column);
  const float2 rounded = unpack_bf16(pack_bf16(low, high));
  at[0] = rounded.x;
  at[kMaxColumns] = rounded.y;
}

// Walks a wide frame and looks at the exchanges between two writes of a buffer.
struct DenseReuse : FramePlace {
  int total = 0;
  int last[5] = {-1, -1, -1, -1, -1};  // of Step::kQkv to Step::kDown
  int last_fed = 0;
  bool distinct = true;

  __device__ constexpr void begin_pass(int pass) {
    FramePlace::begin_pass(pass);
    if (pass == 0) feed(0);
  }
  __device__ constexpr void feed(int) {
    if ((total - last_fed) % kDenseTags == 0) distinct = false;
    last_fed = total;
  }
  __device__ constexpr void advance(Step step) {
    const int buffer = int(step);
    const bool once = step == Step::kQkv && at_pass == 0 && at_layer == P::kLayers - 1;
    if (buffer < 5 && !once) {
      const int tags = step == Step::kGateUp ? 4 : kDenseTags;
      if (last[buffer] >= 0 && (total - last[buffer]) % tags == 0) distinct = false;
      if (last[buffer] < 0 && (total + kFirstNumber) % tags == tags - 1) distinct = false;
      last[buffer] = total;
    }
    ++total;
  }
};
__device__ constexpr bool dense_tags_are_distinct() {
  DenseReuse reuse{};
  walk_frame(reuse, kMaxColumns, false);
  return reuse.distinct;
}
static_assert(dense_tags_are_distinct(), "a word's tag must differ from the one that it has");

}  // namespace qwen_tts
