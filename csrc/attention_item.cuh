// The work items of the talker's attention. An item is a column, a key-value head and a split of kSplitPositions
// positions. One CTA computes an item. A CTA lists its items once a frame. Computing warps and the fetching warp both
// use the list.
#pragma once

#include "context.cuh"

namespace qwen_tts {

static_assert(kSplitPositions == kWarps * kTilePositions, "an item is a tile a warp");

struct AttentionItem {
  static constexpr uint32_t kNone = ~0u;
  uint32_t bits;  // one register over all waits: column, key-value head, split, place in the CTA's list

  __device__ __forceinline__ bool exists() const { return bits != kNone; }
  __device__ __forceinline__ void forget_derived() { opaque(bits); }  // frees registers that hold derived values
  __device__ __forceinline__ int column() const { return bits & 0xff; }
  __device__ __forceinline__ int kv_head() const { return bits >> 8 & 0xff; }
  __device__ __forceinline__ int split() const { return bits >> 16 & 0xff; }
  __device__ __forceinline__ int place() const { return bits >> 24; }

  // The first position of the item, and of this warp's part. Computed at each use, to save registers.
  __device__ __forceinline__ int begin() const { return split() * kSplitPositions; }
  __device__ __forceinline__ int first_position() const {
    return split() * kSplitPositions + warp_index() * kTilePositions;
  }
  template <class Context>
  __device__ __forceinline__ const ItemRows& rows(const Context& c) const {
    return c.scratch.items[place()];
  }

  // Whether both items have the same queries and the same new keys and values.
  __device__ __forceinline__ bool same_rows(const AttentionItem& other) const {
    return ((bits ^ other.bits) & 0xffff) == 0;
  }

  // Whether this CTA's list has split `other_split` of the same column and head, at this place or later.
  template <int kMaxItems>
  __device__ __forceinline__ bool leads_to(const ItemRows (&items)[kMaxItems], int other_split) const {
    if (other_split < split()) return false;
    const AttentionItem other{items[min(place() + other_split - split(), kMaxItems - 1)].bits};
    return other.exists() && same_rows(other);
  }

  // The item at `place` in this CTA's list, or kNone. A CTA has consecutive items. Splits of one head are neighbours,
  // so that their queries are read once.
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

// Lists the items of this CTA, which are the same in all layers of a frame. The first kThreads threads call it once.
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

// The first element of an item's page. The index is the same in the key cache and in the value cache.
template <class D>
__device__ __forceinline__ int64_t cache_at(const FrameParams& p, int layer, const ItemRows& rows) {
  return (layer * p.num_pages * D::kKvHeads + rows.page) * int64_t(kSplitPositions * D::kHeadDim);
}

// Both count rows of the item from position `first` on. used_rows counts all rows that the stream has. cached_rows
// counts those that are in the cache and come through the ring. Both may be negative or, for a warp, more than its tile
// holds.
__device__ __forceinline__ int used_rows(const ItemRows& rows, int first) { return rows.end - first; }
__device__ __forceinline__ int cached_rows(const ItemRows& rows, int first) {
  return min(rows.end, rows.first_new) - first;
}

}  // namespace qwen_tts
