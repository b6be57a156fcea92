// The inputs of the code predictor: the talker's hidden row, then the embeddings of codes 0 to 14. Code 15 is not fed.
#pragma once

#include "talker.cuh"

namespace qwen_tts {

// Projects the talker's hidden row to the width of the predictor. The result is the predictor's first input.
__device__ __forceinline__ void project_hidden(Context& c, const Residual<T>& hidden, Residual<P>& row) {
  const FrameParams& p = c.p;
  uint64_t* projected = p.packets + PacketLayout::kProjected;
  gemv<Projection, LastTile>(
      c,
      [&](int /*split*/, int /*first_chunk*/, uint2(&f)[Projection::kHeld]) {
#pragma unroll
        for (int j = 0; j < Projection::kHeld; ++j)
          f[j] = make_uint2(pack_bf16(hidden.x[j][0], hidden.x[j][1]), pack_bf16(hidden.x[j][2], hidden.x[j][3]));
      },
      [&](int strip, int /*split*/, const float4& quad, uint64_t* /*packets*/, float /*squares*/) {
        const __nv_bfloat16* const bias = p.projection_bias + strip * kStripRows + quad_row();
        const float of_row = __bfloat162float(bias[0]), further = __bfloat162float(bias[8]);
        const float2 low = word_rows(quad.x + of_row, quad.y + of_row);
        const float2 high = word_rows(quad.z + further, quad.w + further);
        if (!c.uses(word_column())) return;
        publish_two(c, projected + strip * kStripPackets + word_packets(), low, high,
                    strip * kStripRows + 2 * word_pair(), word_column());
      });
  row.clear();
  row.template add_deltas<1>(c, projected, c.tag);
}

// The embedding of a code, [talker hidden].
__device__ __forceinline__ const __nv_bfloat16* embedding_row(const FrameParams& p, int codebook, int code) {
  return codebook == 0 ? p.codec_embedding + int64_t(code) * T::kHidden
                       : p.predictor_embeddings + (int64_t(codebook - 1) * P::kVocab + code) * T::kHidden;
}

// Feeds a code's embedding to the predictor.
__device__ __forceinline__ void feed_code(const FrameParams& p, int codebook, int code, Residual<P>& row) {
  row.clear();
  if (!Residual<P>::real()) return;
  // EOS is beyond the projected table. The rest of its frame is not used.
  row.add_bf16(kProjects
                   ? p.projected_embeddings + (int64_t(codebook) * P::kVocab + min(code, P::kVocab - 1)) * P::kHidden
                   : embedding_row(p, codebook, code));
}

// Sums a frame's embeddings in the order of the codebooks, and stores the sum for the next frame. For each stream, the
// CTA that has drawn the stream's codes does this.
__device__ __forceinline__ void sum_embeddings(const FrameParams& p, int stream) {
  float* next = p.next_rows + int64_t(p.streams[stream].slot) * T::kHidden;
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

}  // namespace qwen_tts
