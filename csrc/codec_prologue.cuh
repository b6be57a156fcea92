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

}  // namespace codec
