// What happens to a finished product: scale, bias, residual, activation, stores.
//
// The CTAs of a cluster hold the partial sums of their segments of k. Each takes its share of the
// tile, eight channels of one column at a time, and adds the segments in their order: the same bits
// for every batch.
#pragma once

#include "codec_rows.cuh"

namespace codec {

// x + strength * sin(frequency * x)^2. The square has period pi, so the argument is brought into
// [-pi/2, pi/2], where the fast sine is good to 2^-21.
__device__ __forceinline__ float snake(float x, float frequency, float strength) {
  const float angle = x * frequency;
  const float turns = rintf(angle * 0.318309886183790672f);
  const float reduced = fmaf(turns, 8.74227800e-8f, fmaf(turns, -3.14159274f, angle));
  const float wave = __sinf(reduced);
  return fmaf(wave * wave, strength, x);
}
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678f)); }
__device__ __forceinline__ float silu(float x) { return x / (1.f + expf(-x)); }

__device__ __forceinline__ void sum_segments(uint32_t address, int segments, float (&v)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = 0.f;
  for (int rank = 0; rank < segments; ++rank) {
    const uint32_t there = map_shared(address, rank);
    const float4 a = load_cluster(there), b = load_cluster(there + 16);
    v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w;
    v[4] += b.x, v[5] += b.y, v[6] += b.z, v[7] += b.w;
  }
}

// Rows m .. m + 7 of column n, all segments summed.
__device__ __forceinline__ void finish(const Gemm& p, int m, int n, float scale, float (&v)[8]) {
  const int stream = n / p.in.rows;
  const Call call = p.calls[stream];
  float w[8];
  if (p.mul) {
    load8(p.mul + m, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= w[j];
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] *= scale;
  if (p.add) {
    load8(p.add + m, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] += w[j];
  }
  if (p.activation == kGlu) {  // rows alternate: gate, up
    bf16* out = static_cast<bf16*>(p.out.data) + element(p.out, stream, call, n % p.in.rows) + m / 2;
    *reinterpret_cast<uint2*>(out) = make_uint2(pack(silu(v[0]) * v[1], silu(v[2]) * v[3]),
                                                pack(silu(v[4]) * v[5], silu(v[6]) * v[7]));
    return;
  }
  const int phase = m / p.out_channels, channel = m - phase * p.out_channels;
  const int t = (n - stream * p.in.rows) * p.upsample + phase;
  if (p.residual.data) {
    const int64_t at = element(p.residual, stream, call, t) + channel;
    if (p.residual_fp32)
      load8(static_cast<const float*>(p.residual.data) + at, w);
    else
      load8(static_cast<const bf16*>(p.residual.data) + at, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] += w[j];
  }
  if (p.raw.data) {
    const int64_t at = element(p.raw, stream, call, t) + channel;
    if (p.raw_fp32)
      store8(static_cast<float*>(p.raw.data) + at, v);
    else
      store8(static_cast<bf16*>(p.raw.data) + at, v);
  }
  if (p.squares_out) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(v[j], v[j], sum);
    p.squares_out[n * (p.out_channels / 8) + channel / 8] = sum;
  }
  if (!p.out.data) return;
  if (p.activation == kSnake) {
    float strength[8];
    load8(p.act_a + channel, w);
    load8(p.act_b + channel, strength);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = snake(v[j], w[j], strength[j]);
  } else if (p.activation == kGelu) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = gelu(v[j]);
  } else if (p.activation == kNormWeight) {
    load8(p.act_a + channel, w);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= w[j];
  }
  store8(static_cast<bf16*>(p.out.data) + element(p.out, stream, call, t) + channel, v);
}

// 1 / rms of column n, from the sums its producer left; one warp, the same order always.
__device__ __forceinline__ float inverse_rms(const Gemm& p, int n) {
  const int lane = threadIdx.x & 31;
  float sum = 0.f;
  for (int part = lane; part < p.square_parts; part += 32)
    sum += p.squares_in[n * p.square_parts + part];
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_xor_sync(~0u, sum, offset);
  return rsqrtf(sum * p.inverse_dim + p.eps);
}

}  // namespace codec
