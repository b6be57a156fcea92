// The front of a ConvNeXt block: depthwise convolution, then LayerNorm over the channels.
#pragma once

#include "codec_rows.cuh"

namespace codec {

constexpr int kNormThreads = 128;

__device__ __forceinline__ float sum_over_block(float v, float* scratch) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < kNormThreads / 32; ++w) sum += scratch[w];
  return sum;
}

// grid (columns); shared: channels floats
extern "C" __global__ void __launch_bounds__(kNormThreads)
    codec_depthwise_norm(const __grid_constant__ DepthwiseNorm p) {
  extern __shared__ __align__(16) float values[];
  __shared__ float scratch[kNormThreads / 32];
  launch_dependents();
  prefetch(p.weights, p.taps * p.source.channels * 4);
  prefetch(p.bias, p.source.channels * 4);
  prefetch(p.norm_weight, p.source.channels * 4);
  prefetch(p.norm_bias, p.source.channels * 4);
  wait_for_previous();
  const int stream = blockIdx.x / p.source.rows, t = blockIdx.x % p.source.rows;
  const Call call = p.calls[stream];
  const int channels = p.source.channels, ring = p.source.frames * p.source.rows;
  const bf16* const in = static_cast<const bf16*>(p.source.data) + part_of(p.source, stream, call);
  int start = first_row(p.source, call) + t - (p.taps - 1);
  if (start < 0) start += ring;

  float sum = 0.f;
  for (int c = threadIdx.x * 8; c < channels; c += kNormThreads * 8) {
    float v[8];
    load8(p.bias + c, v);
#pragma unroll 7
    for (int tap = 0; tap < p.taps; ++tap) {
      float x[8], w[8];
      const int row = start + tap < ring ? start + tap : start + tap - ring;
      load8(in + row * channels + c, x);
      load8(p.weights + tap * channels + c, w);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = fmaf(w[j], x[j], v[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j];  // padded channels are zero
    store8(values + c, v);
  }
  const float mean = sum_over_block(sum, scratch) / p.real_channels;
  float squares = 0.f;
  for (int c = threadIdx.x * 8; c < channels; c += kNormThreads * 8)
    for (int j = 0; j < 8 && c + j < p.real_channels; ++j)
      squares = fmaf(values[c + j] - mean, values[c + j] - mean, squares);
  const float inverse = rsqrtf(sum_over_block(squares, scratch) / p.real_channels + p.eps);
  for (int c = threadIdx.x * 8; c < channels; c += kNormThreads * 8) {
    float v[8], w[8], b[8];
    load8(values + c, v);
    load8(p.norm_weight + c, w);
    load8(p.norm_bias + c, b);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = fmaf((v[j] - mean) * inverse, w[j], b[j]);
    store8(static_cast<bf16*>(p.out) + static_cast<int64_t>(blockIdx.x) * channels + c, v);
  }
}

}  // namespace codec
