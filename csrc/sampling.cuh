// One code from its logits, by one CTA for one stream, in the order of Hugging Face `generate`:
// repetition penalty, suppression, temperature, top-k (ties kept), top-p; then Gumbel-max.
//
// Top-k needs no sort: take the winner of logit + noise; if fewer than k logits are larger it is
// the winner of the truncated race too, else everything up to its logit is out and the race is run
// again (one round as a rule, each halves what is left). Top-p (rare) finds its thresholds by
// bisection over the logits' order-preserving bits. The twin is qwen_megakernel/sampling.py.
#pragma once

#include "gemv.cuh"

namespace qwen_tts {

// Philox4x32-10 (Salmon et al., SC11).
__host__ __device__ __forceinline__ uint4 philox(uint4 c, uint2 k) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.x, b = uint64_t(0xCD9E8D57u) * c.z;
    c = make_uint4(uint32_t(b >> 32) ^ c.y ^ k.x, uint32_t(b), uint32_t(a >> 32) ^ c.w ^ k.y, uint32_t(a));
    k.x += 0x9E3779B9u;
    k.y += 0xBB67AE85u;
  }
  return c;
}

__host__ __device__ __forceinline__ float gumbel(uint32_t bits) {
  const float uniform = (float(bits >> 9) + 0.5f) * 0x1p-23f;  // exact, never 0 or 1
  return -logf(-logf(uniform));
}

// Bits of a float that compare as the float does.
__host__ __device__ __forceinline__ uint32_t ordered_bits(uint32_t bits) {
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Draw {
  float temperature, tail_mass, penalty;  // penalty 1: none
  int top_k;
  bool control_suppressed;  // the talker's control codes, EOS apart
  bool eos_suppressed;
  uint2 key;
  int codebook, frame;
};

struct SamplerShared {
  float value[kWarps];
  int index[kWarps];
  int count[kWarps];
  float mass[kWarps];
};

template <int kVocab>
struct Sampler {
  static constexpr int kQuads = ceil_div(kVocab / 4, kThreads);  // of a thread
  static_assert(kVocab % 4 == 0, "a draw gives four");

  SamplerShared& sh;
  float score[kQuads][4];  // processed logit, minus infinity where out
  float noise[kQuads][4];

  static __device__ __forceinline__ int quad(int i) { return threadIdx.x + i * kThreads; }
  static __device__ __forceinline__ bool owns(int i) { return quad(i) < kVocab / 4; }

  // Before the logits are there: it does not depend on them.
  __device__ __forceinline__ void draw_noise(const Draw& d, const float* injected) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const uint4 words = philox(make_uint4(quad(i), d.codebook, d.frame, 0), d.key);
      const uint32_t lanes[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int j = 0; j < 4; ++j)
        noise[i][j] = injected == nullptr ? gumbel(lanes[j]) : owns(i) ? injected[quad(i) * 4 + j] : 0.f;
    }
  }

  __device__ __forceinline__ void read_logits(const uint64_t* packets, uint32_t tag, const Watchdog& dog,
                                              float* dump) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (!owns(i)) {
#pragma unroll
        for (int j = 0; j < 4; ++j) score[i][j] = -INFINITY;
        continue;
      }
      uint4 v[2];
      wait_pairs<2>(packets + quad(i) * 4, 2, tag, v, dog, Phase::kLogits);
      score[i][0] = __uint_as_float(v[0].x);
      score[i][1] = __uint_as_float(v[0].z);
      score[i][2] = __uint_as_float(v[1].x);
      score[i][3] = __uint_as_float(v[1].z);
      if (dump != nullptr)
#pragma unroll
        for (int j = 0; j < 4; ++j) dump[quad(i) * 4 + j] = score[i][j];
    }
  }

  __device__ __forceinline__ void process(const Draw& d, const uint32_t* seen) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int v = quad(i) * 4 + j;
        if (!owns(i)) continue;
        float x = score[i][j];
        if (seen != nullptr && d.penalty != 1.f && (seen[v / 32] >> (v % 32) & 1))
          x = x < 0.f ? x * d.penalty : x / d.penalty;
        if (d.control_suppressed && v >= kVocab - kNumControlCodes && v != kEosCode) x = -INFINITY;
        if (d.eos_suppressed && v == kEosCode) x = -INFINITY;
        score[i][j] = d.temperature > 0.f ? x / d.temperature : x;
      }
  }

  template <class Predicate>
  __device__ __forceinline__ int count_if(Predicate&& predicate) {
    int n = 0;
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) n += owns(i) && predicate(i, j) ? 1 : 0;
    n = __reduce_add_sync(~0u, n);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) sh.count[threadIdx.x >> 5] = n;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sh.count[w];
    return total;
  }

  template <class Value>
  __device__ __forceinline__ float sum_of(Value&& value) {
    float x = 0.f;
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) x += owns(i) ? value(i, j) : 0.f;
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) sh.mass[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sh.mass[w];
    return total;
  }

  // Index and logit of the largest logit + noise among scores above `floor`; the lowest index of equals.
  __device__ __forceinline__ int winner(bool with_noise, float floor, float& logit) {
    float best = -INFINITY;
    int index = kVocab;
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int v = quad(i) * 4 + j;
        const float x = with_noise ? score[i][j] + noise[i][j] : score[i][j];
        if (score[i][j] > floor && (x > best || (x == best && v < index))) {
          best = x;
          index = v;
        }
      }
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
      const float other = __shfl_xor_sync(~0u, best, offset);
      const int at = __shfl_xor_sync(~0u, index, offset);
      if (other > best || (other == best && at < index)) {
        best = other;
        index = at;
      }
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) {
      sh.value[threadIdx.x >> 5] = best;
      sh.index[threadIdx.x >> 5] = index;
    }
    __syncthreads();
    best = sh.value[0];
    index = sh.index[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w)
      if (sh.value[w] > best || (sh.value[w] == best && sh.index[w] < index)) {
        best = sh.value[w];
        index = sh.index[w];
      }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (quad(i) * 4 + j == index) sh.value[0] = score[i][j];
    __syncthreads();
    logit = sh.value[0];
    return index;
  }

  __device__ __forceinline__ uint32_t key(int i, int j) const {
    return ordered_bits(__float_as_uint(score[i][j]));
  }

  // Put codes outside top-k and top-p out, explicitly.
  __device__ __forceinline__ void truncate(const Draw& d) {
    uint32_t kth = 0;  // largest key that at least k reach
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t candidate = kth | 1u << bit;
      if (count_if([&](int i, int j) { return key(i, j) >= candidate; }) >= d.top_k) kth = candidate;
    }
    float top;
    winner(false, -INFINITY, top);
    auto mass = [&](int i, int j) { return key(i, j) >= kth ? expf(score[i][j] - top) : 0.f; };
    const float limit = d.tail_mass * sum_of(mass);
    uint32_t edge = 0;  // largest key with no more than the limit below it
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t candidate = edge | 1u << bit;
      const float below =
          sum_of([&](int i, int j) { return key(i, j) < candidate ? mass(i, j) : 0.f; });
      if (below <= limit) edge = candidate;
    }
    edge = min(edge, ordered_bits(__float_as_uint(top)));  // the most likely code always stays
    const float below = sum_of([&](int i, int j) { return key(i, j) < edge ? mass(i, j) : 0.f; });
    const float each = expf(__uint_as_float(edge & 0x80000000u ? edge & 0x7fffffffu : ~edge) - top);
    const int ties = count_if([&](int i, int j) { return key(i, j) == edge; });
    const int last = edge == ordered_bits(__float_as_uint(top)) ? ties - 1 : ties;
    int removed = 0;  // of equals the lowest indices go first
    while (removed < last && below + each * (removed + 1) <= limit) ++removed;
    int from = 0;  // the first index of the equals that stays
    for (int bit = 12; bit >= 0; --bit) {
      const int candidate = from | 1 << bit;
      const int before =
          count_if([&](int i, int j) { return key(i, j) == edge && quad(i) * 4 + j < candidate; });
      if (before <= removed && candidate < kVocab) from = candidate;
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (key(i, j) < edge || (key(i, j) == edge && removed > 0 && quad(i) * 4 + j < from))
          score[i][j] = -INFINITY;
  }

  // The code; the same in every thread.
  __device__ __forceinline__ int pick(const Draw& d) {
    const bool noisy = d.temperature > 0.f;
    if (noisy && d.tail_mass > 0.f) truncate(d);
    float floor = -INFINITY;
    for (;;) {
      float logit;
      const int index = winner(noisy, floor, logit);
      const int above = count_if([&](int i, int j) { return score[i][j] > logit; });
      if (above < d.top_k) return index;
      floor = logit;
    }
  }
};

}  // namespace qwen_tts
