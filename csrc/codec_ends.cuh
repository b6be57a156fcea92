// The two ends: codes to the first vectors, and the last convolution to samples.
#pragma once

#include "codec_rows.cuh"

namespace codec {

constexpr int kEndThreads = 128;
constexpr int kCodebooks = 16;

// grid (streams). The slot's age is counted here and nowhere else: later launches read `calls`.
__global__ void __launch_bounds__(kEndThreads) embed_kernel(const __grid_constant__ Embed p) {
  let_next_start();
  wait_for_previous();
  const int* const input = p.input + blockIdx.x * (kCodebooks + 1);
  const int slot = input[0], age = p.ages[slot];
  const Call call{slot, age};
  __syncthreads();  // all have read the age
  if (threadIdx.x == 0) {
    p.ages[slot] = age + 1;
    p.calls[blockIdx.x] = call;
  }
  bf16* const out = static_cast<bf16*>(p.out.data) + element(p.out, blockIdx.x, call, 0);
  for (int c = threadIdx.x * 4; c < p.out.channels; c += kEndThreads * 4) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int k = 0; k < kCodebooks; ++k) {
      // The host checks the codes; a wrong one from a kernel must not read elsewhere.
      const int code = min(max(input[1 + k], 0), p.codebook_size - 1);
      const float4 row = *reinterpret_cast<const float4*>(
          p.table + (static_cast<int64_t>(k) * p.codebook_size + code) * p.out.channels + c);
      sum.x += row.x, sum.y += row.y, sum.z += row.z, sum.w += row.w;
    }
    *reinterpret_cast<uint2*>(out + c) = make_uint2(pack(sum.x, sum.y), pack(sum.z, sum.w));
  }
}

constexpr int kLanesPerSample = 4;

// grid (rows / (threads / lanes), streams)
__global__ void __launch_bounds__(kEndThreads) last_conv_kernel(const __grid_constant__ LastConv p) {
  let_next_start();
  prefetch(p.weights, p.taps * p.in.channels * 4);
  wait_for_previous();
  const int stream = blockIdx.y, lane = threadIdx.x % kLanesPerSample;
  const int t = blockIdx.x * (kEndThreads / kLanesPerSample) + threadIdx.x / kLanesPerSample;
  const Call call = p.calls[stream];
  const int channels = p.in.channels, ring = p.in.frames * p.in.rows;
  const bf16* const in = static_cast<const bf16*>(p.in.data) + part_of(p.in, stream, call);
  int start = first_row(p.in, call) + min(t, p.in.rows - 1) - (p.taps - 1);
  if (start < 0) start += ring;
  float sum = 0.f;
  for (int tap = 0; tap < p.taps; ++tap) {
    const int row = start + tap < ring ? start + tap : start + tap - ring;
#pragma unroll 3
    for (int c = lane * 8; c < channels; c += kLanesPerSample * 8) {
      float x[8], w[8];
      load8(in + row * channels + c, x);
      load8(p.weights + tap * channels + c, w);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum = fmaf(w[j], x[j], sum);
    }
  }
#pragma unroll
  for (int o = kLanesPerSample / 2; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (lane == 0 && t < p.in.rows)
    p.pcm[static_cast<int64_t>(stream) * p.in.rows + t] = fminf(fmaxf(sum + p.bias, -1.f), 1.f);
}

}  // namespace codec
