// The parts of a frame that are the talker's, and what both models share: final norm, head, draw.
#pragma once

#include "attention.cuh"
#include "sampling.cuh"

namespace qwen_tts {

using T = TalkerDims;
using P = PredictorDims;

__device__ __forceinline__ Draw draw_of(const Column& s, int codebook) {
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

// The stream whose codes this CTA draws, and whose sum it makes; a grid has at least as many CTAs as there
// are columns. Computed anew wherever it is needed.
__device__ __forceinline__ int own_stream() { return block_index(); }

// The noise of the draws that this pass leads to, before their logits are waited for.
__device__ __forceinline__ void lay_noise(const Context& c) {
  const FrameParams& p = c.p;
  const int codebook = c.pass();
  if (p.noise != nullptr || own_stream() >= p.num_columns) return;
  Sampler::lay_noise(draw_of(p.columns[own_stream()], codebook), codebook == 0 ? T::kVocab : P::kVocab,
                     reinterpret_cast<float4*>(p.noise_aside) + own_stream() * Sampler::kNoise);
}

// Sample the code that this pass begins with, of every stream, one CTA a stream, from the logits.
__device__ __forceinline__ void sample(Context& c, SamplerShared& sh) {
  const FrameParams& p = c.p;
  if (own_stream() >= p.num_columns) return;
  auto codebook = [&] { return c.pass() - 1; };
  auto at = [&] { return own_stream() * kNumCodebooks + codebook(); };
  const uint32_t logits_tag = codebook() == 0 ? p.epoch + 5 * T::kLayers : c.tag - 1;  // more may follow the talker's
  auto seen = [&] { return p.seen + p.columns[own_stream()].slot * (T::kVocab / 32); };
  Sampler sampler{sh, codebook() == 0 ? T::kVocab : P::kVocab};
  auto read_noise = [&] {
    sampler.read_noise(reinterpret_cast<const float4*>(
        p.noise == nullptr ? p.noise_aside + own_stream() * 4 * Sampler::kNoise : p.noise + at() * T::kVocab));
  };
  read_noise();
  sampler.read_seen(codebook() == 0 ? seen() : nullptr);
  sampler.read_logits(p.packets + PacketLayout::kLogits + own_stream() * PacketLayout::kVocab, logits_tag, c.dog,
                      p.dump_logits == nullptr ? nullptr : p.dump_logits + at() * T::kVocab);
  const Draw d = draw_of(p.columns[own_stream()], codebook());
  sampler.process(d);
  int code = sampler.pick(d, read_noise);
  if (thread_index() == 0) {
    p.codes[at()] = code;
    if (p.forced_codes != nullptr) code = p.forced_codes[at()];
    store_packet(p.packets + PacketLayout::kCodes + codebook() * kMaxColumns + own_stream(), code, c.tag);
    if (codebook() == 0) seen()[code / 32] |= 1u << (code % 32);
  }
  sync_compute();  // before the sampler's memory is used again
}

// The sampled code of a lane's `stream`.
__device__ __forceinline__ int sampled_code(Context& c, int codebook, int stream) {
  const uint64_t* codes = c.p.packets + PacketLayout::kCodes + codebook * kMaxColumns;
  const int code = wait_packet(codes + stream, c.tag, c.dog, Phase::kCode);
  c.advance();
  return code;
}

// Final norm and a head over the residual; logits go out under c.tag, which moves on. Stream s is
// column first() + s.
template <class D, class First>
__device__ __forceinline__ void head_logits(Context& c, Residual<D>& r, First&& first) {
  using Head = typename Products<D>::Head;
  gemv<Head, 1>(
      c,
      [&](int, int, uint2(&f)[Head::kHeld]) {
        r.template add_deltas<Products<D>::Down::kSplit>(c, c.p.packets + PacketLayout::kDeltaDown, c.tag - 1);
        normed_fragments<D>(c, r, 1, f);
      },
      [&](int strip, int, const Cell& cell, float2 rows, uint64_t* packets, float squares) {
        const int stream = cell.column - first();
        const float scale = rms_scale<D>(squares);
        if (stream < 0 || !c.finishes(cell)) return;
        uint64_t* to = packets + PacketLayout::kLogits + stream * PacketLayout::kVocab + strip * 16 + 2 * cell.pair;
        store_packet(to, __float_as_uint(rows.x * scale), c.tag);
        store_packet(to + 1, __float_as_uint(rows.y * scale), c.tag);
      });
  c.advance();
}

// The rows fed, through the layers; the residual lacks the last layer's deltas.
__device__ __forceinline__ void talker_layers(Context& c, Residual<T>& r) {
  const FrameParams& p = c.p;
  r.clear();
  if (c.uses(c.column()) && Residual<T>::real()) {
    if (!p.prefill) r.add_fp32(p.next_rows + int64_t(p.columns[c.column()].slot) * T::kHidden);
    r.add_fp32(p.text_rows + int64_t(c.column()) * T::kHidden);
  }
#pragma unroll 1
  while (c.layer() < T::kLayers)
    decoder_layer<T>(
        c, r, false, [] { return false; }, [&] { attend_talker<T>(c); });
}

// Codec head; leaves code 0 to be sampled, and the normed row in the residual.
__device__ __forceinline__ void talker_head(Context& c, Residual<T>& r) {
  head_logits<T>(c, r, [] { return 0; });
  const uint32_t* weights = reinterpret_cast<const uint32_t*>(c.p.talker_norm + Residual<T>::first_k());
  const float scale = __shfl_sync(~0u, rms_scale<T>(squares_part(c.scratch, 1)), c.column());
#pragma unroll
  for (int j = 0; j < Residual<T>::kChunks; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 g = unpack_bf16(Residual<T>::real() ? __ldg(weights + (kChunk * j + 8 * half) / 2) : 0u);
      r.x[j][2 * half] *= scale * g.x;
      r.x[j][2 * half + 1] *= scale * g.y;
    }
}

}  // namespace qwen_tts
