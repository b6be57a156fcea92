// The visitor of the frame's schedule (frame_schedule.cuh) that fetches: one warp, whose lane w streams warp w's weights,
// and its keys and values of the talker's attention, in the order in which the frame uses them.
#pragma once

#include "attention_item.cuh"

namespace qwen_tts {

struct FrameFetch : FramePlace {
  RingWriter<FrameRing> ring;
  const FrameParams& p;
  const ItemRows* attended;     // this CTA's items
  uint64_t once, kept, normal;  // L2 policies

  // The items of one product, which begins at `from`; its first kept_bytes shall stay in L2.
  template <class Prod>
  __device__ __forceinline__ void items(const char* from, int64_t kept_bytes = 0) {
    from += lane_index() * (Prod::kItemBytes / kWarps);
    for (int item = block_index(); item < Prod::kItems; item += gridDim.x)
#pragma unroll 1
      for (int piece = 0; piece < Prod::kPieces; ++piece)
        ring.push(from + item * Prod::kItemBytes + piece * Prod::kPieceBytes, Prod::kPieceBytes, Prod::kPieceBytes,
                  item * Prod::kItemBytes < kept_bytes ? kept : once);
  }
  // A product of the current layer, which stands at kFrom among the layer's. What stays in L2 of a predictor's layer
  // begins with its QKV, but for the first layer's, which a frame reads once or twice.
  template <class D, class Prod, int64_t kFrom>
  __device__ __forceinline__ void layer_items() {
    using Layer = Products<D>;
    if constexpr (std::is_same_v<D, T>) {
      items<Prod>(p.talker_layers + layer() * Layer::kLayerBytes + kFrom);
    } else {
      const int64_t kept_from = layer() > 0 ? 0 : Layer::Qkv::kBytes;
      items<Prod>(p.predictor_layers + layer() * Layer::kLayerBytes + kFrom,
                  p.predictor_kept_bytes + kept_from - kFrom);
    }
  }
  template <class D>
  __device__ __forceinline__ void qkv() {
    layer_items<D, typename Products<D>::Qkv, 0>();
  }
  template <class D>
  __device__ __forceinline__ void out() {
    layer_items<D, typename Products<D>::Out, Products<D>::kOutFrom>();
  }
  template <class D>
  __device__ __forceinline__ void gate_up() {
    layer_items<D, typename Products<D>::GateUp, Products<D>::kGateUpFrom>();
  }
  template <class D>
  __device__ __forceinline__ void down() {
    layer_items<D, typename Products<D>::Down, Products<D>::kDownFrom>();
  }
  // What a talker layer's attention needs of the caches. The predictor's stays in the CTA.
  template <class D>
  __device__ __forceinline__ void attention() {
    if constexpr (std::is_same_v<D, T>) keys_and_values();
  }
  __device__ __forceinline__ void keys_and_values() {
    using Tile = TalkerTile;
#pragma unroll 1
    for (const ItemRows* rows_of = attended; AttentionItem{rows_of->bits}.exists(); ++rows_of) {
      const int first = AttentionItem{rows_of->bits}.split() * kSplitPositions + lane_index() * kTilePositions;
      const int rows = cached_rows(*rows_of, first), used = used_rows(*rows_of, first);
      const int64_t at = (cache_at<T>(p, layer(), *rows_of) + first * T::kHeadDim) * 2;
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
  template <class D>
  __device__ __forceinline__ void head() {
    if constexpr (std::is_same_v<D, T>) {
      items<TalkerProducts::Head>(p.talker_head);
    } else {
      items<PredictorProducts::Head>(p.predictor_heads + (pass() - 1) * PredictorProducts::Head::kBytes);
    }
  }
  __device__ __forceinline__ void projection() { items<Projection>(p.talker_head + TalkerProducts::Head::kBytes); }
};

__device__ __forceinline__ void fetch_frame(const FrameParams& p, FrameRing& ring, const ItemRows* attended) {
  FrameFetch fetch{
      {}, {ring, lane_index()}, p, attended, policy_evict_first(), policy_evict_last(), policy_evict_normal()};
  walk_frame(fetch, p.num_columns, p.prefill);
}

}  // namespace qwen_tts
