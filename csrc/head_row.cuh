// One row of one attention head in a warp's registers: RMSNorm over head_dim, RoPE, dot products.
//
// Lane l < head_dim / 4 holds dims {2l, 2l + 1} and the two dims half a head further. So each lane has whole pairs for
// RoPE, and a packet has two neighbouring dims. All arithmetic is fp32.
#pragma once

#include "packets.cuh"

namespace qwen_tts {

// Sums several values over the warp. It interleaves the sums, because the steps of one sum wait for each other.
template <int kCount>
__device__ __forceinline__ void warp_sums(float (&x)[kCount]) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1)
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(~0u, x[i], offset);
}

// The sum over four neighbouring lanes. Each of them gets the result.
__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float max_of_four(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// What a row is normed and rotated by. It is fetched before the wait for the row.
template <int kDim>
struct NormRope {
  uint32_t weight[2];
  float4 angle;  // cosine, sine of two neighbouring pairs

  // weights: [head_dim]; rope: [head_dim / 2][2], for the row's position
  __device__ __forceinline__ NormRope(const __nv_bfloat16* weights, const float* rope) {
    const int at = lane_index() % (kDim / 4);
    weight[0] = __ldg(reinterpret_cast<const uint32_t*>(weights) + at);
    weight[1] = __ldg(reinterpret_cast<const uint32_t*>(weights) + kDim / 4 + at);
    angle = __ldg(reinterpret_cast<const float4*>(rope) + at);
  }
};

template <int kDim>
struct HeadRow {
  static_assert(kDim == 64 || kDim == 128, "head_dim is 64 or 128");
  static constexpr int kLanes = kDim / 4;
  float x[4];

  static __device__ __forceinline__ int lane() { return lane_index(); }
  static __device__ __forceinline__ bool owns() { return lane() < kLanes; }

  __device__ __forceinline__ void set(uint32_t low, uint32_t high) {
    const float2 a = unpack_bf16(low), b = unpack_bf16(high);
    x[0] = a.x;
    x[1] = a.y;
    x[2] = b.x;
    x[3] = b.y;
  }
  // Fetches the arguments of `set` from a row of bf16 in device memory.
  static __device__ __forceinline__ uint2 fetch(const __nv_bfloat16* row) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(row) + (owns() ? lane() : 0);
    const uint32_t low = __ldcg(words), high = __ldcg(words + kDim / 4);
    return make_uint2(owns() ? low : 0u, owns() ? high : 0u);
  }
  __device__ __forceinline__ void load(const __nv_bfloat16* row) {
    const uint2 bits = fetch(row);
    set(bits.x, bits.y);
  }
  __device__ __forceinline__ void load(const float* row) {
    const float2* pairs = reinterpret_cast<const float2*>(row) + (owns() ? lane() : 0);
    const float2 low = pairs[0], high = pairs[kDim / 4];
    x[0] = owns() ? low.x : 0.f;
    x[1] = owns() ? low.y : 0.f;
    x[2] = owns() ? high.x : 0.f;
    x[3] = owns() ? high.y : 0.f;
  }
  __device__ __forceinline__ void store(__nv_bfloat16* row) const {
    if (!owns()) return;
    uint32_t* words = reinterpret_cast<uint32_t*>(row) + lane();
    words[0] = pack_bf16(x[0], x[1]);
    words[kDim / 4] = pack_bf16(x[2], x[3]);
  }
  __device__ __forceinline__ void store(float* row) const {
    if (!owns()) return;
    reinterpret_cast<float2*>(row)[lane()] = make_float2(x[0], x[1]);
    reinterpret_cast<float2*>(row)[kDim / 4 + lane()] = make_float2(x[2], x[3]);
  }
  // Rounds to bf16, as a store to the cache and a load do.
  __device__ __forceinline__ void round() { set(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])); }
  __device__ __forceinline__ void norm_rope(const NormRope<kDim>& by, float eps) {
    float squares[1] = {dot(*this)};
    warp_sums(squares);
    const float2 wa = unpack_bf16(by.weight[0]), wb = unpack_bf16(by.weight[1]);
    const float scale = rsqrtf(squares[0] * (1.f / kDim) + eps);
    const float a = x[0] * scale * wa.x, b = x[1] * scale * wa.y;
    const float c = x[2] * scale * wb.x, d = x[3] * scale * wb.y;
    x[0] = a * by.angle.x - c * by.angle.y;
    x[1] = b * by.angle.z - d * by.angle.w;
    x[2] = c * by.angle.x + a * by.angle.y;
    x[3] = d * by.angle.z + b * by.angle.w;
  }
  // This lane's part of the dot product.
  __device__ __forceinline__ float dot(const HeadRow& other) const {
    return x[0] * other.x[0] + x[1] * other.x[1] + x[2] * other.x[2] + x[3] * other.x[3];
  }
};

// A lane's first packet of a published row. The row begins at row `first` of the vector, a multiple of kDim. The lane's
// second packet is half a row further. A distance of n rows is 4 n packets.
template <int kDim>
__device__ __forceinline__ const uint64_t* row_packets(const uint64_t* vector, int first, int column) {
  const int at = HeadRow<kDim>::owns() ? 2 * lane_index() : 0;
  return vector + kStripPackets / 16 * first + packet_index(at / 16, at % 16 / 2, column);
}

// Polls rows of a published vector. Row i begins at at(i).
template <int kDim, int kCount, class At>
__device__ __forceinline__ void wait_row_packets(HeadRow<kDim> (&rows)[kCount], At&& at, uint32_t tag,
                                                 const Watchdog& dog) {
  uint64_t v[kCount][2];
  for (unsigned spin = 0;; ++spin) {
    uint32_t lack = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) v[i][half] = load_word(at(i) + half * (4 * kDim / 2));
    dog.after(spin, Phase::kAttention, tag);
#pragma unroll
    for (int i = 0; i < kCount; ++i) lack |= (high_half(v[i][0]) ^ tag) | (high_half(v[i][1]) ^ tag);
    if (__all_sync(~0u, lack == 0)) break;
  }
  const bool owns = HeadRow<kDim>::owns();
#pragma unroll
  for (int i = 0; i < kCount; ++i) rows[i].set(owns ? uint32_t(v[i][0]) : 0u, owns ? uint32_t(v[i][1]) : 0u);
}

}  // namespace qwen_tts
