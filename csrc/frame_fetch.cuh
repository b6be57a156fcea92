// The visitor of the frame's schedule (frame_schedule.cuh) that fetches: one warp, which streams the
// weights, and the keys and values of the talker's attention, in the order in which the frame uses them.
#pragma once

#include "attention_item.cuh"

namespace qwen_tts {

struct FrameFetch : FramePlace {
  RingWriter<FrameRing> ring;
  const FrameParams& p;
  const ItemRows* attended;     // this CTA's items
  uint64_t once, kept, normal;  // L2 policies

  // The items of one product, which begins at `from`; its first kept_bytes shall stay in L2. A lane fetches for the warps
  // that share a piece.
  template <class Prod>
  __device__ __forceinline__ void items(const char* from, int64_t kept_bytes = 0) {
    from += lane_index() * (Prod::kOwners * Prod::kPieces * Prod::kWarpPieceBytes);
    for (int item = block_index(); item < Prod::kItems; item += gridDim.x)
#pragma unroll 1
      for (int piece = 0; piece < Prod::kPieces; ++piece)
        ring.push(kWarps / Prod::kOwners, from + item * Prod::kItemBytes + piece * Prod::kWarpPieceBytes,
                  Prod::kPieceBytes, item * Prod::kItemBytes < kept_bytes ? kept : once);
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
  // A lane fetches for a warp.
  __device__ __forceinline__ void keys_and_values() {
    constexpr int kRowBytes = KvTile<T>::kRowBytes;
#pragma unroll 1
    for (const ItemRows* rows = attended; AttentionItem{rows->bits}.exists(); ++rows) {
      const int begin = AttentionItem{rows->bits}.begin(), of_lane = lane_index() * kTilePositions;
      const int first = begin + of_lane;
      const int64_t at = cache_at<T>(p, layer(), *rows) * 2 + of_lane * kRowBytes;
      const int bytes = max(0, min(kTilePositions, cached_rows(*rows, first))) * kRowBytes;
      ring.push(warps_with_rows(cached_rows(*rows, begin)), reinterpret_cast<const char*>(p.k_cache) + at, bytes,
                normal);
      // Rows of this launch find room in a tile of values.
      ring.push(warps_with_rows(used_rows(*rows, begin)), reinterpret_cast<const char*>(p.v_cache) + at, bytes, normal);
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
  FrameFetch fetch{{}, {ring}, p, attended, policy_evict_first(), policy_evict_last(), policy_evict_normal()};
  walk_frame(fetch, p.num_columns, p.prefill);
}

}  // namespace qwen_tts
