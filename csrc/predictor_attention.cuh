// The predictor's attention. An item is one key-value head of one stream, over the frame's positions, of which there
// are at most 16. Each warp takes one position. The same CTA writes and reads an item's keys and values.
#pragma once

#include "attention.cuh"

namespace qwen_tts {

template <class D>
struct PredictorAttentionShared {
  using S = HeadShape<D>;
  static constexpr int kParts = 4;  // a lane of four merges every fourth position
  float score[S::kGroupSize][kParts][kWarps / kParts];
  float q[S::kGroupSize][S::kDim];
  __nv_bfloat16 v[kWarps][S::kDim + 16];  // rows of neighbouring positions begin in different banks
};
static_assert(sizeof(PredictorAttentionShared<P>) <= sizeof(NarrowForm::Scratch::partial[0]),
              "attention borrows a tile");
static_assert(kWarps >= kNumCodebooks, "a warp takes a position");

// The new rows of a pass. The row at position `last` of stream s is in column first + s. If first is not 0, the row
// before it is new too, in column s. If `first_position` is set, pass 0 processed position 0, and the last layer's keys
// and values of that position are read in this pass.
struct NewRows {
  int last, first;
  bool first_position;

  __device__ __forceinline__ int column(int stream, int position) const {
    return position == last ? first + stream : stream;
  }
  __device__ __forceinline__ bool holds(int position) const {
    return position >= last - (first > 0 || first_position ? 1 : 0);
  }
};

// The row of the table (FrameParams::predictor_first_qkv) for the code that a stream feeds at this position.
template <class D, class Context>
__device__ __forceinline__ const __nv_bfloat16* known_qkv(const Context& c, int stream, int position) {
  const int64_t at = (position - 2) * D::kVocab + c.scratch.codes[warp_index()][stream];
  return c.p.predictor_first_qkv + at * Products<D>::Qkv::kRows;
}

template <class D, class Context>
__device__ __forceinline__ void attend_predictor_item(Context& c, int stream, int kv_head, const NewRows& rows) {
  using S = HeadShape<D>;
  using Row = HeadRow<S::kDim>;
  const FrameParams& p = c.p;
  using Shared = PredictorAttentionShared<D>;
  auto& sh = *reinterpret_cast<Shared*>(c.scratch.partial[kPredictorAttentionTile]);
  constexpr int kParts = Shared::kParts, kPerPart = kNumCodebooks / kParts;
  const int warp = warp_index();
  const int64_t head = (c.layer() * kMaxColumns + stream) * D::kKvHeads + kv_head;
  __nv_bfloat16* k_rows = p.predictor_kv + head * 2 * kNumCodebooks * S::kDim;
  __nv_bfloat16* v_rows = k_rows + kNumCodebooks * S::kDim;
  const __nv_bfloat16* qk_norm = p.predictor_qk_norms + c.layer() * 2 * S::kDim;

  // A warp without a new position prepares each query, and all warps use it.
  const int g = (warp - rows.last - 1) & (kWarps - 1);
  const bool known = qkv_from_table(rows.last, c.layer()), is_new = warp <= rows.last && rows.holds(warp);
  Row k, v;
  if (is_new) {
    const NormRope<S::kDim> by(qk_norm + S::kDim, p.predictor_rope + warp * S::kDim);
    Row kv[2];  // polled together, because each wait costs a memory round trip
    if (known) {
      const __nv_bfloat16* from = known_qkv<D>(c, stream, rows.last) + S::kQRows + kv_head * S::kDim;
      kv[0].load(from);
      kv[1].load(from + S::kKRows);
    } else {
      wait_rows(c, kv, S::kQRows + kv_head * S::kDim, S::kKRows, rows.column(stream, warp),
                rows.first_position && warp == 0);
    }
    kv[0].norm_rope(by, D::kEps);
    kv[0].round();
    kv[0].store(k_rows + warp * S::kDim);
    kv[1].store(v_rows + warp * S::kDim);
    k = kv[0];
    v = kv[1];
  } else {
    uint2 old_k = make_uint2(0, 0), old_v = make_uint2(0, 0);
    if (warp <= rows.last) {
      old_k = Row::fetch(k_rows + warp * S::kDim);
      old_v = Row::fetch(v_rows + warp * S::kDim);
    }
    if (g < S::kGroupSize) {
      const NormRope<S::kDim> by(qk_norm, p.predictor_rope + rows.last * S::kDim);
      Row q[1];
      const int first = (kv_head * S::kGroupSize + g) * S::kDim;
      if (known) {
        q[0].load(known_qkv<D>(c, stream, rows.last) + first);
      } else {
        wait_rows(c, q, first, 0, rows.column(stream, rows.last));
      }
      q[0].norm_rope(by, D::kEps);
      q[0].store(sh.q[g]);
    }
    k.set(old_k.x, old_k.y);
    v.set(old_v.x, old_v.y);
  }
  v.store(sh.v[warp]);
  sync_compute();
  if (warp <= rows.last) {
    float scores[S::kGroupSize];
#pragma unroll
    for (int i = 0; i < S::kGroupSize; ++i) {
      Row q;
      q.load(sh.q[i]);
      scores[i] = q.dot(k);
    }
    warp_sums(scores);
#pragma unroll
    for (int i = 0; i < S::kGroupSize; ++i)
      if (lane_index() == 0) sh.score[i][warp % kParts][warp / kParts] = scores[i] * rsqrtf(float(S::kDim));
  }
  sync_compute();
  constexpr int kPairs = S::kGroupSize * S::kDim / 2;
  static_assert(S::kDim / 2 % (32 / kParts) == 0, "a warp's pairs are of one head");
  for (int i = thread_index() / kParts; i < (rows.first > 0 ? 2 : 1) * kPairs; i += kThreads / kParts) {
    // The row before the last is at position 0 and attends only to itself. Its weight is one, whatever its score is.
    const int position = rows.last - i / kPairs, g = i % kPairs / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2));
    const int part = thread_index() % kParts;
    const float4 scores = *reinterpret_cast<const float4*>(sh.score[g][part]);
    float weight[kPerPart] = {scores.x, scores.y, scores.z, scores.w};
    float2 value[kPerPart];
#pragma unroll
    for (int j = 0; j < kPerPart; ++j) {
      const bool seen = part + kParts * j <= position;
      if (!seen) weight[j] = -INFINITY;
      value[j] = make_float2(0.f, 0.f);  // no warp wrote the rows beyond `position`
      if (seen) value[j] = unpack_bf16(*reinterpret_cast<const uint32_t*>(&sh.v[part + kParts * j][dim]));
    }
    const float maximum = max_of_four(fmaxf(fmaxf(weight[0], weight[1]), fmaxf(weight[2], weight[3])));
    float total = 0.f, low = 0.f, high = 0.f;
#pragma unroll
    for (int j = 0; j < kPerPart; ++j) {
      const float w = expf(weight[j] - maximum);
      total += w;
      low += w * value[j].x;
      high += w * value[j].y;
    }
    total = sum_of_four(total);
    low = sum_of_four(low);
    high = sum_of_four(high);
    const int row = (kv_head * S::kGroupSize + g) * S::kDim + dim;
    publish_heads(c, row, rows.column(stream, position), divide(low, total), divide(high, total));
  }
}

// Computes all items of this CTA in one layer. Reads the exchange c.tag - 1 and publishes c.tag.
template <class D, class Context>
__device__ __forceinline__ void attend_predictor(Context& c, const NewRows& rows) {
  free_tiles(c);
#pragma unroll 1
  for (int item = block_index(); item < c.p.num_columns * D::kKvHeads; item += gridDim.x) {
    if (item != block_index()) sync_compute();  // the last item's values have been read
    attend_predictor_item<D>(c, item / D::kKvHeads, item % D::kKvHeads, rows);
  }
}

}  // namespace qwen_tts
