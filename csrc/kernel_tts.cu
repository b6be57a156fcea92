// One frame of Qwen3-TTS for 1 to 32 streams: the table of contents, the two kernels, and what a launch of
// them needs (decoding/frame_launcher.py).
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
#include "frame_exchanges.cuh"
#include "frame_fetch.cuh"
#include "wide_compute.cuh"

namespace qwen_tts {

template <class Form>
struct Shared {
  typename Form::Ring ring;
  // A copy of the kernel's parameters, to save registers. The compiler reads this copy again after each wait. It would
  // keep addresses computed from the constant parameters over waits, and spill them. The copy ends with the last stream
  // that the kernel can have.
  alignas(16) char params[param_bytes(Form::Scratch::kColumns)];
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
__device__ __forceinline__ void run_frame(const FrameParams& p) {
  Shared<Form>& sh = *reinterpret_cast<Shared<Form>*>(shared_memory());
  if (block_index() == p.withheld_cta) return;
  sh.ring.init();
  static_assert(sizeof(sh.params) % 4 == 0, "words are copied");
  for (int i = threadIdx.x; i < int(sizeof(sh.params) / 4); i += kAllThreads)
    reinterpret_cast<uint32_t*>(sh.params)[i] = reinterpret_cast<const uint32_t*>(&p)[i];
  const FrameParams& params = *reinterpret_cast<const FrameParams*>(sh.params);
  __syncthreads();
  if (threadIdx.x < kThreads) list_items<T>(params, sh.scratch);
  __syncthreads();
  if (threadIdx.x < kThreads) {
    take_registers<112>();
    if constexpr (Form::kWide) {
      compute_wide_frame(params, sh.scratch, sh.ring);
    } else {
      compute_frame(params, sh.scratch, sh.ring);
    }
  } else {
    give_registers<32>();
    if (threadIdx.x < kThreads + 32 * kFetchers) fetch_frame<Form>(p, sh.ring, sh.scratch.items);
  }
}

}  // namespace qwen_tts

using namespace qwen_tts;

extern "C" __global__ void __launch_bounds__(kAllThreads, 1)
    frame_kernel_narrow(const __grid_constant__ FrameParams p) {
  run_frame<NarrowForm>(p);
}

extern "C" __global__ void __launch_bounds__(kAllThreads, 1) frame_kernel_wide(const __grid_constant__ FrameParams p) {
  run_frame<WideForm>(p);
}

// What a launch needs.
QWEN_TTS_FACT(threads, kAllThreads);
QWEN_TTS_FACT(frame_kernel_narrow_shared_bytes, sizeof(Shared<NarrowForm>));
QWEN_TTS_FACT(frame_kernel_wide_shared_bytes, sizeof(Shared<WideForm>));
QWEN_TTS_FACT(params_bytes, sizeof(FrameParams));
QWEN_TTS_FACT(stream_bytes, sizeof(Stream));
QWEN_TTS_FACT(narrow_columns, kTileColumns);  // that the narrow kernel takes; and rows of a prefill
QWEN_TTS_FACT(max_grid, min_of(min_of(min_of(TalkerProducts::Qkv::kStrips, PredictorProducts::Qkv::kStrips),
                                      min_of(TalkerProducts::GateUp::kStrips, PredictorProducts::GateUp::kStrips)),
                               TalkerProducts::Head::kStrips));  // CTAs that the exchanges allow
// What a wide frame finds in its dense words: bytes of kClearedByte.
QWEN_TTS_FACT(dense_from, PacketLayout::kDense);
QWEN_TTS_FACT(dense_words, DenseLayout::kWords);
QWEN_TTS_FACT(cleared_byte, kClearedByte);

// The shapes that it was built for.
#define QWEN_TTS_DIMS(name, D)                 \
  QWEN_TTS_FACT(name##_hidden, D::kHidden);    \
  QWEN_TTS_FACT(name##_layers, D::kLayers);    \
  QWEN_TTS_FACT(name##_kv_heads, D::kKvHeads); \
  QWEN_TTS_FACT(name##_head_dim, D::kHeadDim); \
  QWEN_TTS_FACT(name##_vocab, D::kVocab)
QWEN_TTS_DIMS(talker, T);
QWEN_TTS_DIMS(predictor, P);
QWEN_TTS_FACT(num_codebooks, kNumCodebooks);

// What limits a slot's positions.
QWEN_TTS_FACT(split_positions, kSplitPositions);
QWEN_TTS_FACT(max_splits, kMaxSplits);
QWEN_TTS_FACT(max_items, NarrowForm::Scratch::kMaxItems);

// Elements of the tensors that depend on how a product is cut.
QWEN_TTS_FACT(talker_layer_bytes, TalkerProducts::kLayerBytes);
QWEN_TTS_FACT(talker_head_bytes, TalkerProducts::Head::kBytes + (kProjects ? Projection::kBytes : 0));
QWEN_TTS_FACT(predictor_layer_bytes, PredictorProducts::kLayerBytes);
QWEN_TTS_FACT(predictor_head_bytes, PredictorProducts::Head::kBytes);
QWEN_TTS_FACT(predictor_qkv_rows, PredictorProducts::Qkv::kRows);
QWEN_TTS_FACT(num_packets, DenseLayout::kTotal);         // 64-bit words, zeros before the first launch
QWEN_TTS_FACT(noise_floats, 4 * Sampler::kNoise);        // of FrameParams::noise_scratch, a column
QWEN_TTS_FACT(dump_rows, PacketLayout::kDumpRows);       // of FrameParams::dump_exchanges, an exchange
QWEN_TTS_FACT(ring_slots, NarrowForm::kSlots);           // of the weight ring
QWEN_TTS_FACT(most_ring_slots, NarrowForm::kMostSlots);  // that shared memory has room for
