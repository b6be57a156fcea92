// The residual rows, in fp32, spread over the registers of every CTA's warps; and their RMSNorm.
//
// RMSNorm is deferred: its weight is in the product that follows (weight_packing.py). That product runs on x, and its
// rows are scaled by 1 / rms(x) when they are finished, so nothing waits for the sum of squares.
#pragma once

#include "gemv.cuh"

namespace qwen_tts {

// The residual rows as this warp holds them: lane n * 4 + t has, of chunk c,
// values {2t, 2t + 1, 2t + 8, 2t + 9} of column n.
template <class D>
struct Residual {
  static constexpr int kChunks = Products<D>::Qkv::kChunks;
  float x[kChunks][4];

  static __device__ __forceinline__ bool real() { return Products<D>::Qkv::real(warp_index()); }
  // Where in a row this lane's first pair stands; the others at fixed distances from it.
  static __device__ __forceinline__ int first_k() { return warp_index() * kChunks * kChunk + 2 * (thread_index() & 3); }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[c][i] = 0.f;
  }
  __device__ __forceinline__ void add_bf16(const __nv_bfloat16* row) {
    row += first_k();
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(row + kChunk * c + 8 * half));
        const float2 pair = unpack_bf16(bits);
        x[c][2 * half] += pair.x;
        x[c][2 * half + 1] += pair.y;
      }
  }
  __device__ __forceinline__ void add_fp32(const float* row) {
    row += first_k();
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = __ldcg(reinterpret_cast<const float2*>(row + kChunk * c + 8 * half));
        x[c][2 * half] += pair.x;
        x[c][2 * half + 1] += pair.y;
      }
  }
  // Add what a product published, in its kSplit parts of k, all polled at once.
  template <int kSplit>
  __device__ __forceinline__ void add_deltas(const Context& c, const uint64_t* vectors, uint32_t tag) {
    if (!real()) return;
    TwoPackets v[kSplit][kChunks];
    wait_pairs(vectors + (warp_index() * kChunks * 32 + c.polled_lane()) * 2, vector_packets(PacketLayout::kHidden),
               tag, v, c.dog, Phase::kInput);
#pragma unroll
    for (int s = 0; s < kSplit; ++s)
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const float2 low = unpack_bf16(v[s][j].first()), high = unpack_bf16(v[s][j].second());
        x[j][0] += low.x;
        x[j][1] += low.y;
        x[j][2] += high.x;
        x[j][3] += high.y;
      }
  }
};

// This warp's part of the sums of squares for a norm, of the tile of columns that begins at `first`. Of the rounded
// rows, as the official model has it: the diagonal of what the tensor cores make of the tile and its transpose.
template <class Scratch, int kCount>
__device__ __forceinline__ void store_squares(Scratch& scratch, int norm, int first, const uint2 (&f)[kCount]) {
  float products[4] = {};  // of columns lane / 4 and 2 * (lane % 4), + 1
#pragma unroll
  for (int j = 0; j < kCount; ++j) mma(products, make_uint4(f[j].x, 0, f[j].y, 0), f[j]);
  const int column = lane_index() >> 2;
  if (column >> 1 == (lane_index() & 3))
    scratch.sum_of_squares[norm][warp_index()][first + column] = column & 1 ? products[1] : products[0];
}

// x as B operand of a norm's product, and the sum of squares for the norm. Norms that follow each other use
// different `squares`: a slow warp may still read the last one's.
template <class D>
__device__ __forceinline__ void normed_fragments(Context& c, const Residual<D>& r, int squares_at,
                                                 uint2 (&f)[Residual<D>::kChunks]) {
#pragma unroll
  for (int j = 0; j < Residual<D>::kChunks; ++j)
    f[j] = make_uint2(pack_bf16(r.x[j][0], r.x[j][1]), pack_bf16(r.x[j][2], r.x[j][3]));
  store_squares(c.scratch, squares_at, 0, f);
}

// 1 / rms of the column that a lane finishes rows of (Cell), for whole warps; from squares_part.
template <class D>
__device__ __forceinline__ float rms_scale(float squares) {
  squares += __shfl_xor_sync(~0u, squares, kTileColumns);
  squares += __shfl_xor_sync(~0u, squares, 2 * kTileColumns);
  return rsqrtf(squares * (1.f / D::kHidden) + D::kEps);
}

}  // namespace qwen_tts
