// The talker's attention: the queries of new rows over a long KV cache, split by position. A CTA processes its items
// one after the other, and each warp takes sixteen positions. Positions alone define the splits, so a stream's sums
// depend neither on the other streams nor on the grid.
//
// Cached keys and values come through the weight ring, in the order in which the items use them. The ring requests them
// early, because memory latency is high while weights stream. Keys and values of this launch (one row a frame, up to
// eight in a prefill) come from the QKV exchange, through shared memory.
#pragma once

#include "attention_tile.cuh"
#include "head_exchange.cuh"

namespace qwen_tts {

constexpr int kAtOnce = 2;  // splits that a lane polls together
static_assert(kWarps == 16, "a lane's share of a merge is four warps of sixteen");

// Writes the query rows and this launch's keys and values of the item's stream to shared memory. Queries and keys are
// normed and rotated. All are rounded to bf16, as in the cache.
template <class D, class Context>
__device__ __forceinline__ void read_new_rows(Context& c, NewRowsShared<D>& sh, const AttentionItem& item) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  const int warp = warp_index();
  const Stream& own = p.streams[item.column()];
  const __nv_bfloat16* qk_norm = p.talker_qk_norms + c.layer() * 2 * S::kDim;
  // The last warps do this: their tiles are the last to fill.
  const int g = kWarps - 2 - warp;
  if (g >= 0 && g < S::kGroupSize) {
    HeadRow<S::kDim> q[1];
    const NormRope<S::kDim> by(qk_norm, p.talker_rope + int64_t(own.position) * S::kDim);
    wait_rows(c, q, (item.kv_head() * S::kGroupSize + g) * S::kDim, 0, item.column());
    q[0].norm_rope(by, D::kEps);
    q[0].store(sh.q[g]);
  }
  const int column = own.first + (kWarps - 1 - warp);
  if (column <= item.column()) {
    HeadRow<S::kDim> kv[2];
    const int position = p.streams[column].position;
    const NormRope<S::kDim> by(qk_norm + S::kDim, p.talker_rope + int64_t(position) * S::kDim);
    wait_rows(c, kv, S::kQRows + item.kv_head() * S::kDim, S::kKRows, column);
    kv[0].norm_rope(by, D::kEps);
    kv[0].store(sh.k[column - own.first]);
    kv[1].store(sh.v[column - own.first]);
  }
}

// Copies the new row of the item's column from shared memory to the cache. The CTA that has the row's split does this.
template <class D, class Context>
__device__ __forceinline__ void keep_new_row(const Context& c, const NewRowsShared<D>& sh, const AttentionItem& item) {
  constexpr int kWords = D::kHeadDim / 8;
  const FrameParams& p = c.p;
  if (warp_index() != kWarps - 1) return;
  const int position = p.streams[item.column()].position, row = position - item.rows(c).first_new;
  const int split = position / kSplitPositions;
  if (!item.leads_to(c.scratch.items, split) || lane_index() >= 2 * kWords) return;
  const bool of_keys = lane_index() < kWords;
  const int word = lane_index() % kWords;
  const ItemRows& rows = c.scratch.items[item.place() + split - item.split()];
  const int64_t at =
      cache_at<D>(p, c.layer(), rows) + position % kSplitPositions * D::kHeadDim + 8 * (word ^ swizzle(position));
  *reinterpret_cast<uint4*>((of_keys ? p.k_cache : p.v_cache) + at) =
      reinterpret_cast<const uint4*>((of_keys ? sh.k : sh.v)[row])[word];
}

// Merges the results of the warps, always in warp order, and publishes the output of the heads. If the stream has
// several splits, publishes this split's partial result.
template <class D, class Context>
__device__ __forceinline__ void finish_item(Context& c, const AttentionShared<D>& sh, const AttentionItem& item) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  const bool whole = p.streams[item.column()].position < kSplitPositions;
  uint64_t* part =
      p.packets + PacketLayout::kPartials +
      (int64_t(item.column() * D::kKvHeads + item.kv_head()) * kMaxSplits + item.split()) * PacketLayout::kPartial;
  constexpr int kPairs = S::kGroupSize * S::kDim / 2;
  constexpr int kParts = 4, kPerPart = kWarps / kParts;  // four neighbouring lanes each merge a quarter of the warps
  static_assert(S::kDim / 2 % (32 / kParts) == 0, "a warp's pairs are of one head");
  const int i = thread_index() / kParts;
  if (i >= kPairs) return;
  const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2)), first = thread_index() % kParts * kPerPart;
  const float4 m = *reinterpret_cast<const float4*>(sh.maximum[g] + first);
  const float4 sums = *reinterpret_cast<const float4*>(sh.total[g] + first);
  const float maximum = max_of_four(fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w)));
  // 0 for a warp without positions
  const float share[kPerPart] = {expf(m.x - maximum), expf(m.y - maximum), expf(m.z - maximum), expf(m.w - maximum)};
  const float total = sum_of_four(share[0] * sums.x + share[1] * sums.y + share[2] * sums.z + share[3] * sums.w);
  const int low = ValueOrder<D>::at_dim(first, dim),
            high = ValueOrder<D>::at_dim(first, dim + 1);  // the same for all of a part
  float2 out = make_float2(0.f, 0.f);
#pragma unroll
  for (int j = 0; j < kPerPart; ++j) {
    out.x += share[j] * sh.out[first + j][g][low];
    out.y += share[j] * sh.out[first + j][g][high];
  }
  out.x = sum_of_four(out.x);
  out.y = sum_of_four(out.y);
  if (whole) {
    const int row = (item.kv_head() * S::kGroupSize + g) * S::kDim + dim;
    publish_heads(c, row, item.column(), divide(out.x, total), divide(out.y, total));
  } else if (first == 0) {
    uint64_t* to = part + g * (S::kDim + 2);
    store_packet(to + dim, __float_as_uint(out.x), c.tag);
    store_packet(to + dim + 1, __float_as_uint(out.y), c.tag);
    if (dim == 0) {
      store_packet(to + S::kDim, __float_as_uint(maximum), c.tag);
      store_packet(to + S::kDim + 1, __float_as_uint(total), c.tag);
    }
  }
}

// The new rows lie in the tile that O uses next. The tile is free before attention, and again after the barrier in the
// last item.
template <class D, class Context>
__device__ __forceinline__ NewRowsShared<D>& new_rows(const Context& c) {
  return *reinterpret_cast<NewRowsShared<D>*>(c.scratch.partial[LastTile::kFirst]);
}

// Reads the keys of the item at `place` in the list. The entry that ends the list has no rows.
template <class D, class Context>
__device__ __forceinline__ void read_item_keys(Context& c, Tile<D>& tile, int place) {
  const ItemRows rows = c.scratch.items[place];
  tile.read_keys(c.ring, cached_rows(rows, AttentionItem{rows.bits}.begin()));
}

// Computes one item. Its keys are in registers and its new rows in shared memory.
template <class D, class Context>
__device__ __forceinline__ void attend_item(Context& c, Tile<D>& tile, AttentionItem item) {
  using S = HeadShape<D>;
  const NewRowsShared<D>& fresh = new_rows<D>(c);
  auto& sh = *reinterpret_cast<AttentionShared<D>*>(c.scratch.partial);
  {
    const ItemRows rows = item.rows(c);
    tile.take_new_keys(fresh, item.first_position(), rows.first_new, rows.end);
  }
  tile.scores(fresh, sh.score[warp_index()]);
  item.forget_derived();
  {
    const ItemRows rows = item.rows(c);
    uint32_t p_low, p_high;
    softmax<D>(sh, item.first_position(), rows.end, p_low, p_high);
    attend_values<D>(c, rows, item.begin(), fresh, p_low, p_high, sh.out[warp_index()]);
  }
  item.forget_derived();
  sync_compute();
  item.forget_derived();
  finish_item<D>(c, sh, item);
}

// Merges the splits of one column's head group and publishes the output. Four neighbouring lanes share two dims. Each
// of them takes every fourth split, in order.
template <class D, class Context>
__device__ __forceinline__ void combine_splits(Context& c, int column, int kv_head) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  const int splits = AttentionItem::splits(p, column), part = lane_index() % 4;
  const uint64_t* parts = p.packets + PacketLayout::kPartials +
                          int64_t(column * D::kKvHeads + kv_head) * kMaxSplits * PacketLayout::kPartial;
  for (int i = thread_index() / 4; i < S::kGroupSize * S::kDim / 2; i += kThreads / 4) {
    const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2));
    float maximum = -INFINITY, total = 0.f, low = 0.f, high = 0.f;
    for (int first = 0; first < splits; first += 4 * kAtOnce) {
      const uint64_t* from = parts + int64_t(first) * PacketLayout::kPartial + g * (S::kDim + 2);
      TwoPackets values[kAtOnce], sums[kAtOnce];
      auto there = [&](int j) { return first + part + 4 * j < splits; };
      for (unsigned spin = 0;; ++spin) {
        uint32_t lack = 0;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const uint64_t* at = from + int64_t(there(j) ? part + 4 * j : 0) * PacketLayout::kPartial;
          values[j].load(at + dim);
          sums[j].load(at + S::kDim);
        }
        c.dog.after(spin, Phase::kCombine, c.tag);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) lack |= values[j].lacks(c.tag) | sums[j].lacks(c.tag);
        if (__all_sync(~0u, lack == 0)) break;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (!there(j)) continue;
        const float new_maximum = fmaxf(maximum, __uint_as_float(sums[j].first()));
        const float fade = expf(maximum - new_maximum), weight = expf(__uint_as_float(sums[j].first()) - new_maximum);
        maximum = new_maximum;
        total = total * fade + weight * __uint_as_float(sums[j].second());
        low = low * fade + weight * __uint_as_float(values[j].first());
        high = high * fade + weight * __uint_as_float(values[j].second());
      }
    }
    const float weight = expf(maximum - max_of_four(maximum));  // 0 for a lane without a split
    total = sum_of_four(total * weight);
    low = sum_of_four(low * weight);
    high = sum_of_four(high * weight);
    const int row = (kv_head * S::kGroupSize + g) * S::kDim + dim;
    publish_heads(c, row, column, divide(low, total), divide(high, total));
  }
}

// This CTA's part of one layer's attention. Reads the exchange c.tag - 1 and publishes c.tag.
template <class D, class Context>
__device__ __forceinline__ void attend_talker(Context& c) {
  free_tiles(c);
  Tile<D> tile;
  read_item_keys<D>(c, tile, 0);
#pragma unroll 1
  for (AttentionItem item{c.scratch.items[0].bits}; item.exists(); item.bits = c.scratch.items[item.place() + 1].bits) {
    if (item.place() == 0 || !item.same_rows(AttentionItem{c.scratch.items[item.place() - 1].bits})) {
      read_new_rows<D>(c, new_rows<D>(c), item);
      sync_compute();
      keep_new_row<D>(c, new_rows<D>(c), item);
    } else {
      sync_compute();  // the last item has been merged
    }
    attend_item<D>(c, tile, item);
    read_item_keys<D>(c, tile, item.place() + 1);
  }
  // Merging starts with the last CTA, because it has the fewest items.
  for (int i = gridDim.x - 1 - block_index(); i < c.p.num_columns * D::kKvHeads; i += gridDim.x)
    if (c.p.streams[i / D::kKvHeads].position >= kSplitPositions)
      combine_splits<D>(c, i / D::kKvHeads, i % D::kKvHeads);
}

}  // namespace qwen_tts
