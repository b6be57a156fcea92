// Exchange between CTAs without barriers. A packet is one 64-bit word {payload, tag}.
//
// The producer stores the word whole, with a relaxed store. Every consumer polls the word itself until it has the tag
// that the consumer waits for. The word validates itself, so there is no fence, no counter and no second read. Relaxed
// gpu-scope loads never come from L1. PTX promises single-copy atomicity for a 64-bit scalar but not between the
// elements of a vector, so each packet carries its own tag.
//
// Tags rise by one with each exchange of a launch and from launch to launch (the host passes the first), so nothing is
// ever reset. Each kind of exchange has its own buffer, and a buffer may be overwritten one layer later. This is safe:
// before a CTA writes in layer l + 1, the chain of exchanges has made it wait for all QKV rows and all gate-up rows of
// layer l. A CTA publishes its rows of these two only after it has read all earlier exchanges. So every CTA must own
// rows of both, which limits the grid (the fact max_grid in kernel_tts.cu). In the predictor's first layer without a
// QKV exchange, the exchange of the code takes its role: the code is known only after all gate-up rows of the previous
// pass have been used. Pass 0 ends with a QKV that has its own buffer. A CTA that goes on to pass 1 has read all rows
// of the down projection before that QKV, so no read of that layer is outstanding.
//
// Grid barriers are slower: 2.3 us each while weights stream (docs/experiments.md).
#pragma once

#include "encodings.cuh"
#include "frame_schedule.cuh"
#include "ptx.cuh"

namespace qwen_tts {

using namespace ptx;

__device__ __forceinline__ int lane_index() { return thread_index() & 31; }
__device__ __forceinline__ int warp_index() { return thread_index() >> 5; }

// Two neighbouring packets, read at once.
struct TwoPackets {
  uint64_t a, b;

  __device__ __forceinline__ void load(const uint64_t* p) { load_two_words(p, a, b); }
  // 0 if both carry `tag`.
  __device__ __forceinline__ uint32_t lacks(uint32_t tag) const { return (high_half(a) ^ tag) | (high_half(b) ^ tag); }
  __device__ __forceinline__ uint32_t first() const { return uint32_t(a); }
  __device__ __forceinline__ uint32_t second() const { return uint32_t(b); }
};

__device__ __forceinline__ uint2 load_packet(const uint64_t* p) {
  const uint64_t a = load_word(p);
  return make_uint2(uint32_t(a), uint32_t(a >> 32));
}

__device__ __forceinline__ void store_packet(uint64_t* p, uint32_t payload, uint32_t tag) {
  store_word(p, uint64_t(tag) << 32 | payload);
}

constexpr unsigned kWatchdogHang = 1, kWatchdogNumber = 2;  // FrameParams::watchdog's first word

// Turns a wait that never ends into an error that names the place. Waits are counted in polls of about half a
// microsecond each, because a clock would cost registers in every loop.
__device__ __noinline__ void trap_timeout(const FrameParams& p, Phase phase, uint32_t tag) {
  store_whole(p.watchdog, make_uint4(kWatchdogHang, block_index(), unsigned(phase), tag - p.epoch));
  __threadfence_system();
  __trap();
}

struct Watchdog {
  const FrameParams& p;

  __device__ __forceinline__ void after(unsigned spin, Phase phase, uint32_t tag) const {
    if (spin == p.max_spins) trap_timeout(p, phase, tag);
  }
};

// Whole warps wait, and their lanes leave a wait together. If lanes left one by one, the warp would run the following
// code once for each group of lanes. A lane with nothing to wait for polls another lane's packets. The watchdog check
// runs while the loads are in flight.

// Polls kCount chunks of each of kVectors vectors until all packets carry `tag`. A chunk has 64 packets, two for each
// lane. Each poll loads all of them again: to skip those that have arrived saves no time and costs registers.
template <int kVectors, int kCount>
__device__ __forceinline__ void wait_pairs(const uint64_t* p, int vector_stride, uint32_t tag,
                                           TwoPackets (&v)[kVectors][kCount], const Watchdog& dog, Phase phase) {
  for (unsigned spin = 0;; ++spin) {
    uint32_t lack = 0;
#pragma unroll
    for (int s = 0; s < kVectors; ++s)
#pragma unroll
      for (int j = 0; j < kCount; ++j) v[s][j].load(p + s * vector_stride + j * 64);
    dog.after(spin, phase, tag);
#pragma unroll
    for (int s = 0; s < kVectors; ++s)
#pragma unroll
      for (int j = 0; j < kCount; ++j) lack |= v[s][j].lacks(tag);
    if (__all_sync(~0u, lack == 0)) return;
  }
}

__device__ __forceinline__ uint32_t wait_packet(const uint64_t* p, uint32_t tag, const Watchdog& dog, Phase phase) {
  for (unsigned spin = 0;; ++spin) {
    const uint2 v = load_packet(p);
    dog.after(spin, phase, tag);
    if (__all_sync(~0u, v.y == tag)) return v.x;
  }
}

// Where each exchange lies, in packets. A vector of K values for the 8 columns of a tile takes K / 16 chunks of 64
// packets, in mma B-fragment order: lane n * 4 + t has two packets, values {2t, 2t + 1} and {2t + 8, 2t + 9} of column
// n.
constexpr int kStripPackets = 64;  // of sixteen values, for all columns
__device__ constexpr int vector_packets(int k) { return (k + 15) / 16 * kStripPackets; }

struct PacketLayout {
  static constexpr int kQkvRows =
      max_of((T::kHeads + 2 * T::kKvHeads) * T::kHeadDim, (P::kHeads + 2 * P::kKvHeads) * P::kHeadDim);
  static constexpr int kHeadRows = max_of(T::kHeads * T::kHeadDim, P::kHeads* P::kHeadDim);
  static constexpr int kHidden = max_of(T::kHidden, P::kHidden);
  static constexpr int kInner = max_of(T::kIntermediate, P::kIntermediate);
  static constexpr int kVocab = max_of(T::kVocab, P::kVocab);
  static constexpr int kPartial = T::kHeads / T::kKvHeads * (T::kHeadDim + 2);  // a head group's o, m, l
  static constexpr int kDumpRows = max_of(max_of(kQkvRows, kInner), max_of(kHeadRows, 2 * kHidden));

  static constexpr int64_t kQkv = 0;
  static constexpr int64_t kHeadsOut = kQkv + vector_packets(kQkvRows);
  static constexpr int64_t kDeltaO = kHeadsOut + vector_packets(kHeadRows);  // [split][vector]
  static constexpr int64_t kDeltaDown = kDeltaO + 2 * vector_packets(kHidden);
  static constexpr int64_t kMlpInner = kDeltaDown + 2 * vector_packets(kHidden);
  static constexpr int64_t kLogits = kMlpInner + vector_packets(kInner);  // [column][vocab]
  static constexpr int64_t kCodes = kLogits + kMaxColumns * kVocab;       // [codebook][column]
  static constexpr int64_t kPartials = kCodes + kNumCodebooks * kMaxColumns;
  // [column * kv head][split][kPartial]
  static constexpr int64_t kProjected = kPartials + int64_t(kMaxColumns) * T::kKvHeads * kMaxSplits * kPartial;
  static constexpr int64_t kFirstPositionQkv =
      kProjected + vector_packets(P::kHidden);  // of pass 0: see frame_schedule.cuh
  // For wide frames: the residual on its way from the CTA that adds O's result to the CTA that adds down's, and back,
  // in fp32, [row][column]. After these come the dense words (dense_words.cuh).
  static constexpr int64_t kAfterOut = kFirstPositionQkv + vector_packets(kQkvRows);
  static constexpr int64_t kAfterDown = kAfterOut + kHidden * kMaxColumns;
  static constexpr int64_t kDense = kAfterDown + kHidden * kMaxColumns;
};

// The packet of rows {2 * pair, 2 * pair + 1} of a 16-row strip and a column, in a vector's buffer.
__device__ __forceinline__ int packet_index(int chunk, int pair, int column) {
  return (chunk * 32 + column * 4 + (pair & 3)) * 2 + (pair >> 2);
}

// Publishes two neighbouring values of a vector as bf16, with the tag that is `later` after this exchange's. `dump_row`
// is their row in the tests' dump of this exchange.
template <class Context>
__device__ __forceinline__ void publish_at(const Context& c, uint64_t* to, float low, float high, int dump_row,
                                           int column, int later = 0) {
  const uint32_t bits = pack_bf16(low, high);
  store_packet(to, bits, c.tag + later);
  if (c.dumps()) {
    float* at =
        c.p.dump_exchanges + (((c.tag - c.p.epoch) * PacketLayout::kDumpRows + dump_row) * kMaxColumns + column);
    const float2 rounded = unpack_bf16(bits);
    at[0] = rounded.x;
    at[kMaxColumns] = rounded.y;
  }
}

// The same for two neighbouring packets: rows dump_row and the next, and those that are eight rows further.
template <class Context>
__device__ __forceinline__ void publish_two(const Context& c, uint64_t* to, float2 low, float2 high, int dump_row,
                                            int column, int later = 0) {
  const uint64_t tagged = uint64_t(c.tag + later) << 32;
  const uint32_t a = pack_bf16(low.x, low.y), b = pack_bf16(high.x, high.y);
  store_two_words(to, tagged | a, tagged | b);
  if (c.dumps()) {
    float* at =
        c.p.dump_exchanges + (((c.tag - c.p.epoch) * PacketLayout::kDumpRows + dump_row) * kMaxColumns + column);
    const float2 first = unpack_bf16(a), second = unpack_bf16(b);
    at[0] = first.x;
    at[kMaxColumns] = first.y;
    at[8 * kMaxColumns] = second.x;
    at[9 * kMaxColumns] = second.y;
  }
}

// Publishes rows `row`, which is even, and row + 1 of a vector.
template <class Context>
__device__ __forceinline__ void publish_pair(const Context& c, uint64_t* vector, int row, int column, float low,
                                             float high) {
  publish_at(c, vector + packet_index(row / 16, row % 16 / 2, column), low, high, row, column);
}

}  // namespace qwen_tts
