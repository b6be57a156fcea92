// What a kernel of the codec may do before the one ahead of it has ended.
//
// Every kernel lets the next one start at once and waits before it touches anything that an
// earlier one writes or reads; until then it may fetch weights.
#pragma once

#include "ptx.cuh"

namespace codec {

using namespace ptx;

// Bring constants to L2; all threads of the block together.
__device__ __forceinline__ void prefetch(const void* data, int bytes) {
  const char* const from = static_cast<const char*>(data);
  for (int at = threadIdx.x * 128; at < bytes; at += blockDim.x * 128) prefetch_l2(from + at);
}

// Weights of a pipeline's stage, whose barrier counts kStageArrivals. On Hopper one thread tells the copy engine, ahead
// of the previous kernel's end; before, all threads of the block copy together.
template <int kThreads>
constexpr int kStageArrivals = kHopper ? 1 : kThreads;
__device__ __forceinline__ void expect_stage(uint32_t barrier, int bytes) {
  if constexpr (kHopper) mbarrier_expect_tx(barrier, bytes);
}
template <int kThreads>
__device__ __forceinline__ void copy_stage(uint32_t to, const char* from, int bytes, uint32_t barrier) {
  if constexpr (kHopper) {
    bulk_copy(to, from, bytes, barrier);
  } else {
    for (int at = threadIdx.x * 16; at < bytes; at += kThreads * 16) cp_async(to + at, from + at, true);
    cp_async_arrive(barrier);
  }
}
// Whether this thread takes part in it.
__device__ __forceinline__ bool copies_stages() { return !kHopper || threadIdx.x == 0; }

}  // namespace codec
