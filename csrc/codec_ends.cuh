// The two ends of the codec: from codes to the first vectors, and the last convolution, which makes samples.
#pragma once

#include "codec_rows.cuh"

namespace codec {

constexpr int kEndThreads = 128;
constexpr int kCodebooks = 16;

// grid (streams). Only this kernel counts the age of a slot. Later launches read `calls`.
extern "C" __global__ void __launch_bounds__(kEndThreads) codec_embed(const __grid_constant__ Embed p) {
  launch_dependents();
  wait_for_previous();
  const int* const input = p.input + blockIdx.x * (kCodebooks + 1);
  const int slot = input[0], age = p.frame_counts[slot];
  const Call call{slot, age};
  for (int c = threadIdx.x * 4; c < p.out.channels; c += kEndThreads * 4) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int k = 0; k < kCodebooks; ++k) {
      // The host checks codes that it passes. A wrong code from a kernel must not read outside the table.
      const int code = min(max(input[1 + k], 0), p.codebook_size - 1);
      const float4 row = *reinterpret_cast<const float4*>(
          p.table + (static_cast<int64_t>(k) * p.codebook_size + code) * p.out.channels + c);
      sum.x += row.x, sum.y += row.y, sum.z += row.z, sum.w += row.w;
    }
    bf16* const out = static_cast<bf16*>(p.out.data) + element(p.out, blockIdx.x, call, 0);
    *reinterpret_cast<uint2*>(out + c) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
  }
  __syncthreads();  // all threads have read the age
  if (threadIdx.x == 0) {
    p.frame_counts[slot] = age + 1;
    p.calls[blockIdx.x] = call;
  }
}

constexpr int kLastTaps = 7;
constexpr int kRun = 8, kRuns = 8;  // samples of a thread, runs of a CTA
constexpr int kSamples = kRun * kRuns;

// Adds the part of eight channels to a run of samples. Each row is fetched once, and all rows together.
__device__ __forceinline__ void convolve_run(const LastConv& p, const bf16* in, int first, int ring, int channel,
                                             float (&sums)[kRun]) {
  float weights[kLastTaps][8];
  uint4 rows[kRun + kLastTaps - 1];
#pragma unroll
  for (int tap = 0; tap < kLastTaps; ++tap) load8(p.weights + tap * p.source.channels + channel, weights[tap]);
#pragma unroll
  for (int r = 0; r < kRun + kLastTaps - 1; ++r) {
    const int row = first + r < ring ? first + r : first + r - ring;
    rows[r] = *reinterpret_cast<const uint4*>(in + row * p.source.channels + channel);
  }
#pragma unroll
  for (int r = 0; r < kRun + kLastTaps - 1; ++r) {
    float x[8];
    unpack(rows[r], x);
#pragma unroll
    for (int s = max(0, r - kLastTaps + 1); s <= min(r, kRun - 1); ++s)
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[s] = fmaf(weights[r - s][j], x[j], sums[s]);
  }
}

// grid (rows / samples, streams)
extern "C" __global__ void __launch_bounds__(kEndThreads) codec_last_conv(const __grid_constant__ LastConv p) {
  constexpr int kPieces = kEndThreads / kRuns;  // at a time
  __shared__ float parts[kPieces][kSamples];
  launch_dependents();
  prefetch(p.weights, kLastTaps * p.source.channels * 4);
  wait_for_previous();
  const int stream = blockIdx.y, run = threadIdx.x % kRuns, piece = threadIdx.x / kRuns;
  const Call call = p.calls[stream];
  const int ring = p.source.frames * p.source.rows;
  const bf16* const in = static_cast<const bf16*>(p.source.data) + part_of(p.source, stream, call);
  const int t = blockIdx.x * kSamples + run * kRun;
  int first = first_row(p.source, call) + t - (kLastTaps - 1);
  if (first < 0) first += ring;
  if (first >= ring) first -= ring;
  float sums[kRun] = {};
  for (int c = piece * 8; c < p.source.channels; c += kPieces * 8) convolve_run(p, in, first, ring, c, sums);
#pragma unroll
  for (int s = 0; s < kRun; ++s) parts[piece][run * kRun + s] = sums[s];
  __syncthreads();
  const int sample = blockIdx.x * kSamples + threadIdx.x;
  if (threadIdx.x >= kSamples || sample >= p.source.rows) return;
  float sum = p.bias;
  for (int i = 0; i < kPieces; ++i) sum += parts[i][threadIdx.x];
  p.pcm[static_cast<int64_t>(stream) * p.source.rows + sample] = fminf(fmaxf(sum, -1.f), 1.f);
}

}  // namespace codec
