// The visitor of the frame's schedule (frame_schedule.cuh) for the fetching warp. It streams the weights, and the keys
// and values of the talker's attention, in the order in which the frame uses them.
#pragma once

#include "attention_item.cuh"

namespace qwen_tts {

template <class Form>
struct FrameFetch : FramePlace {
  RingWriter<typename Form::Ring> ring;
  const FrameParams& p;
  const ItemRows* attended;  // this CTA's items

  // Fetches an item of a product whose weights begin at `from`. The product's first kept_bytes should stay in L2. A
  // piece is for the warps that share it.
  template <class Prod>
  __device__ __forceinline__ void one_item(const char* from, int item, int64_t kept_bytes) {
    constexpr int kStride = Prod::kOwners * Prod::kPieces * Prod::kWarpPieceBytes;
#pragma unroll 1
    for (int piece = 0; piece < Prod::kPieces; ++piece)
      ring.template push<kStride, Prod::kPieceBytes>(kWarps / Prod::kOwners,
                                                     from + item * Prod::kItemBytes + piece * Prod::kWarpPieceBytes,
                                                     item * Prod::kItemBytes < kept_bytes ? Keep::kKept : Keep::kOnce);
  }
  // Fetches this CTA's items of a product.
  template <class Prod>
  __device__ __forceinline__ void items(const char* from, int64_t kept_bytes = 0) {
    for (int item = block_index(); item < Prod::kItems; item += gridDim.x) one_item<Prod>(from, item, kept_bytes);
  }
  // Fetches this CTA's strips of a product, each with all its parts of k.
  template <class Prod>
  __device__ __forceinline__ void strips(int first, const char* from, int64_t kept_bytes) {
    for (int strip = first; strip < Prod::kStrips; strip += gridDim.x)
#pragma unroll 1
      for (int part = 0; part < Prod::kSplit; ++part) one_item<Prod>(from, part * Prod::kStrips + strip, kept_bytes);
  }
  // The weights of a product of the current layer. They begin kFrom bytes after the layer's first.
  template <class D, int64_t kFrom>
  __device__ __forceinline__ const char* product() const {
    return (is_same<D, T> ? p.talker_layers : p.predictor_layers) + layer() * Products<D>::kLayerBytes + kFrom;
  }
  // How many of the product's first bytes should stay in L2. The kept part of a predictor layer begins with its QKV. In
  // the first layer QKV does not count, because a frame reads it only once or twice.
  template <class D, int64_t kFrom>
  __device__ __forceinline__ int64_t kept_bytes() const {
    if constexpr (is_same<D, T>) return 0;
    return p.predictor_kept_bytes + (layer() > 0 ? 0 : Products<D>::Qkv::kBytes) - kFrom;
  }
  template <class D, class Prod, int64_t kFrom>
  __device__ __forceinline__ void layer_items() {
    items<Prod>(product<D, kFrom>(), kept_bytes<D, kFrom>());
  }
  // Fetches for a product that adds to the residual. In a wide frame its strips have owners (wide_layer.cuh).
  template <class D, class Prod, int64_t kFrom>
  __device__ __forceinline__ void added_items(int first) {
    if constexpr (Form::kWide) {
      strips<Prod>(first, product<D, kFrom>(), kept_bytes<D, kFrom>());
    } else {
      layer_items<D, Prod, kFrom>();
    }
  }
  template <class D>
  __device__ __forceinline__ void qkv() {
    layer_items<D, typename Products<D>::Qkv, 0>();
  }
  template <class D>
  __device__ __forceinline__ void out() {
    added_items<D, typename Products<D>::Out, Products<D>::kOutFrom>(out_owner_first());
  }
  template <class D>
  __device__ __forceinline__ void gate_up() {
    layer_items<D, typename Products<D>::GateUp, Products<D>::kGateUpFrom>();
  }
  template <class D>
  __device__ __forceinline__ void down() {
    added_items<D, typename Products<D>::Down, Products<D>::kDownFrom>(down_owner_first<D>());
  }
  // Fetches the cached keys and values for a talker layer's attention. The predictor's do not come through the ring.
  template <class D>
  __device__ __forceinline__ void attention() {
    if constexpr (is_same<D, T>) keys_and_values();
  }
  // A piece is for one warp.
  __device__ __forceinline__ void keys_and_values() {
    constexpr int kRowBytes = KvTile<T>::kRowBytes, kTileBytes = kTilePositions * kRowBytes;
#pragma unroll 1
    for (const ItemRows* rows = attended; AttentionItem{rows->bits}.exists(); ++rows) {
      const int begin = AttentionItem{rows->bits}.begin(), cached = cached_rows(*rows, begin);
      const int64_t at = cache_at<T>(p, layer(), *rows) * 2;
      ring.template push_part<kTileBytes>(warps_with_rows(cached), reinterpret_cast<const char*>(p.k_cache) + at,
                                          cached * kRowBytes, Keep::kNormal);
      // A tile of values also has room for rows of this launch (complete_values).
      ring.template push_part<kTileBytes>(warps_with_rows(used_rows(*rows, begin)),
                                          reinterpret_cast<const char*>(p.v_cache) + at, cached * kRowBytes,
                                          Keep::kNormal);
    }
  }
  template <class D>
  __device__ __forceinline__ void head() {
    if constexpr (is_same<D, T>) {
      items<TalkerProducts::Head>(p.talker_head);
    } else {
      items<PredictorProducts::Head>(p.predictor_heads + (pass() - 1) * PredictorProducts::Head::kBytes);
    }
  }
  __device__ __forceinline__ void projection() { items<Projection>(p.talker_head + TalkerProducts::Head::kBytes); }
};

template <class Form>
__device__ __forceinline__ void fetch_frame(const FrameParams& p, typename Form::Ring& ring, const ItemRows* attended) {
  FrameFetch<Form> fetch{{}, {ring}, p, attended};
  walk_frame(fetch, p.num_columns, p.prefill);
  if constexpr (kLanesCopy) {  // a warp does not end before its copies
    cp_async_commit();
    cp_async_wait<0>();
  }
}

}  // namespace qwen_tts
