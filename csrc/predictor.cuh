// The code predictor's passes over its layers. Position 0 is the talker's hidden row, position 1
// code 0's embedding, and so on to code 14's; code 15 is never fed.
//
// Positions 0 and 1 are both known when the predictor starts. Up to four streams take them in one
// pass, position 0 in columns 0..3 and position 1 in columns 4..7; more streams take a pass more.
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
        c.ring, c.scratch, c.buffer,
        [&](int, int, uint2(&f)[Projection::kHeld]) {
#pragma unroll
          for (int j = 0; j < Projection::kHeld; ++j)
            f[j] = make_uint2(pack_bf16(hidden.x[j][0], hidden.x[j][1]), pack_bf16(hidden.x[j][2], hidden.x[j][3]));
        },
        [&](int strip, int, const Cell& cell, float2 rows) {
          if (!c.uses(cell.column)) return;
          const float2 b = unpack_bf16(reinterpret_cast<const uint32_t*>(p.projection_bias)[strip * 8 + cell.pair]);
          const int at = strip * 16 + 2 * cell.pair;
          publish_pair(p, projected, at, cell.column, rows.x + b.x, rows.y + b.y, c.tag, at);
        });
    row.clear();
    row.template add_deltas<1>(c, projected, c.tag);
    __syncwarp();
    c.advance();
  }
}

// A code's embedding into the sum for the next frame, which one CTA keeps in memory: adds without
// an answer, in the order of the codebooks.
__device__ __forceinline__ void add_to_next_row(const FrameParams& p, const __nv_bfloat16* embedding, int codebook,
                                                int stream) {
  float* next = p.next_rows + int64_t(p.columns[stream].slot) * T::kHidden;
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

// The code of `stream` into the sum for the next frame and, where this lane's column is `column`
// of that stream, into `row` as the predictor's next input.
__device__ __forceinline__ void feed_code(const Context& c, int codebook, int code, int stream, bool feeds,
                                          Residual<P>& row) {
  const FrameParams& p = c.p;
  if (!feeds) return;
  row.clear();
  const __nv_bfloat16* embedding =
      codebook == 0 ? p.codec_embedding + int64_t(code) * T::kHidden
                    : p.predictor_embeddings + (int64_t(codebook - 1) * P::kVocab + code) * T::kHidden;
  if (blockIdx.x == gridDim.x - 1 && Residual<T>::real()) add_to_next_row(p, embedding, codebook, stream);
  if constexpr (kProjects) {
    // An EOS is beyond the table; what follows it in the frame is not used.
    embedding = p.projected_embeddings + (int64_t(codebook) * P::kVocab + min(code, P::kVocab - 1)) * P::kHidden;
  }
  if (Residual<P>::real() && codebook < kNumCodebooks - 1) row.add_bf16(embedding);
}

// One pass over the predictor's layers.
__device__ __forceinline__ void predictor_layers(Context& c, Residual<P>& r, const NewRows& rows) {
#pragma unroll 1
  for (int layer = 0; layer < P::kLayers; ++layer)
    decoder_layer<P>(c, r, c.p.predictor_norms + int64_t(layer) * 2 * P::kHidden, layer > 0,
                     [&] { attend_predictor<P>(c, layer, rows); });
}

// Codes 1..15 from the talker's normed row and code 0; c.columns are the streams.
__device__ __forceinline__ void predict(Context& c, SamplerShared& sampler, Residual<P>& row) {
  const FrameParams& p = c.p;
  const bool paired = p.num_columns <= kPaired;
  const uint32_t streams = c.columns;
  NewRows rows{1, paired ? kPaired : 0};
  int mine = c.column() % (paired ? kPaired : kMaxColumns);  // this lane's stream
  int code = sample<T::kVocab>(c, sampler, 0, mine);
  if (!paired) predictor_layers(c, row, {0, 0});
#pragma unroll 1
  for (int codebook = 0;; ++codebook) {
    feed_code(c, codebook, code, mine, mine < p.num_columns && c.column() == rows.first + mine, row);
    if (codebook == kNumCodebooks - 1) break;
    c.columns = streams | streams << rows.first;
    predictor_layers(c, row, rows);
    Gamma<P> gamma;
    head_logits<P>(c, row, p.predictor_norms + int64_t(P::kLayers) * 2 * P::kHidden, rows.first, gamma);
    c.squares ^= 1;
    c.columns = streams;
    rows = {codebook + 2, 0};
    mine = c.column();
    code = sample<P::kVocab>(c, sampler, codebook + 1, mine);
  }
}

}  // namespace qwen_tts
