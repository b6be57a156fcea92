// What a kernel of the codec does before the previous one has ended.
//
// Every kernel lets the next one start at once. Before it touches anything that an earlier kernel writes or reads, it
// waits for the earlier ones. Until then it may fetch weights.
#pragma once

#include "ptx.cuh"

namespace codec {

using namespace ptx;

// Brings constants to L2. All threads of the block call it together.
__device__ __forceinline__ void prefetch(const void* data, int bytes) {
  const char* const from = static_cast<const char*>(data);
  for (int at = threadIdx.x * 128; at < bytes; at += blockDim.x * 128) prefetch_l2(from + at);
}

// The copy of the weights of a pipeline's stage. The stage's barrier counts kStageArrivals. On Hopper one thread starts
// the copy engine, before the previous kernel has ended. On older GPUs all threads of the block copy together.
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
// Whether this thread takes part in the copy.
__device__ __forceinline__ bool copies_stages() { return !kHopper || threadIdx.x == 0; }

}  // namespace codec
