// The steps before and after the layers: the input rows, the final norm and head, the draw.
#pragma once

#include "layer.cuh"
#include "sampling.cuh"

namespace qwen_tts {

__device__ __forceinline__ Draw draw_of(const Stream& s, int codebook) {
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

// Calls f for each stream whose codes this CTA draws and whose embeddings it sums. In a narrow frame a CTA has at most
// one.
template <bool kWide, class F>
__device__ __forceinline__ void for_own_streams(const FrameParams& p, F&& f) {
  if constexpr (kWide) {
#pragma unroll 1
    for (int stream = block_index(); stream < p.num_columns; stream += gridDim.x) f(stream);
  } else {
    if (block_index() < p.num_columns) f(block_index());
  }
}

// Draws the noise for the code that this pass produces, before the wait for the logits.
template <class Context>
__device__ __forceinline__ void store_noise(const Context& c) {
  const FrameParams& p = c.p;
  const int codebook = c.pass();
  if (p.noise != nullptr) return;
  for_own_streams<Context::Form::kWide>(p, [&](int stream) {
    Sampler::store_noise(draw_of(p.streams[stream], codebook), codebook == 0 ? T::kVocab : P::kVocab,
                         reinterpret_cast<float4*>(p.noise_scratch) + stream * Sampler::kNoise);
  });
}

// Samples a stream's code from the logits. It is the code with which this pass begins.
template <class Context>
__device__ __forceinline__ void sample(Context& c, SamplerShared& sh, int stream) {
  const FrameParams& p = c.p;
  auto codebook = [&] { return c.pass() - 1; };
  auto at = [&] { return stream * kNumCodebooks + codebook(); };
  const uint32_t logits_tag = codebook() == 0 ? p.epoch + kTalkerLogits : c.tag - 1;  // a pass may follow the talker's
  auto seen = [&] { return p.seen + p.streams[stream].slot * (T::kVocab / 32); };
  Sampler sampler{sh, codebook() == 0 ? T::kVocab : P::kVocab};
  auto read_noise = [&] {
    sampler.read_noise(reinterpret_cast<const float4*>(
        p.noise == nullptr ? p.noise_scratch + stream * 4 * Sampler::kNoise : p.noise + at() * T::kVocab));
  };
  read_noise();
  sampler.read_seen(codebook() == 0 ? seen() : nullptr);
  sampler.read_logits(p.packets + PacketLayout::kLogits + stream * PacketLayout::kVocab, logits_tag, c.dog,
                      p.dump_logits == nullptr ? nullptr : p.dump_logits + at() * T::kVocab);
  const Draw d = draw_of(p.streams[stream], codebook());
  sampler.process(d);
  int code = sampler.pick(d, read_noise);
  if (thread_index() == 0) {
    p.codes[at()] = code;
    if (p.forced_codes != nullptr) code = p.forced_codes[at()];
    store_packet(p.packets + PacketLayout::kCodes + codebook() * kMaxColumns + stream, code, c.tag);
    if (codebook() == 0) seen()[code / 32] |= 1u << (code % 32);
  }
  sync_compute();  // before the sampler's memory is used again
}

// Samples the codes of this CTA's streams.
template <class Context>
__device__ __forceinline__ void sample_own(Context& c) {
  for_own_streams<Context::Form::kWide>(c.p, [&](int stream) {
    sample(c, *reinterpret_cast<SamplerShared*>(c.scratch.partial[LastTile::kFirst]), stream);
  });
}

// Waits for the code that was sampled for a stream.
template <class Context>
__device__ __forceinline__ int sampled_code(const Context& c, int codebook, int stream) {
  const uint64_t* codes = c.p.packets + PacketLayout::kCodes + codebook * kMaxColumns;
  return wait_packet(codes + stream, c.tag, c.dog, Phase::kCode);
}

// Computes the final norm and a head over the residual, and publishes the logits under c.tag. Stream s is column
// first() + s.
template <class D, class First>
__device__ __forceinline__ void head_logits(Context& c, Residual<D>& r, First&& first) {
  using Head = typename Products<D>::Head;
  gemv<Head, FirstTiles, 1>(
      c,
      [&](int /*split*/, int /*first_chunk*/, uint2(&f)[Head::kHeld]) {
        r.template add_deltas<Products<D>::Down::kSplit>(c, c.p.packets + PacketLayout::kDeltaDown, c.tag - 1);
        normed_fragments<D>(c, r, 1, f);
      },
      [&](int strip, int /*split*/, const float4& quad, uint64_t* packets, float squares) {
        const float2 scale = quad_scale<D>(squares);
        const int stream = quad_column() - first();
        uint64_t* const to =
            packets + PacketLayout::kLogits + stream * PacketLayout::kVocab + strip * kStripRows + quad_row();
        if (stream >= 0 && c.uses(quad_column())) {
          store_packet(to, __float_as_uint(quad.x * scale.x), c.tag);
          store_packet(to + 8, __float_as_uint(quad.z * scale.x), c.tag);
        }
        if (stream + 1 >= 0 && c.uses(quad_column() + 1)) {
          store_packet(to + PacketLayout::kVocab, __float_as_uint(quad.y * scale.y), c.tag);
          store_packet(to + PacketLayout::kVocab + 8, __float_as_uint(quad.w * scale.y), c.tag);
        }
      });
}

// Loads the talker's input rows into the residual.
__device__ __forceinline__ void feed_talker(const Context& c, Residual<T>& r) {
  const FrameParams& p = c.p;
  r.clear();
  if (c.uses(c.column()) && Residual<T>::real()) {
    if (!p.prefill) r.add_fp32(p.next_rows + int64_t(p.streams[c.column()].slot) * T::kHidden);
    r.add_fp32(p.text_rows + int64_t(c.column()) * T::kHidden);
  }
}

// Applies the talker's final norm to the residual, which becomes the hidden row. The head has summed the squares.
__device__ __forceinline__ void norm_hidden(const Context& c, Residual<T>& r) {
  const uint32_t* weights = reinterpret_cast<const uint32_t*>(c.p.talker_norm + Residual<T>::first_k());
  const float scale = __shfl_sync(~0u, rms_scale<T>(squares_part(c.scratch, 1)), c.column());
#pragma unroll
  for (int j = 0; j < Residual<T>::kChunks; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 g = unpack_bf16(Residual<T>::real() ? __ldg(weights + (kChunk * j + 8 * half) / 2) : 0u);
      const float2 x = unpack_bf16(pack_bf16(r.x[j][2 * half], r.x[j][2 * half + 1]));  // as the head has it
      r.x[j][2 * half] = x.x * (scale * g.x);
      r.x[j][2 * half + 1] = x.y * (scale * g.y);
    }
}

}  // namespace qwen_tts
