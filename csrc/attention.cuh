// The talker's attention of new rows over a long cache, split over positions.
//
// An item is a column, a key-value head and a split of kSplitPositions positions; one CTA computes
// it, sixteen positions a warp, on the tensor cores: scores = K q with the heads of the group in the
// n dimension, out = p V with them in the m dimension. Splits are cut by position alone, so a
// stream's sums do not depend on its company or the grid.
//
// Memory is slow to answer while weights stream, so an item's keys are in flight before the new query
// is waited for, and its values before the query is ready. They come in 16-byte pieces: which dims of a head a lane
// takes for which k or n of an mma is free, as long as both operands agree.
// Keys and values of this launch (one row a frame; up to eight in a prefill) come from the
// exchange, through shared memory.
#pragma once

#include "head_row.cuh"
#include "layer.cuh"

namespace qwen_tts {

template <class D>
struct HeadShape {
  static constexpr int kDim = D::kHeadDim;
  static constexpr int kGroupSize = D::kHeads / D::kKvHeads;  // query heads of a key-value head
  static constexpr int kQRows = D::kHeads * D::kHeadDim, kKRows = D::kKvHeads * D::kHeadDim;
  static constexpr int kBlocks = kDim / 32;  // of a key row: four lanes read 16 bytes each
  static constexpr int kHalves = kDim / 64;  // of a value row: eight lanes read 16 bytes each
  static_assert(kGroupSize <= 8, "the heads of a group are the n of one mma");
};

constexpr int kTilePositions = 16;  // of one warp
static_assert(kSplitPositions == kWarps * kTilePositions, "an item is a tile a warp");

template <class D>
struct AttentionShared {
  using S = HeadShape<D>;
  __nv_bfloat16 q[S::kGroupSize][S::kDim];
  __nv_bfloat16 k[kMaxColumns][S::kDim], v[kMaxColumns][S::kDim];  // this launch's rows
  float score[kWarps][S::kGroupSize][kTilePositions];
  float maximum[S::kGroupSize][kWarps], total[S::kGroupSize][kWarps];
  float out[kWarps][S::kGroupSize][S::kDim];
};
static_assert(sizeof(AttentionShared<TalkerDims>) <= sizeof(Scratch::partial) / 2, "attention borrows a partial buffer");

struct AttentionItem {
  int column, kv_head, split;

  // The item-th of all; false beyond the last.
  static __device__ __forceinline__ bool find(const FrameParams& p, int kv_heads, int item, AttentionItem& found) {
    for (int column = 0; column < p.num_columns; ++column) {
      const int count = kv_heads * (p.columns[column].position / kSplitPositions + 1);
      if (item < count) {
        found = {column, item % kv_heads, item / kv_heads};
        return true;
      }
      item -= count;
    }
    return false;
  }
};

// Where an item's keys and values begin in their caches.
template <class D>
__device__ __forceinline__ int64_t cache_at(const FrameParams& p, const AttentionItem& item, int layer) {
  const int64_t slot = p.columns[item.column].slot;
  return ((layer * int64_t(p.num_slots) + slot) * D::kKvHeads + item.kv_head) * p.max_positions * D::kHeadDim;
}

// One warp's sixteen positions. Lane (g, t) = (lane / 4, lane % 4) holds of the keys rows g and g + 8,
// of each block of 32 dims the t-th eight; of the values rows 2t, 2t + 1, 2t + 8, 2t + 9, of each
// half of 64 dims the g-th eight.
template <class D>
struct Tile {
  using S = HeadShape<D>;
  uint4 k[2][S::kBlocks], v[4][S::kHalves];

  static __device__ __forceinline__ int key_row(int r) { return (lane_index() >> 2) + 8 * r; }
  static __device__ __forceinline__ int value_row(int r) { return 2 * (lane_index() & 3) + (r & 1) + 8 * (r >> 1); }

  // Rows of positions `first` on, for those below `end`; from the cache, which begins with position 0.
  __device__ __forceinline__ void fetch_keys(const __nv_bfloat16* rows, int first, int end) {
#pragma unroll
    for (int r = 0; r < 2; ++r) fetch<4>(k[r], rows, first + key_row(r), lane_index() & 3, end);
  }
  __device__ __forceinline__ void fetch_values(const __nv_bfloat16* rows, int first, int end) {
#pragma unroll
    for (int r = 0; r < 4; ++r) fetch<8>(v[r], rows, first + value_row(r), lane_index() >> 2, end);
  }
  template <int kStep, int kCount>
  static __device__ __forceinline__ void fetch(uint4 (&to)[kCount], const __nv_bfloat16* rows, int position, int piece,
                                               int end) {
    const uint4* from = reinterpret_cast<const uint4*>(rows + position * S::kDim) + piece;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i] = make_uint4(0, 0, 0, 0);  // memory that nobody wrote may hold anything
      if (position < end) to[i] = __ldcg(from + kStep * i);
    }
  }

  // The rows at positions from `begin` on, below `end`, from this launch's (whose first is at `begin`).
  __device__ __forceinline__ void take_new_keys(const AttentionShared<D>& sh, int first, int begin, int end) {
#pragma unroll
    for (int r = 0; r < 2; ++r) take_new<4>(k[r], sh.k, first + key_row(r), lane_index() & 3, begin, end);
  }
  __device__ __forceinline__ void take_new_values(const AttentionShared<D>& sh, int first, int begin, int end) {
#pragma unroll
    for (int r = 0; r < 4; ++r) take_new<8>(v[r], sh.v, first + value_row(r), lane_index() >> 2, begin, end);
  }
  template <int kStep, int kCount>
  static __device__ __forceinline__ void take_new(uint4 (&to)[kCount], const __nv_bfloat16 (*rows)[S::kDim], int position,
                                                  int piece, int begin, int end) {
    if (position < begin || position >= end) return;
    const uint4* from = reinterpret_cast<const uint4*>(rows[position - begin]) + piece;
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[kStep * i];
  }

  // Dot products with the queries, through shared memory: [group][position], not yet scaled.
  __device__ __forceinline__ void scores(const AttentionShared<D>& sh, float (*to)[kTilePositions]) const {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    float s[4] = {};
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      uint4 q = make_uint4(0, 0, 0, 0);
      if (g < S::kGroupSize) q = reinterpret_cast<const uint4*>(sh.q[g])[4 * b + t];
      mma(s, make_uint4(k[0][b].x, k[1][b].x, k[0][b].y, k[1][b].y), make_uint2(q.x, q.y));
      mma(s, make_uint4(k[0][b].z, k[1][b].z, k[0][b].w, k[1][b].w), make_uint2(q.z, q.w));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (2 * t + (i & 1) < S::kGroupSize) to[2 * t + (i & 1)][g + 8 * (i >> 1)] = s[i];
    __syncwarp();
  }

  // Values weighted by p, which lane (g, t) holds for head g and rows 2t, 2t + 1; 2t + 8, 2t + 9.
  // Into to[head][dim].
  __device__ __forceinline__ void weigh(uint32_t p_low, uint32_t p_high, float (*to)[S::kDim]) const {
    const int g = lane_index() >> 2, t = lane_index() & 3;
#pragma unroll
    for (int h = 0; h < S::kHalves; ++h) {
      float out[2][8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        auto pick = [&](const uint4& a, const uint4& b) {  // the j-th dim of two rows
          const uint32_t x = j < 2 ? a.x : j < 4 ? a.y : j < 6 ? a.z : a.w;
          const uint32_t y = j < 2 ? b.x : j < 4 ? b.y : j < 6 ? b.z : b.w;
          return __byte_perm(x, y, j % 2 ? 0x7632 : 0x5410);
        };
        float c[4] = {};
        mma(c, make_uint4(p_low, 0, p_high, 0), make_uint2(pick(v[0][h], v[1][h]), pick(v[2][h], v[3][h])));
        out[0][j] = c[0];
        out[1][j] = c[1];
      }
      if (g < S::kGroupSize)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float4* at = reinterpret_cast<float4*>(to[g] + h * 64 + (2 * t + n) * 8);
          at[0] = make_float4(out[n][0], out[n][1], out[n][2], out[n][3]);
          at[1] = make_float4(out[n][4], out[n][5], out[n][6], out[n][7]);
        }
    }
  }
};

// The query rows and this launch's keys and values of the item's stream, normed, rotated and
// rounded as the cache rounds, into shared memory; the item's own row into the cache too.
template <class D>
__device__ __forceinline__ void read_new_rows(Context& c, AttentionShared<D>& sh, const AttentionItem& item, int layer,
                                              __nv_bfloat16* k_rows, __nv_bfloat16* v_rows) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  const int warp = warp_index();
  const Column& own = p.columns[item.column];
  const __nv_bfloat16* qk_norm = p.talker_qk_norms + layer * 2 * S::kDim;
  const uint64_t* vector = p.packets + PacketLayout::kQkv;
  if (warp < S::kGroupSize) {
    HeadRow<S::kDim> q[1];
    const NormRope<S::kDim> by(qk_norm, p.talker_rope + int64_t(own.position) * S::kDim);
    wait_rows(q, vector, {(item.kv_head * S::kGroupSize + warp) * S::kDim}, 1, 0, item.column, c.tag - 1, c.dog);
    q[0].norm_rope(by, D::kEps);
    q[0].store(sh.q[warp]);
  }
  const int column = own.first + (kWarps - 1 - warp);
  if (column <= item.column) {
    HeadRow<S::kDim> kv[2];
    const int position = p.columns[column].position;
    const NormRope<S::kDim> by(qk_norm + S::kDim, p.talker_rope + int64_t(position) * S::kDim);
    wait_rows(kv, vector, {S::kQRows + item.kv_head * S::kDim, S::kQRows + S::kKRows + item.kv_head * S::kDim}, 2, 0,
              column, c.tag - 1, c.dog);
    kv[0].norm_rope(by, D::kEps);
    kv[0].store(sh.k[column - own.first]);
    kv[1].store(sh.v[column - own.first]);
    if (column == item.column && position / kSplitPositions == item.split) {
      kv[0].store(k_rows + int64_t(position) * S::kDim);
      kv[1].store(v_rows + int64_t(position) * S::kDim);
    }
  }
}

// Merge the warps, always in their order, and publish the heads' output; with several splits this
// split's part of it.
template <class D>
__device__ __forceinline__ void finish_item(Context& c, const AttentionShared<D>& sh, const AttentionItem& item) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  const bool whole = p.columns[item.column].position < kSplitPositions;
  uint64_t* part = p.packets + PacketLayout::kPartials +
                   (int64_t(item.column * D::kKvHeads + item.kv_head) * kMaxSplits + item.split) * PacketLayout::kPartial;
  constexpr int kParts = 4, kPerPart = kWarps / kParts;  // neighbouring lanes share out the warps' results
  for (int i = thread_index() / kParts; i < S::kGroupSize * S::kDim / 2; i += kThreads / kParts) {
    const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2)), first = thread_index() % kParts * kPerPart;
    float maximum = -INFINITY, total = 0.f, low = 0.f, high = 0.f;
#pragma unroll
    for (int w = first; w < first + kPerPart; ++w) maximum = fmaxf(maximum, sh.maximum[g][w]);
    maximum = max_of_four(maximum);
#pragma unroll
    for (int w = first; w < first + kPerPart; ++w) {
      const float weight = expf(sh.maximum[g][w] - maximum);  // 0 for a warp without positions
      const float2 out = *reinterpret_cast<const float2*>(&sh.out[w][g][dim]);
      total += weight * sh.total[g][w];
      low += weight * out.x;
      high += weight * out.y;
    }
    total = sum_of_four(total);
    low = sum_of_four(low);
    high = sum_of_four(high);
    if (first != 0) continue;
    if (whole) {
      const int row = (item.kv_head * S::kGroupSize + g) * S::kDim + dim;
      publish_pair(p, p.packets + PacketLayout::kHeadsOut, row, item.column, divide(low, total), divide(high, total), c.tag,
                   row);
    } else {
      uint64_t* to = part + g * (S::kDim + 2);
      store_packet(to + dim, __float_as_uint(low), c.tag);
      store_packet(to + dim + 1, __float_as_uint(high), c.tag);
      if (dim == 0) {
        store_packet(to + S::kDim, __float_as_uint(maximum), c.tag);
        store_packet(to + S::kDim + 1, __float_as_uint(total), c.tag);
      }
    }
  }
}

// The softmax of a tile's scores: maximum and sum of each head into shared memory, weights as bf16 to
// the lanes that need them.
template <class D>
__device__ __forceinline__ void soften(AttentionShared<D>& sh, int first, int end, uint32_t& p_low, uint32_t& p_high) {
  using S = HeadShape<D>;
  const int warp = warp_index(), g = lane_index() >> 2, t = lane_index() & 3;
  const float scale = rsqrtf(float(S::kDim));
  float s[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  if (g < S::kGroupSize)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * t + (i & 1) + 8 * (i >> 1);
      if (first + row < end) s[i] = sh.score[warp][g][row] * scale;
    }
  float maximum = fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3]));
  maximum = max_of_four(maximum);
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = s[i] == -INFINITY ? 0.f : expf(s[i] - maximum);
  p_low = pack_bf16(s[0], s[1]);
  p_high = pack_bf16(s[2], s[3]);
  const float2 low = unpack_bf16(p_low), high = unpack_bf16(p_high);  // the sum of what is weighed with
  float total = low.x + low.y + high.x + high.y;
  total = sum_of_four(total);
  if (g < S::kGroupSize && t == 0) {
    sh.maximum[g][warp] = maximum;
    sh.total[g][warp] = total;
  }
}

template <class D>
__device__ __forceinline__ void attend_item(Context& c, const AttentionItem& item, int layer) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  auto& sh = *reinterpret_cast<AttentionShared<D>*>(c.scratch.partial[c.buffer]);
  const Column& own = p.columns[item.column];
  const int64_t at = cache_at<D>(p, item, layer);
  const int end = min((item.split + 1) * kSplitPositions, own.position + 1);
  const int first = item.split * kSplitPositions + warp_index() * kTilePositions;
  Tile<D> tile;
  tile.fetch_keys(p.k_cache + at, first, min(end, p.columns[own.first].position));
  read_new_rows<D>(c, sh, item, layer, p.k_cache + at, p.v_cache + at);
  sync_compute();
  tile.take_new_keys(sh, first, p.columns[own.first].position, end);
  // Values only now: with them in registers during the wait, some would be spilled as they come.
  tile.fetch_values(p.v_cache + at, first, min(end, p.columns[own.first].position));
  tile.scores(sh, sh.score[warp_index()]);
  uint32_t p_low, p_high;
  soften<D>(sh, first, end, p_low, p_high);
  tile.take_new_values(sh, first, p.columns[own.first].position, end);
  tile.weigh(p_low, p_high, sh.out[warp_index()]);
  sync_compute();
  finish_item<D>(c, sh, item);
  c.buffer ^= 1;
}

// Merge the splits of one column's head group, in their order, and publish.
template <class D>
__device__ __forceinline__ void combine_splits(Context& c, int column, int kv_head) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  const int splits = p.columns[column].position / kSplitPositions + 1;
  const uint64_t* parts = p.packets + PacketLayout::kPartials +
                          int64_t(column * D::kKvHeads + kv_head) * kMaxSplits * PacketLayout::kPartial;
  for (int i = thread_index(); i < S::kGroupSize * S::kDim / 2; i += kThreads) {
    const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2));
    float maximum = -INFINITY, total = 0.f, low = 0.f, high = 0.f;
    for (int s = 0; s < splits; s += 4) {
      const uint64_t* from = parts + int64_t(s) * PacketLayout::kPartial + g * (S::kDim + 2);
      uint4 values[4], sums[4];
      for (unsigned spin = 0;; ++spin) {
        bool ok = true;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint64_t* part = from + int64_t(s + j < splits ? j : 0) * PacketLayout::kPartial;
          values[j] = load_two_packets(part + dim);
          sums[j] = load_two_packets(part + S::kDim);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
          ok = ok && values[j].y == c.tag && values[j].w == c.tag && sums[j].y == c.tag &&
               sums[j].w == c.tag;
        if (__all_sync(~0u, ok)) break;
        c.dog.after(spin, Phase::kCombine, c.tag);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (s + j >= splits) continue;
        const float new_maximum = fmaxf(maximum, __uint_as_float(sums[j].x));
        const float fade = expf(maximum - new_maximum), weight = expf(__uint_as_float(sums[j].x) - new_maximum);
        maximum = new_maximum;
        total = total * fade + weight * __uint_as_float(sums[j].z);
        low = low * fade + weight * __uint_as_float(values[j].x);
        high = high * fade + weight * __uint_as_float(values[j].z);
      }
    }
    const int row = (kv_head * S::kGroupSize + g) * S::kDim + dim;
    publish_pair(p, p.packets + PacketLayout::kHeadsOut, row, column, divide(low, total), divide(high, total), c.tag, row);
  }
}

// Ask for the rows of this CTA's first item long before they are needed: their way from memory is the
// longest of a layer.
template <class D>
__device__ __forceinline__ void prefetch_cache(const FrameParams& p, int layer) {
  AttentionItem item;
  if (!AttentionItem::find(p, D::kKvHeads, blockIdx.x, item)) return;
  constexpr int kLines = D::kHeadDim * 2 / 128;  // of a row
  const int64_t at = cache_at<D>(p, item, layer);
  const int end = min((item.split + 1) * kSplitPositions, p.columns[p.columns[item.column].first].position);
  const int position = item.split * kSplitPositions + warp_index() * kTilePositions + lane_index() / kLines;
  if (lane_index() >= kTilePositions * kLines || position >= end) return;
  const int64_t line = at + position * D::kHeadDim + lane_index() % kLines * 64;
  prefetch_to_l2(p.k_cache + line);
  prefetch_to_l2(p.v_cache + line);
}

// One layer's attention, this CTA's part; reads c.tag - 1, publishes c.tag.
template <class D>
__device__ __forceinline__ void attend_talker(Context& c, int layer) {
  AttentionItem item;
#pragma unroll 1
  for (int i = blockIdx.x; AttentionItem::find(c.p, D::kKvHeads, i, item); i += gridDim.x) attend_item<D>(c, item, layer);
  // From the last CTA on, which has the fewest items.
  for (int i = gridDim.x - 1 - blockIdx.x; i < c.p.num_columns * D::kKvHeads; i += gridDim.x)
    if (c.p.columns[i / D::kKvHeads].position >= kSplitPositions) combine_splits<D>(c, i / D::kKvHeads, i % D::kKvHeads);
}

}  // namespace qwen_tts
