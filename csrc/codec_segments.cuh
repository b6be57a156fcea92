// Adds the segments of k of a product on GPUs without clusters, where CTAs cannot read each other's shared memory.
//
// Each CTA of a tile stores its sums in device memory. The last one adds all segments in their order, as a cluster
// does, so the bits are the same. No CTA waits for another.
#pragma once

#include "codec_rows.cuh"

namespace codec {

// A product, and the memory through which its CTAs exchange sums. `arrived` is all zeros before and after a launch.
struct SegmentedGemm : Gemm {
  float* partial;  // [tile of columns][tile of rows][segment][column][row]
  int* arrived;    // [tile of columns][tile of rows]
};
using GemmLaunch = Conditional<kHopper, Gemm, SegmentedGemm>::Type;

// Returns whether this CTA is the last of its tile. Only then does `tile`, in shared memory, have the sums of all
// segments.
template <class T>
__device__ __forceinline__ bool join_segments(const SegmentedGemm& p, float* tile, int m_tile, int rank) {
  constexpr int kQuads = T::kN * T::kPitch / 4;
  __shared__ bool is_last;
  const int at = blockIdx.y * (gridDim.x / p.segments) + m_tile;
  float4* const quads = reinterpret_cast<float4*>(tile);
  float4* const partial = reinterpret_cast<float4*>(p.partial) + int64_t(at) * p.segments * kQuads;
  for (int i = threadIdx.x; i < kQuads; i += T::kThreads) __stcg(partial + rank * kQuads + i, quads[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(p.arrived + at, 1) == p.segments - 1;
    if (is_last) p.arrived[at] = 0;  // for the next launch
  }
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  for (int i = threadIdx.x; i < kQuads; i += T::kThreads) {
    float4 sum = __ldcg(partial + i);
    for (int segment = 1; segment < p.segments; ++segment) {
      const float4 part = __ldcg(partial + segment * kQuads + i);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    quads[i] = sum;
  }
  __syncthreads();
  return true;
}

}  // namespace codec
