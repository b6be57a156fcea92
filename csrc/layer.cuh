// One decoder layer, for the talker and for the predictor: five exchanges.
//
//   QKV        every CTA  polls the residual's deltas, multiplies its rows of Wq, Wk and Wv, publishes the results
//   attention  one CTA for each item (column, key-value head, split)      [attention.cuh]
//   O          every CTA  polls the heads' output, publishes deltas (k in two parts if there are few rows)
//   gate-up    every CTA  polls the deltas of O, publishes silu(gate) * up
//   down       every CTA  polls gate-up's result, publishes deltas
//
// frame_schedule.cuh has their order. Every CTA keeps the whole residual (residual.cuh).
#pragma once

#include "residual.cuh"

namespace qwen_tts {

// x / (1 + exp(-x)). The exponent is limited to 80, where the result is negligible in bf16.
__device__ __forceinline__ float silu(float x) { return divide(x, 1.f + expf(fminf(-x, 80.f))); }

// Waits for the B operand of a product whose input is a published vector. `first` is the first chunk, counted in this
// warp's part of k.
template <class Prod>
__device__ __forceinline__ void wait_fragments(const Context& c, const uint64_t* vector, int split, int first,
                                               uint32_t tag, Phase phase, uint2 (&f)[Prod::kHeld]) {
  if (!Prod::real(warp_index())) {
#pragma unroll
    for (int j = 0; j < Prod::kHeld; ++j) f[j] = make_uint2(0, 0);
    return;
  }
  TwoPackets v[1][Prod::kHeld];
  const int chunk = split * Prod::kRealChunks + warp_index() * Prod::kChunks + first;
  wait_pairs(vector + (chunk * 32 + c.polled_lane()) * 2, 0, tag, v, c.dog, phase);
#pragma unroll
  for (int j = 0; j < Prod::kHeld; ++j) f[j] = make_uint2(v[0][j].first(), v[0][j].second());
}

// The steps of one layer, for computing warps. Each step reads the previous exchange, under c.tag - 1, and publishes
// under c.tag. QKV adds the deltas of the previous layer's down projection to the residual; layer 0 has none. gate_up
// adds those of O. Those of this layer's down projection are left to the next layer or to the head.
namespace layer_step {

// `first_position()`: whether this is the QKV that ends pass 0. Its readers wait for a tag that is kFirstPositionDelay
// higher.
template <class D, class FirstPosition>
__device__ __forceinline__ void qkv(Context& c, Residual<D>& r, FirstPosition&& first_position) {
  using L = PacketLayout;
  using Qkv = typename Products<D>::Qkv;
  gemv<Qkv, FirstTiles, 0>(
      c,
      [&](int /*split*/, int /*first_chunk*/, uint2(&f)[Qkv::kHeld]) {
        if (c.layer() > 0) r.template add_deltas<Products<D>::Down::kSplit>(c, c.p.packets + L::kDeltaDown, c.tag - 1);
        normed_fragments<D>(c, r, 0, f);
      },
      [&](int strip, int /*split*/, const float4& quad, uint64_t* packets, float squares) {
        const float2 scale = quad_scale<D>(squares);
        const float2 low = word_rows(quad.x * scale.x, quad.y * scale.y);
        const float2 high = word_rows(quad.z * scale.x, quad.w * scale.y);
        if (!c.uses(word_column())) return;
        publish_two(
            c, packets + (first_position() ? L::kFirstPositionQkv : L::kQkv) + strip * kStripPackets + word_packets(),
            low, high, strip * kStripRows + 2 * word_pair(), word_column(), first_position() ? kFirstPositionDelay : 0);
      });
}

// Projects the published `input` back to the residual's width, in kSplit parts of k. Publishes the deltas at `output`.
template <class D, class Prod>
__device__ __forceinline__ void deltas(Context& c, int64_t input, int64_t output, Phase phase) {
  gemv<Prod, LastTile>(
      c,
      [&](int split, int first_chunk, uint2(&f)[Prod::kHeld]) {
        wait_fragments<Prod>(c, c.p.packets + input, split, first_chunk, c.tag - 1, phase, f);
      },
      [&](int strip, int split, const float4& quad, uint64_t* packets, float /*squares*/) {
        const float2 low = word_rows(quad.x, quad.y), high = word_rows(quad.z, quad.w);
        if (!c.uses(word_column())) return;
        publish_two(
            c,
            packets + output + split * vector_packets(PacketLayout::kHidden) + strip * kStripPackets + word_packets(),
            low, high, split * D::kHidden + strip * kStripRows + 2 * word_pair(), word_column());
      });
}

template <class D>
__device__ __forceinline__ void out(Context& c) {
  deltas<D, typename Products<D>::Out>(c, PacketLayout::kHeadsOut, PacketLayout::kDeltaO, Phase::kOut);
}

template <class D>
__device__ __forceinline__ void down(Context& c) {
  deltas<D, typename Products<D>::Down>(c, PacketLayout::kMlpInner, PacketLayout::kDeltaDown, Phase::kMlp);
}

template <class D>
__device__ __forceinline__ void gate_up(Context& c, Residual<D>& r) {
  using L = PacketLayout;
  using GateUp = typename Products<D>::GateUp;
  gemv<GateUp, WideTiles, 1>(
      c,
      [&](int /*split*/, int /*first_chunk*/, uint2(&f)[GateUp::kHeld]) {
        r.template add_deltas<Products<D>::Out::kSplit>(c, c.p.packets + L::kDeltaO, c.tag - 1);
        normed_fragments<D>(c, r, 1, f);
      },
      [&](int strip, int /*split*/, const float4& quad, uint64_t* packets, float squares) {
        // Rows 0..7 of a strip are gates. Rows 8..15 are the ups of the same eight. So two strips make one strip of the
        // vector.
        const float2 scale = quad_scale<D>(squares);
        const float2 inner =
            word_rows(silu(quad.x * scale.x) * (quad.z * scale.x), silu(quad.y * scale.y) * (quad.w * scale.y));
        if (!c.uses(word_column())) return;
        const int at =
            strip / 2 * kStripPackets + 8 * word_column() + 4 * (strip % 2) + word_pair();  // see weight_packing.py
        publish_at(c, packets + L::kMlpInner + at, inner.x, inner.y, strip * (kStripRows / 2) + 2 * word_pair(),
                   word_column());
      });
}

}  // namespace layer_step

}  // namespace qwen_tts
