// A kernel that only reads a frame's bytes, once and in order. Its time is a lower bound for the time of a frame on the
// same GPU. The bench (bench/frame_kernel.py) compares a frame with it.
#include <cstdint>

#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 512;
constexpr int kCtasPerSm = 2;
constexpr int kUnroll = 8;  // 16-byte loads that a thread has in flight

__global__ void __launch_bounds__(kThreads, kCtasPerSm) read_kernel(const uint4* from, int64_t count, uint32_t* out) {
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

}  // namespace

// Reads `bytes` bytes, a multiple of 16, from device memory. `out` gets a word without meaning. Returns a cudaError_t.
extern "C" int read_floor(const void* from, int64_t bytes, uint32_t* out, int sms, cudaStream_t stream) {
  read_kernel<<<sms * kCtasPerSm, kThreads, 0, stream>>>(static_cast<const uint4*>(from), bytes / 16, out);
  return int(cudaGetLastError());
}
