// One query per stream and head against the keys of the last `window` frames.
//
// Keys are stored before RoPE. Scores depend on distances only, so the kernel rotates a key back by its distance and
// does not rotate the query. No position grows with the stream. The new key and value come from `qkv`. They go to the
// ring row that has just left the window, which no CTA reads.
#pragma once

#include "codec_rows.cuh"

namespace codec {

constexpr int kAttentionThreads = 128;

constexpr int kHeld = 5;  // values a thread fetches before it knows their weights

// The part of a score that comes from one piece of each half of a key and the same pieces of the query. `rope` rotates
// the key back.
__device__ __forceinline__ float score_piece(const float* q, const bf16* key, const float* rope, int half) {
  float a[8], b[8], turn[8], sum = 0.f;
  load8(key, a);
  load8(key + half, b);
#pragma unroll
  for (int e = 0; e < 8; e += 4) {
    load8(rope + 2 * e, turn);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float c = turn[2 * i], s = turn[2 * i + 1], x = a[e + i], y = b[e + i];
      sum = fmaf(q[e + i], fmaf(x, c, y * s), sum);
      sum = fmaf(q[half + e + i], fmaf(y, c, -x * s), sum);
    }
  }
  return sum;
}

// Sums each score over its pieces, replaces the scores by their exponentials and returns the sum of these. Every warp
// computes its own copy, in the same order.
__device__ __forceinline__ float softmax(float* scores, const float* parts, int pieces, int lived, int window) {
  float largest = -INFINITY, total = 0.f;
  const int lane = threadIdx.x & 31;
  for (int d = lane; d < lived; d += 32) {
    float sum = 0.f;
    for (int piece = 0; piece < pieces; ++piece) sum += parts[piece * window + d];
    largest = fmaxf(largest, sum);
    scores[d] = sum;
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, o));
  for (int d = lane; d < lived; d += 32) {
    scores[d] = expf(scores[d] - largest);
    total += scores[d];
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o);
  return total;
}

// Floats of shared memory that a CTA needs: the query, the pieces of the scores, the softmax of every warp, the sums.
// grid (heads, streams)
extern "C" __global__ void __launch_bounds__(kAttentionThreads) codec_attention(const __grid_constant__ Attention p) {
  extern __shared__ __align__(16) float sums[];
  launch_dependents();
  const int head = blockIdx.x, stream = blockIdx.y, tid = threadIdx.x, dim = p.head_dim;
  const int group = p.heads / p.kv_heads, kv_head = head / group, kv_dim = p.kv_heads * dim;
  float* const q = sums + kAttentionThreads * 8;
  float* const parts = q + dim;
  float* const scores = parts + (dim / 16 + tid / 32) * p.window;
  wait_for_previous();
  const Call call = p.calls[stream];
  const bf16* const qkv = static_cast<const bf16*>(p.qkv) + stream * (p.heads * dim + 2 * kv_dim);
  bf16* const ring = static_cast<bf16*>(p.kv.data) + part_of(p.kv, stream, call) + kv_head * dim;
  const bf16* const fresh = qkv + p.heads * dim + kv_head * dim;
  const int lived = min(call.age + 1, p.window), here = call.age % p.window;
  const auto row = [&](int distance) -> const bf16* {
    const int at = here - distance;
    return distance ? ring + (at < 0 ? at + p.window : at) * p.kv.channels : fresh;
  };
  // A team of threads shares a row. Each thread has one piece.
  const int pieces = dim / 8, teams = kAttentionThreads / pieces, team = tid / pieces;
  const int piece = tid % pieces, last = team < teams ? lived : 0;
  uint4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (team + i * teams < last) held[i] = *reinterpret_cast<const uint4*>(row(team + i * teams) + kv_dim + piece * 8);

  for (int d = tid; d < dim; d += kAttentionThreads) q[d] = __bfloat162float(qkv[head * dim + d]) * p.scale;
  __syncthreads();
  const int key_pieces = dim / 16, key_piece = tid % key_pieces;
  const int at_once = kAttentionThreads / key_pieces;
#pragma unroll 3
  for (int d = tid / key_pieces; d < lived && tid < at_once * key_pieces; d += at_once)
    parts[key_piece * p.window + d] =
        score_piece(q + key_piece * 8, row(d) + key_piece * 8, p.rope + d * dim + key_piece * 16, dim / 2);
  if (head % group == 0 && tid < dim / 4) {  // stores the new key, then the new value, 16 bytes a thread
    const int part = tid % pieces * 8 + tid / pieces * kv_dim;
    *reinterpret_cast<uint4*>(ring + here * p.kv.channels + part) = *reinterpret_cast<const uint4*>(fresh + part);
  }
  __syncthreads();
  const float total = softmax(scores, parts, key_pieces, lived, p.window);
  __syncwarp();

  float acc[8] = {}, v[8];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int d = team + i * teams;
    if (d >= last) break;
    unpack(held[i], v);
#pragma unroll
    for (int e = 0; e < 8; ++e) acc[e] = fmaf(scores[d], v[e], acc[e]);
  }
  for (int d = team + kHeld * teams; d < last; d += teams) {
    load8(row(d) + kv_dim + piece * 8, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) acc[e] = fmaf(scores[d], v[e], acc[e]);
  }
  if (team < teams) store8(sums + team * dim + piece * 8, acc);
  __syncthreads();
  for (int d = tid; d < dim; d += kAttentionThreads) {
    float sum = 0.f;
    for (int t = 0; t < teams; ++t) sum += sums[t * dim + d];
    static_cast<bf16*>(p.out)[(stream * p.heads + head) * dim + d] = __float2bfloat16(sum / total);
  }
}

}  // namespace codec
