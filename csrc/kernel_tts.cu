// One frame of Qwen3-TTS for 1 to 8 streams: the table of contents, the only kernel, its launch.
//
//   frame_schedule.cuh   the order of a frame's exchanges, which all below follow
//   frame_compute.cuh    what computing warps do at each step:  layer.cuh  attention.cuh  predictor_attention.cuh
//                        talker.cuh (rows fed, head, draw)  predictor.cuh (what the predictor is fed)  sampling.cuh
//   frame_fetch.cuh      what the fetching warp does at each step:  ring.cuh
//   gemv.cuh             a product on the tensor cores;  products.cuh (how it is cut)  residual.cuh (what it reads)
//   packets.cuh          how CTAs wait for each other
//   shared_memory.cuh    what a CTA keeps;  context.cuh  what a warp keeps
//
// One persistent CTA per SM, launched cooperatively. Nothing returns to the host inside a frame, and there is no grid
// barrier. The sum of a frame's 16 embeddings is left for the next frame, which adds its text row. A prefill is the
// talker's layers alone, over up to eight rows of one stream.
#include "frame_compute.cuh"
#include "frame_fetch.cuh"
#include "kernel_tts.h"

namespace qwen_tts {

struct Shared {
  FrameRing ring;
  // A copy, for registers' sake: what is read from here is not kept over a wait, while addresses
  // computed from the kernel's constants would be, and be spilled.
  FrameParams params;
  Scratch scratch;
};
static_assert(sizeof(Shared) <= kSharedBytes, "more shared memory than the GPU has");
static_assert(offsetof(Shared, ring.data) == 0, "tiles are aligned as the memory is");

// Four warps beside those that compute, though one fetches: registers are given to warps by fours,
// and four can hand theirs over.
constexpr int kAllThreads = kThreads + 128;

__global__ void __launch_bounds__(kAllThreads, 1) frame_kernel(const __grid_constant__ FrameParams p) {
  Shared& sh = *reinterpret_cast<Shared*>(shared_memory());
  if (block_index() == p.withheld_cta) return;
  sh.ring.init();
  static_assert(sizeof(FrameParams) % 4 == 0 && sizeof(FrameParams) / 4 <= kThreads, "a word a thread");
  if (threadIdx.x < sizeof(FrameParams) / 4)
    reinterpret_cast<uint32_t*>(&sh.params)[threadIdx.x] = reinterpret_cast<const uint32_t*>(&p)[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < kThreads) list_items<T>(sh.params, sh.scratch);
  __syncthreads();
  if (threadIdx.x < kThreads) {
    take_registers<112>();
    compute_frame(sh.params, sh.scratch, sh.ring);
  } else {
    give_registers<32>();
    if (threadIdx.x < kThreads + 32) fetch_frame(p, sh.ring, sh.scratch.items);
  }
}

}  // namespace qwen_tts

using namespace qwen_tts;

extern "C" int frame_max_grid() {
  return min_of(min_of(min_of(TalkerProducts::Qkv::kStrips, PredictorProducts::Qkv::kStrips),
                       min_of(TalkerProducts::GateUp::kStrips, PredictorProducts::GateUp::kStrips)),
                TalkerProducts::Head::kStrips);
}

extern "C" int frame_max_positions(int grid) {
  return kSplitPositions * min_of(kMaxSplits, grid * (kMaxItems - 1) / (kMaxColumns * T::kKvHeads));
}

extern "C" int64_t frame_num_packets() { return PacketLayout::kTotal; }

extern "C" int frame_noise_floats() { return 4 * Sampler::kNoise; }

extern "C" int frame_dump_rows() { return PacketLayout::kDumpRows; }

extern "C" int frame_shared_bytes() { return sizeof(Shared); }

extern "C" int frame_ring_slots() { return kRingSlots; }

extern "C" int frame_most_ring_slots() { return kMostRingSlots; }

extern "C" int frame_max_columns() { return kMaxColumns; }

extern "C" int frame_num_tags() { return kMaxExchanges; }

extern "C" cudaError_t frame_co_resident(int* ctas) {
  const void* kernel = reinterpret_cast<const void*>(frame_kernel);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(ctas, kernel, kAllThreads, sizeof(Shared));
}

extern "C" cudaError_t launch_frame(const FrameParams* params, int grid, cudaStream_t stream) {
  void* arguments[] = {const_cast<FrameParams*>(params)};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(frame_kernel), dim3(grid), dim3(kAllThreads),
                                     arguments, sizeof(Shared), stream);
}
