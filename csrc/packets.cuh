// Exchange between CTAs without barriers: a packet is one 64-bit word {payload, tag}.
//
// The producer stores it whole, relaxed; every consumer polls the word itself until the tag is the
// one it waits for. The word validates itself, so no fence, no counter and no second read is
// needed; relaxed gpu-scope loads never come from L1. PTX promises single-copy atomicity for a
// 64-bit scalar and none between the elements of a vector, so each packet carries its own tag.
//
// Tags rise by one with each exchange of a launch and from launch to launch (the host passes the
// first), so nothing is ever reset. Each kind of exchange has its own buffer, and a buffer may be
// overwritten one layer later: by then every CTA has published its rows of that layer's QKV
// product, all of which the attention has read before anything later is written. So the grid may
// not have more CTAs than the QKV product has 16-row strips (checked by the host).
//
// The alternative that lost: grid barriers cost 2.3 us each while weights stream (../csrc/EXPERIMENTS.md).
#pragma once

#include "params.h"

namespace qwen_tts {

enum class Phase : int { kInput, kQkv, kAttention, kCombine, kOut, kMlp, kLogits, kCode, kProject };

__device__ __forceinline__ uint4 load_two_packets(const uint64_t* p) {
  uint64_t a, b;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
  return make_uint4(uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32));
}

__device__ __forceinline__ uint2 load_packet(const uint64_t* p) {
  uint64_t a;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(a) : "l"(p) : "memory");
  return make_uint2(uint32_t(a), uint32_t(a >> 32));
}

__device__ __forceinline__ void store_packet(uint64_t* p, uint32_t payload, uint32_t tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(uint64_t(tag) << 32 | payload)
               : "memory");
}

// Turns a wait that will never end into an error that names where it stood. Counted in polls, about
// half a microsecond each: a clock would cost registers in every loop, a call would cost spills.
struct Watchdog {
  const FrameParams& p;

  __device__ __forceinline__ bool tired(unsigned spin) const { return spin == p.max_spins; }
  __device__ __forceinline__ void bark(Phase phase, uint32_t tag) const {
    if (atomicExch(p.watchdog, 1) == 0) {
      p.watchdog[1] = blockIdx.x;
      p.watchdog[2] = int(phase);
      p.watchdog[3] = int(tag);
      __threadfence_system();
    }
    __trap();
  }
};

// Poll kCount pairs of packets, `stride` words apart, until all carry `tag`.
template <int kCount>
__device__ __forceinline__ void wait_pairs(const uint64_t* p, int stride, uint32_t tag,
                                           uint4 (&v)[kCount], const Watchdog& dog, Phase phase) {
  for (unsigned spin = 0;; ++spin) {
    bool ok = true;
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = load_two_packets(p + int64_t(j) * stride);
#pragma unroll
    for (int j = 0; j < kCount; ++j) ok = ok && v[j].y == tag && v[j].w == tag;
    if (ok) return;
    if (dog.tired(spin)) dog.bark(phase, tag);
  }
}

__device__ __forceinline__ uint32_t wait_packet(const uint64_t* p, uint32_t tag, const Watchdog& dog,
                                                Phase phase) {
  for (unsigned spin = 0;; ++spin) {
    const uint2 v = load_packet(p);
    if (v.y == tag) return v.x;
    if (dog.tired(spin)) dog.bark(phase, tag);
  }
}

// Where each exchange lies, in packets. A vector of K values for one tile of 8 streams takes
// K / 16 chunks of 64 packets, in mma B-fragment order: lane n * 4 + t holds two packets, values
// {2t, 2t + 1} and {2t + 8, 2t + 9} of stream n.
constexpr int kTiles = 2;  // the predictor's first pass has two positions
constexpr int max_of(int a, int b) { return a > b ? a : b; }
constexpr int vector_packets(int k) { return (k + 15) / 16 * 64; }

struct PacketLayout {
  using T = TalkerDims;
  using P = PredictorDims;
  static constexpr int kQkvRows =
      max_of((T::kHeads + 2 * T::kKvHeads) * T::kHeadDim, (P::kHeads + 2 * P::kKvHeads) * P::kHeadDim);
  static constexpr int kHeadRows = max_of(T::kHeads * T::kHeadDim, P::kHeads * P::kHeadDim);
  static constexpr int kHidden = max_of(T::kHidden, P::kHidden);
  static constexpr int kInner = max_of(T::kIntermediate, P::kIntermediate);
  static constexpr int kVocab = max_of(T::kVocab, P::kVocab);
  static constexpr int kPartial = T::kHeads / T::kKvHeads * (T::kHeadDim + 2);  // a head group's m, l, o

  static constexpr int64_t kQkv = 0;  // [tile][vector]
  static constexpr int64_t kHeadsOut = kQkv + kTiles * vector_packets(kQkvRows);
  static constexpr int64_t kDeltaO = kHeadsOut + kTiles * vector_packets(kHeadRows);  // [tile][split][vector]
  static constexpr int64_t kDeltaDown = kDeltaO + kTiles * 2 * vector_packets(kHidden);
  static constexpr int64_t kMlpInner = kDeltaDown + kTiles * 2 * vector_packets(kHidden);
  static constexpr int64_t kLogits = kMlpInner + kTiles * vector_packets(kInner);  // [stream][vocab]
  static constexpr int64_t kCodes = kLogits + kMaxStreams * kVocab;                // [codebook][stream]
  static constexpr int64_t kPartials = kCodes + kNumCodebooks * kMaxStreams;
  // [stream * kv head][chunk][kPartial]
  static constexpr int64_t kProjected = kPartials + int64_t(kMaxStreams) * T::kKvHeads * kMaxSplits * kPartial;
  static constexpr int64_t kTotal = kProjected + vector_packets(P::kHidden);
};

// Packet of rows {2 * pair, 2 * pair + 1} of a 16-row strip for a stream, in a vector's buffer.
__device__ __forceinline__ int packet_index(int chunk, int pair, int stream) {
  return (chunk * 32 + stream * 4 + (pair & 3)) * 2 + (pair >> 2);
}

}  // namespace qwen_tts
