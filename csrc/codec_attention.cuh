// One query per stream and head against the keys of the last `window` frames.
//
// Keys are kept before RoPE. Scores depend on distances only, so a key is turned back by its
// distance and the query not at all; no position grows with the stream. The new key and value come
// from `qkv`; the ring row they go to is the one that has just left the window, which nobody reads.
#pragma once

#include "codec_rows.cuh"

namespace codec {

constexpr int kAttentionThreads = 128;

// q . (key turned back by the angles of `rope`)
__device__ __forceinline__ float score(const float* q, const bf16* key, const float* rope, int half) {
  float sum = 0.f;
  for (int j = 0; j < half; j += 8) {
    float a[8], b[8], cs0[8], cs1[8];
    load8(key + j, a);
    load8(key + half + j, b);
    load8(rope + 2 * j, cs0);
    load8(rope + 2 * j + 8, cs1);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float c = e < 4 ? cs0[2 * e] : cs1[2 * e - 8], s = e < 4 ? cs0[2 * e + 1] : cs1[2 * e - 7];
      sum = fmaf(q[j + e], fmaf(a[e], c, b[e] * s), sum);
      sum = fmaf(q[half + j + e], fmaf(b[e], c, -a[e] * s), sum);
    }
  }
  return sum;
}

// grid (heads, streams); shared: head_dim + window + (threads / (head_dim / 8)) * head_dim floats
__global__ void __launch_bounds__(kAttentionThreads) attention_kernel(const __grid_constant__ Attention p) {
  extern __shared__ float q[];
  float* const scores = q + p.head_dim;
  float* const sums = scores + (p.window + 3 & ~3);
  let_next_start();
  wait_for_previous();
  const int head = blockIdx.x, stream = blockIdx.y, tid = threadIdx.x, dim = p.head_dim;
  const int group = p.heads / p.kv_heads, kv_head = head / group, kv_dim = p.kv_heads * dim;
  const Call call = p.calls[stream];
  const bf16* const qkv = static_cast<const bf16*>(p.qkv) + stream * (p.heads * dim + 2 * kv_dim);
  bf16* const ring = static_cast<bf16*>(p.kv.data) + part_of(p.kv, stream, call) + kv_head * dim;
  const bf16* const fresh = qkv + p.heads * dim + kv_head * dim;
  const int lived = min(call.age + 1, p.window), here = call.age % p.window;
  const auto row = [&](int distance) -> const bf16* {
    const int at = here - distance;
    return distance ? ring + (at < 0 ? at + p.window : at) * p.kv.channels : fresh;
  };

  for (int d = tid; d < dim; d += kAttentionThreads)
    q[d] = __bfloat162float(qkv[head * dim + d]) * p.scale;
  __syncthreads();
  for (int distance = tid; distance < lived; distance += kAttentionThreads)
    scores[distance] = score(q, row(distance), p.rope + distance * dim, dim / 2);
  if (head % group == 0 && tid < dim / 4) {  // keys then values, 16 bytes each
    const int part = tid % (dim / 8) * 8 + tid / (dim / 8) * kv_dim;
    *reinterpret_cast<uint4*>(ring + here * p.kv.channels + part) =
        *reinterpret_cast<const uint4*>(fresh + part);
  }
  __syncthreads();

  float largest = -INFINITY, total = 0.f;
  for (int d = tid & 31; d < lived; d += 32) largest = fmaxf(largest, scores[d]);
#pragma unroll
  for (int o = 16; o; o >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
  for (int d = tid & 31; d < lived; d += 32) total += expf(scores[d] - largest);
#pragma unroll
  for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o);

  const int pieces = dim / 8, teams = kAttentionThreads / pieces, team = tid / pieces;
  const int piece = tid % pieces;
  if (team < teams) {
    float acc[8] = {};
#pragma unroll 5
    for (int d = team; d < lived; d += teams) {
      float v[8];
      load8(row(d) + kv_dim + piece * 8, v);
      const float weight = expf(scores[d] - largest);
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[e] = fmaf(weight, v[e], acc[e]);
    }
    store8(sums + team * dim + piece * 8, acc);
  }
  __syncthreads();
  for (int d = tid; d < dim; d += kAttentionThreads) {
    float sum = 0.f;
    for (int t = 0; t < teams; ++t) sum += sums[t * dim + d];
    static_cast<bf16*>(p.out)[(stream * p.heads + head) * dim + d] = __float2bfloat16(sum / total);
  }
}

}  // namespace codec
