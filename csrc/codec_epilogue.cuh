// The epilogue of a product: scale, bias, residual, activation, stores.
//
// The CTAs of a cluster hold the partial sums of their segments of k. Each CTA finishes its share of the tile, eight
// channels of one column at a time. It adds the segments in their order, so the bits are the same for every batch. On
// GPUs without clusters, codec_segments.cuh has added the segments before.
#pragma once

#include "codec_rows.cuh"

namespace codec {

// x + strength * sin(frequency * x)^2. The square has period pi, so the argument is reduced to [-pi/2, pi/2]. There the
// error of the fast sine is at most 2^-21.
__device__ __forceinline__ float snake(float x, float frequency, float strength) {
  const float angle = x * frequency;
  const float turns = rintf(angle * 0.318309886183790672f);
  const float reduced = fmaf(turns, 8.74227800e-8f, fmaf(turns, -3.14159274f, angle));
  const float wave = __sinf(reduced);
  return fmaf(wave * wave, strength, x);
}
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

// Loads four rows of a segment from this CTA's shared memory or, if the GPU has clusters, from that of CTA `rank` of
// the cluster.
template <int kSegments>
__device__ __forceinline__ float4 load_segment(uint32_t address, int rank, int offset) {
  if constexpr (kHopper) {
    return load_cluster((kSegments > 1 ? map_to_rank(address, rank) : address) + offset);
  } else {
    return load_shared_floats(address + offset);
  }
}

// Starts all loads of four rows before it adds: a load from another CTA takes hundreds of cycles.
template <int kSegments>
__device__ __forceinline__ void sum_segments(uint32_t address, float (&v)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float4 parts[kSegments];
#pragma unroll
    for (int rank = 0; rank < kSegments; ++rank) parts[rank] = load_segment<kSegments>(address, rank, 16 * half);
    float4 sum = parts[0];
#pragma unroll
    for (int rank = 1; rank < kSegments; ++rank)
      sum.x += parts[rank].x, sum.y += parts[rank].y, sum.z += parts[rank].z, sum.w += parts[rank].w;
    v[4 * half] = sum.x, v[4 * half + 1] = sum.y, v[4 * half + 2] = sum.z, v[4 * half + 3] = sum.w;
  }
}
__device__ __forceinline__ void sum_segments(int segments, uint32_t address, float (&v)[8]) {
  if constexpr (!kHopper) return sum_segments<1>(address, v);
  switch (segments) {
    case 1:
      return sum_segments<1>(address, v);
    case 2:
      return sum_segments<2>(address, v);
    case 4:
      return sum_segments<4>(address, v);
    default:
      return sum_segments<8>(address, v);
  }
}

// The scale, bias and activation parameters of eight rows. A thread has the same rows throughout a tile.
struct Vectors {
  float mul[8], add[8], act_a[8], act_b[8];
  int phase, channel;

  __device__ __forceinline__ void load(const Gemm& p, int m) {
    phase = m / p.out_channels, channel = m - phase * p.out_channels;
    if (p.mul) load8(p.mul + m, mul);
    if (p.add) load8(p.add + m, add);
    if (p.act_a) load8(p.act_a + channel, act_a);
    if (p.act_b) load8(p.act_b + channel, act_b);
  }
};

// Where a column's values go, and the residual that is added to them. It is fetched before the sums.
struct Destination {
  Call call;
  int n, stream, t;
  float residual[8];

  __device__ __forceinline__ void load(const Gemm& p, const Vectors& w, int column) {
    n = column, stream = n / p.source.rows;
    t = (n - stream * p.source.rows) * p.upsample + w.phase;
    call = p.out.by_slot || p.residual.by_slot ? p.calls[stream] : Call{stream, 0};
    if (!p.residual.data) return;
    const int64_t at = element(p.residual, stream, call, t) + w.channel;
    if (p.residual_fp32)
      load8(static_cast<const float*>(p.residual.data) + at, residual);
    else
      load8(static_cast<const bf16*>(p.residual.data) + at, residual);
  }
};

__device__ __forceinline__ void activate(int activation, const Vectors& w, float (&v)[8]) {
  if (activation == kSnake) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = snake(v[j], w.act_a[j], w.act_b[j]);
  } else if (activation == kGelu) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = gelu(v[j]);
  } else if (activation == kNormWeight) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= w.act_a[j];
  }
}

// Finishes eight rows of one column, whose segments have been summed.
__device__ __forceinline__ void finish(const Gemm& p, const Vectors& w, const Destination& to, float scale,
                                       float (&v)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (p.mul) v[j] *= w.mul[j];
    v[j] *= scale;
    if (p.add) v[j] += w.add[j];
  }
  if (p.activation == kGlu) {  // gate rows and up rows alternate
    bf16* out = static_cast<bf16*>(p.out.data) + element(p.out, to.stream, to.call, to.t) + w.channel / 2;
    *reinterpret_cast<uint2*>(out) =
        make_uint2(pack_bf16(silu(v[0]) * v[1], silu(v[2]) * v[3]), pack_bf16(silu(v[4]) * v[5], silu(v[6]) * v[7]));
    return;
  }
  if (p.residual.data) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] += to.residual[j];
  }
  if (p.raw.data) {
    const int64_t at = element(p.raw, to.stream, to.call, to.t) + w.channel;
    if (p.raw_fp32)
      store8(static_cast<float*>(p.raw.data) + at, v);
    else
      store8(static_cast<bf16*>(p.raw.data) + at, v);
  }
  if (p.squares_out) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(v[j], v[j], sum);
    p.squares_out[to.n * (p.out_channels / 8) + w.channel / 8] = sum;
  }
  if (!p.out.data) return;
  activate(p.activation, w, v);
  store8(static_cast<bf16*>(p.out.data) + element(p.out, to.stream, to.call, to.t) + w.channel, v);
}

// 1 / rms of column n, from the sums of squares that the column's producer stored. One warp adds them, always in the
// same order.
__device__ __forceinline__ float inverse_rms(const Gemm& p, int n) {
  const int lane = threadIdx.x & 31;
  float sum = 0.f;
  for (int part = lane; part < p.square_parts; part += 32) sum += p.squares_in[n * p.square_parts + part];
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
  return rsqrtf(sum * p.inverse_dim + p.eps);
}

}  // namespace codec
