// One frame of Qwen3-TTS for 1 to 32 streams: the table of contents, the two kernels, their launch.
//
//   frame_schedule.cuh   the order of a frame's exchanges, which all below follow
//   frame_compute.cuh    what computing warps do at each step:  layer.cuh  attention.cuh  predictor_attention.cuh
//                        talker.cuh (rows fed, head, draw)  predictor.cuh (what the predictor is fed)  sampling.cuh
//   frame_fetch.cuh      what the fetching warp does at each step:  ring.cuh
//   gemv.cuh             a product on the tensor cores;  products.cuh (how it is cut)  residual.cuh (what it reads)
//   packets.cuh          how CTAs wait for each other
//   wide_compute.cuh     frame_compute.cuh for more than eight streams:  wide_layer.cuh  wide_gemv.cuh  dense_words.cuh
//   shared_memory.cuh    what a CTA keeps;  context.cuh  what a warp keeps
//
// One persistent CTA runs on each SM, launched cooperatively. A frame has no host round trip and no grid barrier. Each
// frame stores the sum of its 16 embeddings. The next frame adds its text row to this sum. A prefill runs the talker's
// layers alone, over up to eight rows of one stream, in the narrow kernel.
#include "frame_compute.cuh"
#include "frame_fetch.cuh"
#include "kernel_tts.h"
#include "wide_compute.cuh"

namespace qwen_tts {

template <class Form>
struct Shared {
  typename Form::Ring ring;
  // A copy of the kernel's parameters, to save registers. The compiler reads this copy again after each wait. It would
  // keep addresses computed from the constant parameters over waits, and spill them.
  FrameParams params;
  typename Form::Scratch scratch;
};
static_assert(max_of(sizeof(Shared<NarrowForm>), sizeof(Shared<WideForm>)) <= kSharedBytes,
              "more shared memory than the GPU has");
static_assert(offsetof(Shared<NarrowForm>, ring.data) == 0 && offsetof(Shared<WideForm>, ring.data) == 0,
              "tiles are aligned as the memory is");

// Four warps run beside the computing warps, although only one fetches: setmaxnreg reassigns registers by groups of
// four warps.
constexpr int kAllThreads = kThreads + 128;

template <class Form>
__global__ void __launch_bounds__(kAllThreads, 1) frame_kernel(const __grid_constant__ FrameParams p) {
  Shared<Form>& sh = *reinterpret_cast<Shared<Form>*>(shared_memory());
  if (block_index() == p.withheld_cta) return;
  sh.ring.init();
  static_assert(sizeof(FrameParams) % 4 == 0, "words are copied");
  for (int i = threadIdx.x; i < int(sizeof(FrameParams) / 4); i += kAllThreads)
    reinterpret_cast<uint32_t*>(&sh.params)[i] = reinterpret_cast<const uint32_t*>(&p)[i];
  __syncthreads();
  if (threadIdx.x < kThreads) list_items<T>(sh.params, sh.scratch);
  __syncthreads();
  if (threadIdx.x < kThreads) {
    take_registers<112>();
    if constexpr (Form::kWide) {
      compute_wide_frame(sh.params, sh.scratch, sh.ring);
    } else {
      compute_frame(sh.params, sh.scratch, sh.ring);
    }
  } else {
    give_registers<32>();
    if (threadIdx.x < kThreads + 32) fetch_frame<Form>(p, sh.ring, sh.scratch.items);
  }
}

template <class Form>
cudaError_t co_resident(int* ctas) {
  const void* kernel = reinterpret_cast<const void*>(frame_kernel<Form>);
  const int bytes = sizeof(Shared<Form>);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(ctas, kernel, kAllThreads, bytes);
}

template <class Form>
cudaError_t launch(const FrameParams& params, int grid, cudaStream_t stream) {
  void* arguments[] = {const_cast<FrameParams*>(&params)};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(frame_kernel<Form>), dim3(grid), dim3(kAllThreads),
                                     arguments, sizeof(Shared<Form>), stream);
}

}  // namespace qwen_tts

using namespace qwen_tts;

extern "C" int frame_max_grid() {
  return min_of(min_of(min_of(TalkerProducts::Qkv::kStrips, PredictorProducts::Qkv::kStrips),
                       min_of(TalkerProducts::GateUp::kStrips, PredictorProducts::GateUp::kStrips)),
                TalkerProducts::Head::kStrips);
}

extern "C" int frame_max_positions(int grid) {
  return kSplitPositions *
         min_of(kMaxSplits, grid * (NarrowForm::Scratch::kMaxItems - 1) / (kTileColumns * T::kKvHeads));
}

extern "C" int64_t frame_num_packets() { return DenseLayout::kTotal; }

extern "C" int frame_noise_floats() { return 4 * Sampler::kNoise; }

extern "C" int frame_dump_rows() { return PacketLayout::kDumpRows; }

extern "C" int frame_shared_bytes() { return sizeof(Shared<NarrowForm>); }

extern "C" int frame_ring_slots() { return NarrowForm::kSlots; }

extern "C" int frame_most_ring_slots() { return NarrowForm::kMostSlots; }

extern "C" int frame_max_columns() { return kMaxColumns; }

extern "C" int frame_num_tags() { return kMaxExchanges; }

extern "C" cudaError_t frame_co_resident(int* ctas) {
  int narrow = 0, wide = 0;
  if (const cudaError_t error = co_resident<NarrowForm>(&narrow); error != cudaSuccess) return error;
  if (const cudaError_t error = co_resident<WideForm>(&wide); error != cudaSuccess) return error;
  *ctas = min_of(narrow, wide);
  return cudaSuccess;
}

extern "C" cudaError_t launch_frame(const FrameParams* params, int grid, cudaStream_t stream) {
  if (params->num_columns <= kTileColumns) return launch<NarrowForm>(*params, grid, stream);
  const cudaError_t error = cudaMemsetAsync(params->packets + PacketLayout::kDense, kClearedByte,
                                            DenseLayout::kWords * sizeof(uint64_t), stream);
  return error == cudaSuccess ? launch<WideForm>(*params, grid, stream) : error;
}
