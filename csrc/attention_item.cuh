// What the talker's attention is cut into: an item is a column, a key-value head and a split of kSplitPositions
// positions, which one CTA computes. Which items a CTA has is worked out once a frame, for those that compute and for
// the warp that fetches.
#pragma once

#include "context.cuh"

namespace qwen_tts {

static_assert(kSplitPositions == kWarps * kTilePositions, "an item is a tile a warp");

struct AttentionItem {
  static constexpr uint32_t kNone = ~0u;
  uint32_t bits;  // one register over all waits: column, key-value head, split, place in the CTA's list

  __device__ __forceinline__ bool exists() const { return bits != kNone; }
  __device__ __forceinline__ void forget_derived() { opaque(bits); }  // computed from it: not kept in registers
  __device__ __forceinline__ int column() const { return bits & 0xff; }
  __device__ __forceinline__ int kv_head() const { return bits >> 8 & 0xff; }
  __device__ __forceinline__ int split() const { return bits >> 16 & 0xff; }
  __device__ __forceinline__ int place() const { return bits >> 24; }

  // Of the item, and of this warp's part. Computed where it is needed, and not kept.
  __device__ __forceinline__ int begin() const { return split() * kSplitPositions; }
  __device__ __forceinline__ int first_position() const {
    return split() * kSplitPositions + warp_index() * kTilePositions;
  }
  template <class Context>
  __device__ __forceinline__ const ItemRows& rows(const Context& c) const {
    return c.scratch.items[place()];
  }

  // Whether it has the same queries, and the same keys and values of this launch.
  __device__ __forceinline__ bool same_rows(const AttentionItem& other) const {
    return ((bits ^ other.bits) & 0xffff) == 0;
  }

  // Whether this CTA has a split of the same head from here on, in its list.
  template <int kMaxItems>
  __device__ __forceinline__ bool leads_to(const ItemRows (&items)[kMaxItems], int other_split) const {
    if (other_split < split()) return false;
    const AttentionItem other{items[min(place() + other_split - split(), kMaxItems - 1)].bits};
    return other.exists() && same_rows(other);
  }

  // The one at a place in this CTA's list, or kNone. Each CTA has a run of them, the splits of one head first:
  // their queries are read once.
  static __device__ __forceinline__ uint32_t find(const FrameParams& p, int kv_heads, int place) {
    int total = 0;
    for (int column = 0; column < p.num_columns; ++column) total += kv_heads * splits(p, column);
    const int run = (total + gridDim.x - 1) / gridDim.x;
    if (place >= run) return kNone;
    int item = block_index() * run + place;
    for (int column = 0; column < p.num_columns; ++column) {
      const int count = splits(p, column);
      if (item < kv_heads * count) return column | item / count << 8 | item % count << 16 | place << 24;
      item -= kv_heads * count;
    }
    return kNone;
  }
  static __device__ __forceinline__ int splits(const FrameParams& p, int column) {
    return p.streams[column].position / kSplitPositions + 1;
  }
};
static_assert(kMaxSplits <= 256 && kMaxColumns <= 256 && max_items(kMaxColumns) <= 257,
              "an item's numbers have eight bits");

// The items of this CTA, which are the same in all layers of a frame. By the first kThreads threads, once.
template <class D, class Scratch>
__device__ __forceinline__ void list_items(const FrameParams& p, Scratch& scratch) {
  for (int place = thread_index(); place < Scratch::kMaxItems; place += kThreads) {
    const AttentionItem item{AttentionItem::find(p, D::kKvHeads, place)};
    ItemRows rows{item.bits, 0, 0, 0};  // of none, no rows
    if (item.exists()) {
      const Stream& own = p.streams[item.column()];
      const int of_a_slot = ceil_div(p.max_positions, kSplitPositions);
      rows.page = item.kv_head() * p.num_pages + p.page_table[own.slot * of_a_slot + item.split()];
      rows.end = min((item.split() + 1) * kSplitPositions, own.position + 1);
      rows.first_new = p.streams[own.first].position;
    }
    scratch.items[place] = rows;
  }
}

// Where an item's keys and values begin in their caches: a page holds them.
template <class D>
__device__ __forceinline__ int64_t cache_at(const FrameParams& p, int layer, const ItemRows& rows) {
  return (layer * p.num_pages * D::kKvHeads + rows.page) * int64_t(kSplitPositions * D::kHeadDim);
}

// Of the positions from `first` on, an item's or a warp's: those that the stream has, and those of them that are in the cache
// and come through the ring. Either may be negative, or more than the item or the warp has.
__device__ __forceinline__ int used_rows(const ItemRows& rows, int first) { return rows.end - first; }
__device__ __forceinline__ int cached_rows(const ItemRows& rows, int first) {
  return min(rows.end, rows.first_new) - first;
}

}  // namespace qwen_tts
