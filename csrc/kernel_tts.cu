// One frame of Qwen3-TTS for 1 to 8 streams: the table of contents, the only kernel, its launch.
//
//   rows fed ─ talker layers ─ norm ─ head ─ code 0 ─ 15 x (predictor layers ─ norm ─ head ─ code)
//   the sum of the 16 codes' embeddings is left for the next frame, which adds its text row
//
// One persistent CTA per SM, launched cooperatively. Nothing returns to the host inside a frame and
// there is no grid barrier: see packets.cuh for how CTAs wait for each other, ring.cuh for how weights,
// keys and values arrive, layer.cuh for the five exchanges of a layer. A prefill is the talker's layers
// alone, over up to eight rows of one stream.
#include "kernel_tts.h"
#include "predictor.cuh"

namespace qwen_tts {

struct Shared {
  FrameRing ring;
  // A copy, for registers' sake: what is read from here is not kept over a wait, while addresses
  // computed from the kernel's constants would be, and be spilled.
  FrameParams params;
  Scratch scratch;
  SamplerShared sampler;
};
static_assert(sizeof(Shared) <= kSharedBytes, "more shared memory than the GPU has");

// The fetching warp: lane w streams warp w's weights, and its keys and values of the talker's attention, in the order in
// which the frame uses them.
struct Fetcher {
  RingWriter<FrameRing> ring;
  const ItemRows* attended;     // this CTA's items
  uint64_t once, kept, normal;  // L2 policies

  // The items of one product, which begins at `from`; its first kept_bytes shall stay in L2.
  template <class Product>
  __device__ __forceinline__ void items(const char* from, int64_t kept_bytes = 0) {
    from += lane_index() * (Product::kItemBytes / kWarps);
    for (int item = block_index(); item < Product::kItems; item += gridDim.x)
#pragma unroll 1
      for (int piece = 0; piece < Product::kPieces; ++piece)
        ring.push(from + item * Product::kItemBytes + piece * Product::kPieceBytes, Product::kPieceBytes,
                  Product::kPieceBytes, item * Product::kItemBytes < kept_bytes ? kept : once);
  }
  template <class Products>
  __device__ __forceinline__ void after_qkv(const char* from, int64_t kept_bytes = 0) {
    constexpr int64_t kOut = Products::Qkv::kBytes, kGateUp = kOut + Products::Out::kBytes;
    constexpr int64_t kDown = kGateUp + Products::GateUp::kBytes;
    items<typename Products::Out>(from + kOut, kept_bytes - kOut);
    items<typename Products::GateUp>(from + kGateUp, kept_bytes - kGateUp);
    items<typename Products::Down>(from + kDown, kept_bytes - kDown);
  }
  // What a talker layer's attention needs of the caches.
  __device__ __forceinline__ void keys_and_values(const FrameParams& p, int layer) {
    using Tile = TalkerTile;
#pragma unroll 1
    for (const ItemRows* item = attended; item->bits != AttentionItem::kNone; ++item) {
      const int first = AttentionItem{item->bits}.split() * kSplitPositions + lane_index() * kTilePositions;
      const int rows = cached_rows(*item, first), used = used_rows(*item, first);
      const int64_t at = (cache_at<T>(p, layer, *item) + first * T::kHeadDim) * 2;
      auto push = [&](const __nv_bfloat16* cache, int row) {
        ring.push(reinterpret_cast<const char*>(cache) + at + row * Tile::kRowBytes,
                  max(min(Tile::kRows, rows - row), 0) * Tile::kRowBytes, Tile::kBytes, normal);
      };
#pragma unroll 1
      for (int row = 0; row < rows; row += Tile::kRows) push(p.k_cache, row);
#pragma unroll 1
      for (int row = 0; row < used; row += Tile::kRows) push(p.v_cache, row);  // new rows find room there
    }
  }
  __device__ __forceinline__ void frame(const FrameParams& p) {
#pragma unroll 1
    for (int i = 0; i < T::kLayers; ++i) {
      const char* from = p.talker_layers + i * TalkerProducts::kLayerBytes;
      items<TalkerProducts::Qkv>(from);
      keys_and_values(p, i);
      after_qkv<TalkerProducts>(from);
    }
    if (p.prefill) return;
    items<TalkerProducts::Head>(p.talker_head);
    if constexpr (kProjects) items<Projection>(p.talker_head + TalkerProducts::Head::kBytes);
    const int extra = p.num_columns > kPaired ? 1 : 0;  // position 0 has a pass of its own, without a head
#pragma unroll 1
    for (int pass = -extra; pass < kNumCodebooks - 1; ++pass) {
#pragma unroll 1
      for (int i = 0; i < P::kLayers; ++i) {
        const char* from = p.predictor_layers + i * PredictorProducts::kLayerBytes;
        // What stays in L2 begins with QKV, but for the first layer's, which a frame reads once or twice.
        if (!qkv_known(pass + 1, i)) items<PredictorProducts::Qkv>(from, i > 0 ? p.predictor_kept_bytes : 0);
        if (pass < 0 && i == P::kLayers - 1) continue;
        after_qkv<PredictorProducts>(from, p.predictor_kept_bytes + (i > 0 ? 0 : PredictorProducts::Qkv::kBytes));
      }
      if (pass < 0) continue;
      items<PredictorProducts::Head>(p.predictor_heads + pass * PredictorProducts::Head::kBytes);
    }
  }
};

__device__ __forceinline__ void fetch_weights(const FrameParams& p, FrameRing& ring, const ItemRows* attended) {
  Fetcher fetcher{{ring, lane_index()}, attended};
  fetcher.normal = policy_evict_normal();
  fetcher.once = policy_evict_first();
  fetcher.kept = policy_evict_last();
  fetcher.frame(p);
}

__device__ __forceinline__ void compute_frame(Shared& sh) {
  const FrameParams& p = sh.params;
  Context c{p, sh.scratch, {sh.ring}, Watchdog{p}, p.epoch, Context::first_state(p)};
  Residual<P> row;
  {
    Residual<T> hidden;
    if (!p.prefill) lay_noise(c);  // of code 0, while the first weights are on their way
    talker_layers(c, hidden);
    if (p.prefill) return;
    talker_head(c, hidden);
    project_hidden(c, hidden, row);
  }
  predict(c, sh.sampler, row);
}

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
    compute_frame(sh);
  } else {
    give_registers<32>();
    if (threadIdx.x < kThreads + kWarps) fetch_weights(p, sh.ring, sh.scratch.items);
  }
}

}  // namespace qwen_tts

using namespace qwen_tts;

extern "C" int frame_max_grid() {
  return min_of(min_of(min_of(TalkerProducts::Qkv::kStrips, PredictorProducts::Qkv::kStrips),
                       min_of(TalkerProducts::GateUp::kStrips, PredictorProducts::GateUp::kStrips)),
                TalkerProducts::Head::kStrips);
}

extern "C" int64_t frame_num_packets() { return PacketLayout::kTotal; }

extern "C" int frame_noise_floats() { return 4 * Sampler::kNoise; }

extern "C" int frame_dump_rows() { return PacketLayout::kDumpRows; }

extern "C" int frame_shared_bytes() { return sizeof(Shared); }

// At most so many exchanges has a frame: what the host adds to the epoch after a launch.
extern "C" int frame_num_tags() {
  return 5 * (T::kLayers + kNumCodebooks * P::kLayers) + 2 * kNumCodebooks + (kProjects ? 1 : 0);
}

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
