// Draws a code from its logits. One CTA does this for one stream. The steps and their order are those of Hugging Face
// `generate`: repetition penalty, suppression, temperature, top-k (ties kept), top-p. The draw is Gumbel-max.
//
// Top-k needs no sort. The sampler takes the code with the largest score + noise. If fewer than k scores are larger
// than this code's score, the code is in the top k and wins there too. Otherwise the sampler excludes all scores up to
// this one and tries again. Top-p, which is rare, finds its thresholds by bisection over the order-preserving bits of
// the logits. qwen_megakernel/model/sampling.py is the PyTorch version.
#pragma once

#include "context.cuh"

namespace qwen_tts {

// Philox4x32-10 (Salmon et al., SC11).
__device__ __forceinline__ uint4 philox(uint4 c, uint2 k) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c.x, b = uint64_t(0xCD9E8D57u) * c.z;
    c = make_uint4(uint32_t(b >> 32) ^ c.y ^ k.x, uint32_t(b), uint32_t(a >> 32) ^ c.w ^ k.y, uint32_t(a));
    k.x += 0x9E3779B9u;
    k.y += 0xBB67AE85u;
  }
  return c;
}

__device__ __forceinline__ float gumbel(uint32_t bits) {
  const float uniform = (float(bits >> 9) + 0.5f) * 0x1p-23f;  // exact, never 0 or 1
  return -logf(-logf(uniform));
}

struct Draw {
  float temperature, tail_mass, penalty;  // penalty 1: none
  int top_k;
  bool control_suppressed;  // the talker's control codes except EOS
  bool eos_suppressed;
  uint2 key;
  int codebook, frame;
};

// Talker and predictor share this code. A separate copy for the talker would miss the instruction cache in every frame.
struct Sampler {
  static constexpr int kQuads = ceil_div(PacketLayout::kVocab / 4, kThreads);  // four codes each, of a thread
  static constexpr int kNoise = kQuads * kThreads;                             // quads of a column's noise

  SamplerShared& sh;
  int vocab;
  float score[kQuads][4];  // processed logits, minus infinity for excluded codes
  float noise[kQuads][4];
  uint32_t seen[kQuads];  // a bit for each code that the stream has produced, four in each word

  static __device__ __forceinline__ int quad(int i) { return thread_index() + i * kThreads; }
  // Lets the loops below skip quads that no thread has, by a uniform branch.
  __device__ __forceinline__ bool any_owns(int i) const { return i * kThreads < vocab / 4; }
  __device__ __forceinline__ bool owns(int i) const { return quad(i) < vocab / 4; }

  // Draws the noise while the logits are still being computed, and stores it. Later each thread reads the noise that it
  // stored itself.
  static __device__ __forceinline__ void store_noise(const Draw& d, int vocab, float4* aside) {
#pragma unroll 1
    for (int i = 0; i * kThreads < vocab / 4; ++i) {
      uint2 key = d.key;  // opaque, so that the keys of the rounds take no registers over the loop
      opaque(key.x);
      opaque(key.y);
      const uint4 words = philox(make_uint4(quad(i), d.codebook, d.frame, 0), key);
      __stcg(aside + quad(i), make_float4(gumbel(words.x), gumbel(words.y), gumbel(words.z), gumbel(words.w)));
    }
  }
  __device__ __forceinline__ void read_noise(const float4* from) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const float4 x = owns(i) ? __ldcg(from + quad(i)) : make_float4(0.f, 0.f, 0.f, 0.f);
      noise[i][0] = x.x;
      noise[i][1] = x.y;
      noise[i][2] = x.z;
      noise[i][3] = x.w;
    }
  }

  // words: one bit for each code, or null if nothing is penalised.
  __device__ __forceinline__ void read_seen(const uint32_t* words) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
      seen[i] = words != nullptr && owns(i) ? __ldcg(words + quad(i) / 8) >> (quad(i) % 8 * 4) : 0u;
  }

  __device__ __forceinline__ void read_logits(const uint64_t* packets, uint32_t tag, const Watchdog& dog, float* dump) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      TwoPackets v[2][1];
      wait_pairs(packets + min(quad(i), vocab / 4 - 1) * 4, 2, tag, v, dog, Phase::kLogits);
      score[i][0] = owns(i) ? __uint_as_float(v[0][0].first()) : -INFINITY;
      score[i][1] = owns(i) ? __uint_as_float(v[0][0].second()) : -INFINITY;
      score[i][2] = owns(i) ? __uint_as_float(v[1][0].first()) : -INFINITY;
      score[i][3] = owns(i) ? __uint_as_float(v[1][0].second()) : -INFINITY;
      if (dump != nullptr && owns(i))
#pragma unroll
        for (int j = 0; j < 4; ++j) dump[quad(i) * 4 + j] = score[i][j];
    }
  }

  __device__ __forceinline__ void process(const Draw& d) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int v = quad(i) * 4 + j;
        if (!owns(i)) continue;
        float x = score[i][j];
        if (seen[i] >> j & 1) x = x < 0.f ? x * d.penalty : divide(x, d.penalty);
        if (d.control_suppressed && v >= vocab - kNumControlCodes && v != kEosCode) x = -INFINITY;
        if (d.eos_suppressed && v == kEosCode) x = -INFINITY;
        score[i][j] = d.temperature > 0.f && x > -INFINITY ? divide(x, d.temperature) : x;
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
    sync_compute();  // the last count has been read
    if (lane_index() == 0) sh.count[warp_index()] = n;
    sync_compute();
    return __reduce_add_sync(~0u, lane_index() < kWarps ? sh.count[lane_index()] : 0);
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
    sync_compute();
    if (lane_index() == 0) sh.mass[warp_index()] = x;
    sync_compute();
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sh.mass[w];
    return total;
  }

  // Finds the largest score + noise among the scores whose key is above `floor`. Returns its index (the lowest of
  // equals) and the key of its score.
  __device__ __forceinline__ int winner(bool with_noise, uint32_t floor, uint32_t& score_key) {
    uint32_t best = 0, best_score = 0;
    int index = vocab;
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!any_owns(i)) break;
        const uint32_t x = ordered_bits(__float_as_uint(with_noise ? score[i][j] + noise[i][j] : score[i][j]));
        if (owns(i) && key(i, j) > floor && x > best) {  // indices rise, so the first of equals stays
          best = x;
          best_score = key(i, j);
          index = quad(i) * 4 + j;
        }
      }
    reduce(best, best_score, index);
    const int warp = warp_index(), lane = lane_index();
    if (lane == 0) {
      sh.key[warp] = best;
      sh.score[warp] = best_score;
      sh.index[warp] = index;
    }
    sync_compute();
    best = sh.key[lane % kWarps];
    best_score = sh.score[lane % kWarps];
    index = sh.index[lane % kWarps];
    reduce(best, best_score, index);
    score_key = best_score;
    return index;
  }

  // Reduces over the warp. Every lane gets the warp's best.
  __device__ __forceinline__ void reduce(uint32_t& best, uint32_t& best_score, int& index) const {
    const uint32_t top = __reduce_max_sync(~0u, best);
    const int first = __reduce_min_sync(~0u, best == top ? index : vocab);
    best_score = __reduce_max_sync(~0u, best == top && index == first ? best_score : 0u);
    best = top;
    index = first;
  }

  __device__ __forceinline__ uint32_t key(int i, int j) const { return ordered_bits(__float_as_uint(score[i][j])); }

  // Sets the scores of codes outside top-k and top-p to minus infinity.
  __device__ __forceinline__ void truncate(const Draw& d) {
    uint32_t kth = 0;  // the largest key that at least k scores reach
#pragma unroll 1
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t candidate = kth | 1u << bit;
      if (count_if([&](int i, int j) { return key(i, j) >= candidate; }) >= d.top_k) kth = candidate;
    }
    uint32_t top_key;
    winner(false, 0, top_key);
    const float top = from_ordered_bits(top_key);
    float (&weight)[kQuads][4] = noise;  // the caller reads the noise again
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = expf(score[i][j] - top);
        weight[i][j] = owns(i) && key(i, j) >= kth ? x : 0.f;
      }
    auto mass = [&](int i, int j) { return weight[i][j]; };
    const float limit = d.tail_mass * sum_of(mass);
    uint32_t edge = 0;  // the largest key below which lies no more mass than the limit
#pragma unroll 1
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t candidate = edge | 1u << bit;
      const float below = sum_of([&](int i, int j) { return key(i, j) < candidate ? mass(i, j) : 0.f; });
      if (below <= limit) edge = candidate;
    }
    edge = min(edge, top_key);  // the most likely code always stays
    const float below = sum_of([&](int i, int j) { return key(i, j) < edge ? mass(i, j) : 0.f; });
    const float each = expf(from_ordered_bits(edge) - top);
    const int ties = count_if([&](int i, int j) { return key(i, j) == edge; });
    const int last = edge == top_key ? ties - 1 : ties;
    int removed = 0;  // among equal scores, the lowest indices are removed first
    while (removed < last && below + each * (removed + 1) <= limit) ++removed;
    int from = 0;  // the first index that stays among the equal scores
#pragma unroll 1
    for (int bit = 12; bit >= 0; --bit) {
      const int candidate = from | 1 << bit;
      const int before = count_if([&](int i, int j) { return key(i, j) == edge && quad(i) * 4 + j < candidate; });
      if (before <= removed && candidate < vocab) from = candidate;
    }
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (key(i, j) < edge || (key(i, j) == edge && removed > 0 && quad(i) * 4 + j < from)) score[i][j] = -INFINITY;
  }

  // Returns the code, the same in every thread. A truncation uses the registers of the noise, which is then read again.
  template <class ReadNoise>
  __device__ __forceinline__ int pick(const Draw& d, ReadNoise&& read_noise) {
    const bool noisy = d.temperature > 0.f;
    if (noisy && d.tail_mass > 0.f) {
      truncate(d);
      read_noise();
    }
    uint32_t floor = 0;
    for (;;) {
      uint32_t score_key;
      const int index = winner(noisy, floor, score_key);
      const int above = count_if([&](int i, int j) { return key(i, j) > score_key; });
      if (above < d.top_k) return min(index, vocab - 1);
      floor = score_key;
    }
  }
};

}  // namespace qwen_tts
