// The residual rows and their RMSNorm. Every CTA holds the rows in fp32, spread over the registers of its warps.
//
// RMSNorm is deferred. Its weight is folded into the next product (weight_packing.py). That product runs on x, and its
// finished rows are scaled by 1 / rms(x). So no product waits for the sum of squares.
#pragma once

#include "gemv.cuh"

namespace qwen_tts {

// The part of the residual rows that this warp holds. Lane n * 4 + t has values {2t, 2t + 1, 2t + 8, 2t + 9} of each
// chunk of column n.
template <class D>
struct Residual {
  static constexpr int kChunks = Products<D>::Qkv::kChunks;
  float x[kChunks][4];

  static __device__ __forceinline__ bool real() { return Products<D>::Qkv::real(warp_index()); }
  // The index of this lane's first value in a row. Its other values are at fixed distances from it.
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
  // Adds the rows that a product published in kSplit parts of k. All parts are polled together.
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

// Stores this warp's part of a norm's sums of squares, for the tile of columns that begins at `first`. The rows are
// rounded first, as in the official model. The tensor cores multiply the tile by its transpose, and the sums are the
// diagonal of the result.
template <class Scratch, int kCount>
__device__ __forceinline__ void store_squares(Scratch& scratch, int norm, int first, const uint2 (&f)[kCount]) {
  float products[4] = {};  // of columns lane / 4 and 2 * (lane % 4), + 1
#pragma unroll
  for (int j = 0; j < kCount; ++j) mma(products, make_uint4(f[j].x, 0, f[j].y, 0), f[j]);
  const int column = lane_index() >> 2;
  if (column >> 1 == (lane_index() & 3))
    scratch.sum_of_squares[norm][warp_index()][first + column] = column & 1 ? products[1] : products[0];
}

// Makes the B operand of the product after a norm from x, and stores the sum of squares for the norm. Consecutive norms
// use different `squares_at`, because a slow warp may still read the sums of the previous norm.
template <class D>
__device__ __forceinline__ void normed_fragments(Context& c, const Residual<D>& r, int squares_at,
                                                 uint2 (&f)[Residual<D>::kChunks]) {
#pragma unroll
  for (int j = 0; j < Residual<D>::kChunks; ++j)
    f[j] = make_uint2(pack_bf16(r.x[j][0], r.x[j][1]), pack_bf16(r.x[j][2], r.x[j][3]));
  store_squares(c.scratch, squares_at, 0, f);
}

// 1 / rms of column lane % 8. `squares` is the result of squares_part. Whole warps call it.
template <class D>
__device__ __forceinline__ float rms_scale(float squares) {
  squares += __shfl_xor_sync(~0u, squares, kTileColumns);
  squares += __shfl_xor_sync(~0u, squares, 2 * kTileColumns);
  return rsqrtf(squares * (1.f / D::kHidden) + D::kEps);
}

// The same for the two columns of a lane's quad.
template <class D>
__device__ __forceinline__ float2 quad_scale(float squares) {
  const float scale = rms_scale<D>(squares);
  return make_float2(__shfl_sync(~0u, scale, quad_column()), __shfl_sync(~0u, scale, quad_column() + 1));
}

}  // namespace qwen_tts
