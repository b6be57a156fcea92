// A lower bound for the time of a frame: a kernel that only reads the frame's bytes, once and in order. The bench
// (bench/frame_kernel.py) compares a frame with it on the same GPU.
#include "facts.cuh"
#include "standard.h"

namespace {

constexpr int kThreads = 512;
constexpr int kCtasPerSm = 2;
constexpr int kUnroll = 8;  // 16-byte loads that a thread has in flight

}  // namespace

// Reads `count` times 16 bytes of device memory. `out` takes a word that says nothing.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm)
    read_kernel(const uint4* from, int64_t count, uint32_t* out) {
  uint32_t bits = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads * kUnroll;
  for (int64_t first = int64_t(blockIdx.x) * kThreads * kUnroll + threadIdx.x; first < count; first += step) {
    uint4 v[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = first + i * kThreads;
      v[i] = at < count ? __ldcs(from + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) bits |= v[i].x | v[i].y | v[i].z | v[i].w;
  }
  if (bits != 0) *out = bits;  // without this the compiler would drop the loads
}

QWEN_TTS_FACT(threads, kThreads);
QWEN_TTS_FACT(ctas_per_sm, kCtasPerSm);
