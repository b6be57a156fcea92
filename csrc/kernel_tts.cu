// One frame of Qwen3-TTS for 1 to 8 streams: the table of contents, the only kernel, its launch.
//
//   rows fed ─ talker layers ─ norm ─ head ─ code 0 ─ 15 x (predictor layers ─ norm ─ head ─ code)
//   the sum of the 16 codes' embeddings is left for the next frame, which adds its text row
//
// One persistent CTA per SM, launched cooperatively. Nothing returns to the host inside a frame and
// there is no grid barrier: see packets.cuh for how CTAs wait for each other, ring.cuh for how the
// weights arrive, layer.cuh for the five exchanges of a layer.
#include "kernel_tts.h"
#include "layer.cuh"
#include "sampling.cuh"

namespace qwen_tts {

using T = TalkerDims;
using P = PredictorDims;
using TalkerProducts = Products<T>;
using PredictorProducts = Products<P>;
// The talker's hidden row becomes the predictor's input; where their widths differ, through a
// projection with bias (codes come from tables that were projected when the weights were packed).
constexpr bool kProjects = T::kHidden != P::kHidden;
using Projection = Product<P::kHidden, T::kHidden, 1>;

static_assert(TalkerProducts::kPieceA == PredictorProducts::kPieceA, "one ring serves both");
static_assert(TalkerProducts::kPieceB == PredictorProducts::kPieceB, "one ring serves both");
using FrameRing = Ring<TalkerProducts::kPieceA, TalkerProducts::kPieceB, kRingSlots>;

// The order in which the ring fetches: talker layers; codec head (and projection); then predictor
// layers and a head, 15 times. The kinds of run lie in shared memory, for registers are short and
// a warp looks here 32 times a frame.
struct Run {
  const char* data;  // of this CTA's first warp
  int64_t stride;    // to the next warp's
  int64_t step;      // from one pass to the next
  int small, pieces;  // of a layer, see Cut
  int left;           // pieces in all
};

struct Program {
  Run* runs;  // [4]

  __device__ void init(const FrameParams& p) const {
    if (threadIdx.x != 0) return;
    auto run = [](const Tape& tape, int64_t skip, int64_t step, Cut cut, int left) {
      return Run{tape.data + int64_t(blockIdx.x) * kWarps * tape.stride + skip, tape.stride, step, cut.small, cut.pieces,
                 left};
    };
    const Cut talker = TalkerProducts::layer_cut(), predictor = PredictorProducts::layer_cut();
    const int64_t layer_bytes = int64_t(talker.small) * TalkerProducts::kPieceA +
                                int64_t(talker.pieces - talker.small) * TalkerProducts::kPieceB;
    const int codec_head = TalkerProducts::pieces<TalkerProducts::Head>() +
                           (kProjects ? TalkerProducts::pieces<Projection>() : 0);
    const int head = TalkerProducts::pieces<PredictorProducts::Head>();
    runs[0] = run(p.talker_tape, 0, 0, talker, T::kLayers * talker.pieces);
    runs[1] = run(p.talker_tape, T::kLayers * layer_bytes, 0, {codec_head, codec_head}, codec_head);
    runs[2] = run(p.predictor_tape, 0, 0, predictor, P::kLayers * predictor.pieces);
    runs[3] = run(p.head_tape, 0, int64_t(head) * TalkerProducts::kPieceA, {head, head}, head);
  }

  __device__ __forceinline__ bool operator()(int index, const char*& from, int& left, Cut& cut) const {
    const int pass = (index - 2) >> 1;
    if (pass == kNumCodebooks - 1) return false;
    const Run& run = runs[index < 2 ? index : 2 + (index & 1)];
    from = run.data + int64_t(threadIdx.x >> 5) * run.stride + (index < 2 ? 0 : pass * run.step);
    left = run.left;
    cut = {run.small, run.pieces};
    return true;
  }
};

struct Shared {
  alignas(128) char ring[kWarps][kRingSlots][FrameRing::kSlotBytes];
  Scratch scratch;
  SamplerShared sampler;
  uint64_t full[kWarps][kRingSlots];
  Run runs[4];
};
static_assert(sizeof(AttentionShared<T>) <= sizeof(Scratch::partial) / 2, "attention borrows a partial buffer");
static_assert(sizeof(AttentionShared<P>) <= sizeof(Scratch::partial) / 2, "attention borrows a partial buffer");

using FrameContext = Context<FrameRing, Program>;

__device__ __forceinline__ Draw draw_of(const StreamParams& s, int codebook) {
  const bool talker = codebook == 0;
  Draw d;
  d.temperature = talker ? s.talker_temperature : s.predictor_temperature;
  d.tail_mass = talker ? s.talker_tail_mass : s.predictor_tail_mass;
  d.penalty = talker ? s.talker_penalty : 1.f;
  d.top_k = talker ? s.talker_top_k : s.predictor_top_k;
  d.control_suppressed = talker;
  d.eos_suppressed = talker && s.suppress_eos;
  d.key = make_uint2(s.seed[0], s.seed[1]);
  d.codebook = codebook;
  d.frame = s.frame;
  return d;
}

// Sample codebook's code of every stream, one CTA a stream, from logits under tag - 1; all CTAs
// leave with their column's code.
template <int kVocab>
__device__ __forceinline__ int sample(FrameContext& c, SamplerShared& sh, int codebook) {
  const FrameParams& p = c.p;
  for (int column = blockIdx.x; column < p.num_streams; column += gridDim.x) {
    const Draw d = draw_of(p.streams[column], codebook);
    const int64_t at = int64_t(column) * kNumCodebooks + codebook;
    uint32_t* seen =
        codebook == 0 ? p.seen + int64_t(p.streams[column].slot) * (T::kVocab / 32) : nullptr;
    Sampler<kVocab> sampler{sh};
    sampler.draw_noise(d, p.noise == nullptr ? nullptr : p.noise + at * T::kVocab);
    sampler.read_logits(p.packets + PacketLayout::kLogits + int64_t(column) * PacketLayout::kVocab, c.tag - 1,
                        c.dog, p.dump_logits == nullptr ? nullptr : p.dump_logits + at * T::kVocab);
    sampler.process(d, seen);
    int code = sampler.pick(d);
    if (p.forced_codes != nullptr) code = p.forced_codes[at];
    if (threadIdx.x == 0) {
      store_packet(p.packets + PacketLayout::kCodes + codebook * kMaxStreams + column, code, c.tag);
      p.codes[at] = code;
      if (seen != nullptr) seen[code / 32] |= 1u << (code % 32);
    }
    __syncthreads();
  }
  int code = 0;
  if (c.active)
    code = wait_packet(p.packets + PacketLayout::kCodes + codebook * kMaxStreams + c.column, c.tag, c.dog,
                       Phase::kCode);
  __syncwarp();
  ++c.tag;
  return code;
}

// Final norm and a head over the residual; logits go out under c.tag, which moves on.
// The gamma and the norm's scale are left for the caller, who may want the normed row itself.
template <class D, class Head>
__device__ __forceinline__ void head_logits(FrameContext& c, Residual<D>& r, const __nv_bfloat16* norm,
                                            int tile, Gamma<D>& gamma) {
  gamma.load(norm);
  if (c.active && Residual<D>::real())
    r.template add_deltas<Products<D>::Down::kSplit>(
        c.template vector<PacketLayout::kHidden>(PacketLayout::kDeltaDown, tile, 2), c.tag - 1, c.dog);
  __syncwarp();
  gemv<Head, 1>(
      c.ring, c.next_run, c.scratch, c.buffer,
      [&](int, uint2(&f)[1][Head::kChunks]) { normed_fragments<D>(c, r, gamma, 0, f[0]); },
      [&](int, int strip, int, const Cell& cell, float2 rows) {
        if (cell.stream >= c.p.num_streams) return;
        const float scale = rms_scale<D>(c, 0, cell.stream);
        uint64_t* to = c.p.packets + PacketLayout::kLogits + int64_t(cell.stream) * PacketLayout::kVocab +
                       strip * 16 + 2 * cell.pair;
        store_packet(to, __float_as_uint(rows.x * scale), c.tag);
        store_packet(to + 1, __float_as_uint(rows.y * scale), c.tag);
      });
  ++c.tag;
}

// 28 layers and the head; leaves code 0 to be sampled and `hidden`, the normed row.
__device__ __forceinline__ void talker(FrameContext& c, Residual<T>& hidden) {
  const FrameParams& p = c.p;
  Residual<T> r[1];
  r[0].clear();
  if (c.active && Residual<T>::real()) {
    r[0].add_fp32(p.next_rows + int64_t(p.streams[c.column].slot) * T::kHidden);
    r[0].add_fp32(p.text_rows + int64_t(c.column) * T::kHidden);
  }
#pragma unroll 1
  for (int layer = 0; layer < T::kLayers; ++layer)
    decoder_layer<T, 1>(c, r, p.talker_norms + int64_t(layer) * 2 * T::kHidden, layer > 0, [&](uint32_t tag) {
      auto& sh = *reinterpret_cast<AttentionShared<T>*>(c.scratch.partial[c.buffer]);
      const int heads = p.num_streams * T::kKvHeads;
      for (int item = blockIdx.x; item < heads * p.num_splits; item += gridDim.x)
        attend_talker<T>(p, sh, layer, item / p.num_splits / T::kKvHeads, item / p.num_splits % T::kKvHeads,
                         item % p.num_splits, tag, c.dog);
      if (p.num_splits > 1)
        for (int head = blockIdx.x; head < heads; head += gridDim.x)
          combine_splits<T>(p, head / T::kKvHeads, head % T::kKvHeads, tag, c.dog);
    });
  Gamma<T> gamma;
  head_logits<T, TalkerProducts::Head>(c, r[0], p.talker_norms + int64_t(T::kLayers) * 2 * T::kHidden, 0, gamma);
  const float scale = rms_scale<T>(c, 0, c.column);
  c.squares ^= 1;
#pragma unroll
  for (int j = 0; j < Residual<T>::kChunks; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 g = unpack_bf16(gamma.bits[j][half]);
      hidden.x[j][2 * half] = r[0].x[j][2 * half] * scale * g.x;
      hidden.x[j][2 * half + 1] = r[0].x[j][2 * half + 1] * scale * g.y;
      if (p.dump_hidden != nullptr && blockIdx.x == 0 && c.active && Residual<T>::real())
        reinterpret_cast<float2*>(p.dump_hidden + int64_t(c.column) * T::kHidden + Residual<T>::first_k(j))[4 * half] =
            make_float2(hidden.x[j][2 * half], hidden.x[j][2 * half + 1]);
    }
}

// The talker's hidden row as the predictor's first input.
__device__ __forceinline__ void project_hidden(FrameContext& c, const Residual<T>& hidden, Residual<P>& row) {
  if constexpr (!kProjects) {
#pragma unroll
    for (int j = 0; j < Residual<P>::kChunks; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) row.x[j][i] = hidden.x[j][i];
  } else {
    const __nv_bfloat16* bias = c.p.projection_bias;
    gemv<Projection, 1>(
        c.ring, c.next_run, c.scratch, c.buffer,
        [&](int, uint2(&f)[1][Projection::kChunks]) {
#pragma unroll
          for (int j = 0; j < Projection::kChunks; ++j)
            f[0][j] = make_uint2(pack_bf16(hidden.x[j][0], hidden.x[j][1]), pack_bf16(hidden.x[j][2], hidden.x[j][3]));
        },
        [&](int, int strip, int, const Cell& cell, float2 rows) {
          if (cell.stream >= c.p.num_streams) return;
          const float2 b = unpack_bf16(reinterpret_cast<const uint32_t*>(bias)[strip * 8 + cell.pair]);
          store_packet(c.p.packets + PacketLayout::kProjected + packet_index(strip, cell.pair, cell.stream),
                       pack_bf16(rows.x + b.x, rows.y + b.y), c.tag);
        });
    row.clear();
    if (c.active && Residual<P>::real())
      row.template add_deltas<1>(c.p.packets + PacketLayout::kProjected, c.tag, c.dog);
    __syncwarp();
    ++c.tag;
  }
}

// One pass over the predictor's layers for kUsedTiles rows, the first at `position`; the logits of
// codebook `position + kUsedTiles - 1` follow.
template <int kUsedTiles>
__device__ __forceinline__ void predictor_pass(FrameContext& c, Residual<P> (&r)[kUsedTiles], int position) {
  const FrameParams& p = c.p;
#pragma unroll 1
  for (int layer = 0; layer < P::kLayers; ++layer)
    decoder_layer<P, kUsedTiles>(
        c, r, p.predictor_norms + int64_t(layer) * 2 * P::kHidden, layer > 0, [&](uint32_t tag) {
          auto& sh = *reinterpret_cast<AttentionShared<P>*>(c.scratch.partial[c.buffer]);
          for (int item = blockIdx.x; item < p.num_streams * P::kKvHeads; item += gridDim.x)
            attend_predictor<P, kUsedTiles>(p, sh, layer, item / P::kKvHeads, item % P::kKvHeads, position, tag,
                                            c.dog);
        });
  Gamma<P> gamma;
  head_logits<P, PredictorProducts::Head>(c, r[kUsedTiles - 1],
                                          p.predictor_norms + int64_t(P::kLayers) * 2 * P::kHidden,
                                          kUsedTiles - 1, gamma);
  c.squares ^= 1;
}

// A code's embedding as the predictor's next input, and into the sum for the next frame, which one
// CTA keeps in memory: adds without an answer, in the order of the codebooks.
__device__ __forceinline__ void feed_code(FrameContext& c, int codebook, int code, Residual<P>& row) {
  const FrameParams& p = c.p;
  row.clear();
  if (!c.active) return;
  const __nv_bfloat16* embedding =
      codebook == 0 ? p.codec_embedding + int64_t(code) * T::kHidden
                    : p.predictor_embeddings + (int64_t(codebook - 1) * P::kVocab + code) * T::kHidden;
  if (blockIdx.x == gridDim.x - 1 && Residual<T>::real()) {
    float* next = p.next_rows + int64_t(p.streams[c.column].slot) * T::kHidden;
#pragma unroll
    for (int j = 0; j < Residual<T>::kChunks; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = Residual<T>::first_k(j) + 8 * half;
        const float2 pair = unpack_bf16(__ldg(reinterpret_cast<const uint32_t*>(embedding + k)));
        if (codebook == 0) {
          __stcg(reinterpret_cast<float2*>(next + k), pair);
        } else {
          atomicAdd(next + k, pair.x);
          atomicAdd(next + k + 1, pair.y);
        }
      }
  }
  if constexpr (kProjects) {
    // An EOS is beyond the table; what follows it in the frame is not used.
    embedding = p.projected_embeddings + (int64_t(codebook) * P::kVocab + min(code, P::kVocab - 1)) * P::kHidden;
  }
  if (Residual<P>::real() && codebook < kNumCodebooks - 1) row.add_bf16(embedding);
}

__global__ void __launch_bounds__(kThreads, 1) frame_kernel(const __grid_constant__ FrameParams p) {
  extern __shared__ char memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

  Program program{sh.runs};
  program.init(p);
  FrameRing ring{smem_address(&sh.ring[warp][0][0]), smem_address(sh.full[warp]), lane};
  ring.init();
  __syncthreads();
  for (int i = 0; i < kRingSlots; ++i) ring.fetch(program);
  FrameContext c{p, sh.scratch, ring, program, Watchdog{p}, p.epoch};
  c.column = lane >> 2;
  c.active = c.column < p.num_streams;

  Residual<P> first[2];
  {
    Residual<T> hidden;
    talker(c, hidden);
    project_hidden(c, hidden, first[0]);
  }
  feed_code(c, 0, sample<T::kVocab>(c, sh.sampler, 0), first[1]);
  predictor_pass<2>(c, first, 0);
  Residual<P> row[1];
  feed_code(c, 1, sample<P::kVocab>(c, sh.sampler, 1), row[0]);
#pragma unroll 1
  for (int codebook = 2; codebook < kNumCodebooks; ++codebook) {
    predictor_pass<1>(c, row, codebook);
    feed_code(c, codebook, sample<P::kVocab>(c, sh.sampler, codebook), row[0]);
  }
}

}  // namespace qwen_tts

using namespace qwen_tts;

extern "C" int frame_max_grid() {
  return TalkerProducts::Qkv::kStrips < PredictorProducts::Qkv::kStrips ? TalkerProducts::Qkv::kStrips
                                                                        : PredictorProducts::Qkv::kStrips;
}

extern "C" int64_t frame_num_packets() { return PacketLayout::kTotal; }

// Exchanges of a frame: what the host adds to the epoch after a launch.
extern "C" int frame_num_tags() {
  return 5 * (T::kLayers + (kNumCodebooks - 1) * P::kLayers) + 2 * kNumCodebooks + (kProjects ? 1 : 0);
}

extern "C" cudaError_t launch_frame(const FrameParams* params, int grid, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= 227 * 1024, "more shared memory than any GPU has");
  cudaError_t error = cudaFuncSetAttribute(frame_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  void* arguments[] = {const_cast<FrameParams*>(params)};
  return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(frame_kernel), dim3(grid), dim3(kThreads), arguments,
                                     sizeof(Shared), stream);
}
