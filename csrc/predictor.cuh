// The code predictor's passes over its layers. Position 0 is the talker's hidden row, position 1
// code 0's embedding, and so on to code 14's; code 15 is never fed.
//
// Positions 0 and 1 are both known when the predictor starts. Up to four streams take them in one
// pass, position 0 in columns 0..3 and position 1 in columns 4..7; more streams take a pass more. Of position
// 0 only keys and values are wanted: that pass ends with the last layer's QKV, which the next pass reads.
#pragma once

#include "predictor_attention.cuh"
#include "talker.cuh"

namespace qwen_tts {

constexpr int kPaired = kMaxColumns / 2;  // streams that fit twice into the columns

// The talker's normed row as the predictor's input.
__device__ __forceinline__ void project_hidden(Context& c, const Residual<T>& hidden, Residual<P>& row) {
  if constexpr (!kProjects) {
#pragma unroll
    for (int j = 0; j < Residual<P>::kChunks; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) row.x[j][i] = hidden.x[j][i];
  } else {
    const FrameParams& p = c.p;
    uint64_t* projected = p.packets + PacketLayout::kProjected;
    gemv<Projection>(
        c,
        [&](int, int, uint2(&f)[Projection::kHeld]) {
#pragma unroll
          for (int j = 0; j < Projection::kHeld; ++j)
            f[j] = make_uint2(pack_bf16(hidden.x[j][0], hidden.x[j][1]), pack_bf16(hidden.x[j][2], hidden.x[j][3]));
        },
        [&](int strip, int, const Cell& cell, float2 rows, uint64_t*, float) {
          if (!c.finishes(cell)) return;
          const float2 b = unpack_bf16(reinterpret_cast<const uint32_t*>(p.projection_bias)[strip * 8 + cell.pair]);
          publish_at(c, projected + strip * kStripPackets + cell.packet, rows.x + b.x, rows.y + b.y,
                     strip * 16 + 2 * cell.pair, cell.column);
        });
    row.clear();
    row.template add_deltas<1>(c, projected, c.tag);
    c.advance();
  }
}

// The table that holds a codebook's embeddings, [vocab][talker hidden].
__device__ __forceinline__ const __nv_bfloat16* embedding_row(const FrameParams& p, int codebook, int code) {
  return codebook == 0 ? p.codec_embedding + int64_t(code) * T::kHidden
                       : p.predictor_embeddings + (int64_t(codebook - 1) * P::kVocab + code) * T::kHidden;
}

// A code's embedding as the predictor's next input.
__device__ __forceinline__ void feed_code(const FrameParams& p, int codebook, int code, Residual<P>& row) {
  row.clear();
  if (!Residual<P>::real()) return;
  // An EOS is beyond the projected table; what follows it in the frame is not used.
  row.add_bf16(kProjects ? p.projected_embeddings + (int64_t(codebook) * P::kVocab + min(code, P::kVocab - 1)) * P::kHidden
                         : embedding_row(p, codebook, code));
}

// The sum of a frame's embeddings, in the order of the codebooks, for the next frame; by one CTA a
// stream, which has seen all its codes.
__device__ __forceinline__ void sum_embeddings(const FrameParams& p) {
  const int stream = own_stream();
  if (stream >= p.num_columns) return;
  float* next = p.next_rows + int64_t(p.columns[stream].slot) * T::kHidden;
  for (int k = 2 * thread_index(); k < T::kHidden; k += 2 * kThreads) {
    uint32_t bits[kNumCodebooks];
#pragma unroll
    for (int codebook = 0; codebook < kNumCodebooks; ++codebook) {
      const int code = load_packet(p.packets + PacketLayout::kCodes + codebook * kMaxColumns + stream).x;
      bits[codebook] = __ldg(reinterpret_cast<const uint32_t*>(embedding_row(p, codebook, code) + k));
    }
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int codebook = 0; codebook < kNumCodebooks; ++codebook) {
      const float2 pair = unpack_bf16(bits[codebook]);
      sum.x += pair.x;
      sum.y += pair.y;
    }
    *reinterpret_cast<float2*>(next + k) = sum;
  }
}

// The rows that a pass adds.
__device__ __forceinline__ NewRows new_rows(const Context& c) {
  const bool both = c.pass() == 1, paired = c.p.num_columns <= kPaired;
  return {c.pass(), both && paired ? kPaired : 0, both && !paired && c.layer() == P::kLayers - 1};
}

// Codes 0..15 from the talker's logits and normed row; c's columns are the streams. A pass is named by
// the position of its last row; from its logits comes the code of that number.
__device__ __forceinline__ void predict(Context& c, SamplerShared& sampler, Residual<P>& row) {
  const FrameParams& p = c.p;
#pragma unroll 1
  for (c.begin_pass(p.num_columns <= kPaired ? 1 : 0);; c.begin_pass(c.pass() + 1)) {
    if (c.pass() > 0) {
      sample(c, sampler);
      // This lane's stream, or where its column has none, one that is there.
      const int mine = min(c.column() % (new_rows(c).first > 0 ? kPaired : kMaxColumns), p.num_columns - 1);
      const int code = sampled_code(c, c.pass() - 1, mine);
      if (c.pass() == kNumCodebooks) break;
      if (lane_index() % 4 == 0) c.scratch.codes[warp_index()][c.column()] = code;
      __syncwarp();
      if (c.column() >= new_rows(c).first) feed_code(p, c.pass() - 1, code, row);
    }
    c.use_columns(columns_of(p) | columns_of(p) << new_rows(c).first);
#pragma unroll 1
    while (c.layer() < P::kLayers)
      decoder_layer<P>(
          c, row, qkv_known(c.pass(), c.layer()), [&] { return c.pass() == 0 && c.layer() == P::kLayers - 1; },
          [&] { attend_predictor<P>(c, new_rows(c)); });
    if (c.pass() > 0) {
      lay_noise(c);
      head_logits<P>(c, row, [&] { return new_rows(c).first; });
    }
    c.use_columns(columns_of(p));
  }
  sync_compute();
  sum_embeddings(p);
}

}  // namespace qwen_tts
