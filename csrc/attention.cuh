// The talker's attention of new rows over a long cache, split over positions.
//
// An item is a column, a key-value head and a split of kSplitPositions positions; one CTA computes
// it, sixteen positions a warp, on the tensor cores: scores = K q with the heads of the group in the
// n dimension, out = p V with them in the m dimension. Splits are cut by position alone, so a
// stream's sums do not depend on its company or the grid.
//
// Memory is slow to answer while weights stream, so an item's keys are in flight before the new query
// is waited for, the next item's before the one before is merged, and its values before the scores are computed.
// They come in 16-byte pieces: which dims of a head a lane takes for which k or n of an mma is free, as long as
// both operands agree.
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
constexpr int kAtOnce = 2;          // splits that a lane polls together
static_assert(kSplitPositions == kWarps * kTilePositions, "an item is a tile a warp");
static_assert(kWarps == 16, "a lane's share of a merge is one warp of sixteen");

template <class D>
struct AttentionShared {
  using S = HeadShape<D>;
  float score[kWarps][S::kGroupSize][kTilePositions];
  float maximum[S::kGroupSize][kWarps], total[S::kGroupSize][kWarps];
  float out[kWarps][S::kGroupSize][S::kDim];
};

// Queries of a head group, and the keys and values of this launch's rows of a stream: for all splits of a head
// that a CTA has.
template <class D>
struct NewRowsShared {
  using S = HeadShape<D>;
  __nv_bfloat16 q[S::kGroupSize][S::kDim];
  __nv_bfloat16 k[kMaxColumns][S::kDim], v[kMaxColumns][S::kDim];
};
static_assert(sizeof(AttentionShared<TalkerDims>) + sizeof(NewRowsShared<TalkerDims>) <= sizeof(Scratch::partial) / 2,
              "attention borrows the partial buffers");
static_assert(sizeof(AttentionShared<TalkerDims>) % 16 == 0, "rows are read 16 bytes at once");

struct AttentionItem {
  static constexpr uint32_t kNone = ~0u;
  uint32_t bits;  // one register over all waits: column, key-value head, split, place in the CTA's list

  __device__ __forceinline__ int column() const { return bits & 0xff; }
  __device__ __forceinline__ int kv_head() const { return bits >> 8 & 0xff; }
  __device__ __forceinline__ int split() const { return bits >> 16 & 0xff; }
  __device__ __forceinline__ int place() const { return bits >> 24; }

  // Of this warp. Computed where it is needed, and not kept.
  __device__ __forceinline__ int first_position() const {
    return split() * kSplitPositions + warp_index() * kTilePositions;
  }
  __device__ __forceinline__ const ItemRows& rows(const Context& c) const { return c.scratch.items[place()]; }

  // Whether it has the same queries, and the same keys and values of this launch.
  __device__ __forceinline__ bool same_rows(const AttentionItem& other) const {
    return ((bits ^ other.bits) & 0xffff) == 0;
  }

  // Whether this CTA has a split of the same head from here on, in its list.
  __device__ __forceinline__ bool leads_to(const ItemRows* items, int other_split) const {
    if (other_split < split()) return false;
    const AttentionItem other{items[min(place() + other_split - split(), kMaxItems - 1)].bits};
    return other.bits != kNone && same_rows(other);
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
    return p.columns[column].position / kSplitPositions + 1;
  }
};
static_assert(kMaxSplits <= 256 && kMaxColumns <= 256 && kMaxItems <= 257, "an item's numbers have eight bits");

// The items of this CTA, which are the same in all layers of a frame. By all computing threads, once.
template <class D>
__device__ __forceinline__ void list_items(Context& c) {
  for (int place = thread_index(); place < kMaxItems; place += kThreads) {
    const AttentionItem item{AttentionItem::find(c.p, D::kKvHeads, place)};
    ItemRows rows{item.bits, 0, 0, 0};  // of none, no rows
    if (item.bits != AttentionItem::kNone) {
      const Column& own = c.p.columns[item.column()];
      rows.head = own.slot * D::kKvHeads + item.kv_head();
      rows.end = min((item.split() + 1) * kSplitPositions, own.position + 1);
      rows.first_new = c.p.columns[own.first].position;
    }
    c.scratch.items[place] = rows;
  }
  sync_compute();
}

// Where an item's keys and values begin in their caches.
template <class D>
__device__ __forceinline__ int64_t cache_at(const Context& c, const ItemRows& rows) {
  return (c.layer() * c.p.num_slots * D::kKvHeads + rows.head) * int64_t(c.p.max_positions * D::kHeadDim);
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
  __device__ __forceinline__ void take_new_keys(const NewRowsShared<D>& sh, int first, int begin, int end) {
    if (first + kTilePositions <= begin) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) take_new<4>(k[r], sh.k, first + key_row(r), lane_index() & 3, begin, end);
  }
  __device__ __forceinline__ void take_new_values(const NewRowsShared<D>& sh, int first, int begin, int end) {
    if (first + kTilePositions <= begin) return;
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
  __device__ __forceinline__ void scores(const NewRowsShared<D>& sh, float (*to)[kTilePositions]) const {
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
      __syncwarp();  // the halves one after the other: there are no registers for both at once
    }
  }
};

// The query rows and this launch's keys and values of the item's stream, normed, rotated and
// rounded as the cache rounds, into shared memory; the item's own row into the cache too, by the CTA that has
// its split.
template <class D>
__device__ __forceinline__ void read_new_rows(Context& c, NewRowsShared<D>& sh, const AttentionItem& item) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  const int warp = warp_index();
  const Column& own = p.columns[item.column()];
  const __nv_bfloat16* qk_norm = p.talker_qk_norms + c.layer() * 2 * S::kDim;
  const uint64_t* vector = p.packets + PacketLayout::kQkv;
  // By the last warps, whose tiles are the last to fill.
  const int g = kWarps - 2 - warp;
  if (g >= 0 && g < S::kGroupSize) {
    HeadRow<S::kDim> q[1];
    const NormRope<S::kDim> by(qk_norm, p.talker_rope + int64_t(own.position) * S::kDim);
    const uint64_t* from = row_packets<S::kDim>(vector, (item.kv_head() * S::kGroupSize + g) * S::kDim, item.column());
    wait_rows(q, 1, [&](int) { return from; }, c.tag - 1, c.dog);
    q[0].norm_rope(by, D::kEps);
    q[0].store(sh.q[g]);
  }
  const int column = own.first + (kWarps - 1 - warp);
  if (column <= item.column()) {
    HeadRow<S::kDim> kv[2];
    const int position = p.columns[column].position;
    const NormRope<S::kDim> by(qk_norm + S::kDim, p.talker_rope + int64_t(position) * S::kDim);
    const uint64_t* from = row_packets<S::kDim>(vector, S::kQRows + item.kv_head() * S::kDim, column);
    wait_rows(kv, 2, [&](int i) { return from + 4 * i * S::kKRows; }, c.tag - 1, c.dog);
    kv[0].norm_rope(by, D::kEps);
    kv[0].store(sh.k[column - own.first]);
    kv[1].store(sh.v[column - own.first]);
    if (column == item.column() && item.leads_to(c.scratch.items, position / kSplitPositions)) {
      const int64_t at = cache_at<D>(c, item.rows(c)) + int64_t(position) * S::kDim;
      kv[0].store(p.k_cache + at);
      kv[1].store(p.v_cache + at);
    }
  }
}

// Of sixteen lanes, the same in each.
__device__ __forceinline__ float sum_of_sixteen(float x) {
#pragma unroll
  for (int offset = 8; offset; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}
__device__ __forceinline__ float max_of_sixteen(float x) {
#pragma unroll
  for (int offset = 8; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}

// Two dims of sixteen rows, weighted: lane j has row j's weight, lane j + 16 the same. The rows lie kStride
// floats apart; `rows` is this lane's own place in the first.
template <int kStride>
__device__ __forceinline__ float2 weighted_rows(float weight, const float* rows) {
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll 4  // more at a time would take too many registers
  for (int j = 0; j < 16; ++j) {
    const float w = __shfl_sync(~0u, weight, j);
    const float2 row = *reinterpret_cast<const float2*>(rows + j * kStride);
    sum.x += w * row.x;
    sum.y += w * row.y;
  }
  return sum;
}

// Merge the warps, always in their order, and publish the heads' output; with several splits this
// split's part of it.
template <class D>
__device__ __forceinline__ void finish_item(Context& c, const AttentionShared<D>& sh, const AttentionItem& item) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  const bool whole = p.columns[item.column()].position < kSplitPositions;
  uint64_t* part = p.packets + PacketLayout::kPartials +
                   (int64_t(item.column() * D::kKvHeads + item.kv_head()) * kMaxSplits + item.split()) * PacketLayout::kPartial;
  // A few warps, each item others: the rest go on to the next.
  constexpr int kPairs = S::kGroupSize * S::kDim / 2;
  const int i = (thread_index() + item.place() * (kThreads - kPairs)) % kThreads;
  if (i >= kPairs) return;
  const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2)), w = lane_index() % kWarps;
  const float maximum = max_of_sixteen(sh.maximum[g][w]);
  const float weight = expf(sh.maximum[g][w] - maximum);  // 0 for a warp without positions
  const float total = sum_of_sixteen(weight * sh.total[g][w]);
  const float2 out = weighted_rows<S::kGroupSize * S::kDim>(weight, &sh.out[0][g][dim]);
  if (whole) {
    const int row = (item.kv_head() * S::kGroupSize + g) * S::kDim + dim;
    publish_pair(c, p.packets + PacketLayout::kHeadsOut, row, item.column(), divide(out.x, total),
                 divide(out.y, total));
  } else {
    uint64_t* to = part + g * (S::kDim + 2);
    store_packet(to + dim, __float_as_uint(out.x), c.tag);
    store_packet(to + dim + 1, __float_as_uint(out.y), c.tag);
    if (dim == 0) {
      store_packet(to + S::kDim, __float_as_uint(maximum), c.tag);
      store_packet(to + S::kDim + 1, __float_as_uint(total), c.tag);
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

// Items take the two partial buffers in turns; the new rows stay behind the first item's.
template <class D>
__device__ __forceinline__ NewRowsShared<D>& new_rows(const Context& c, const AttentionItem& item) {
  char* half = reinterpret_cast<char*>(c.scratch.partial[c.buffer() ^ (item.place() & 1)]);
  return *reinterpret_cast<NewRowsShared<D>*>(half + sizeof(AttentionShared<D>));
}

// Ask for the keys of the item at a place in the list; of none, for no rows, so that the registers hold nothing that
// must be kept.
template <class D>
__device__ __forceinline__ void fetch_item_keys(const Context& c, Tile<D>& tile, int place) {
  const ItemRows rows = c.scratch.items[place];
  tile.fetch_keys(c.p.k_cache + cache_at<D>(c, rows), AttentionItem{rows.bits}.first_position(),
                  min(rows.end, rows.first_new));
}

// One item, whose keys are on their way and whose new rows are there; the keys of the next are asked for as
// soon as there is room for them.
template <class D>
__device__ __forceinline__ void attend_item(Context& c, Tile<D>& tile, AttentionItem item) {
  using S = HeadShape<D>;
  const NewRowsShared<D>& fresh = new_rows<D>(c, item);
  auto& sh = *reinterpret_cast<AttentionShared<D>*>(c.scratch.partial[c.buffer()]);
  {
    const ItemRows rows = item.rows(c);
    tile.take_new_keys(fresh, item.first_position(), rows.first_new, rows.end);
    // Values only now: with them in registers during the wait, some would be spilled as they come.
    tile.fetch_values(c.p.v_cache + cache_at<D>(c, rows), item.first_position(), min(rows.end, rows.first_new));
  }
  tile.scores(fresh, sh.score[warp_index()]);
  opaque(item.bits);
  uint32_t p_low, p_high;
  {
    const ItemRows rows = item.rows(c);
    soften<D>(sh, item.first_position(), rows.end, p_low, p_high);
    tile.take_new_values(fresh, item.first_position(), rows.first_new, rows.end);
  }
  tile.weigh(p_low, p_high, sh.out[warp_index()]);
  opaque(item.bits);
  fetch_item_keys<D>(c, tile, item.place() + 1);
  sync_compute();
  opaque(item.bits);
  finish_item<D>(c, sh, item);
  c.take_buffer();
}

// Merge the splits of one column's head group and publish: four neighbouring lanes take every fourth split of
// two dims, each in order.
template <class D>
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
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) lack |= values[j].lacks(c.tag) | sums[j].lacks(c.tag);
        if (__all_sync(~0u, lack == 0)) break;
        c.dog.after(spin, Phase::kCombine, c.tag);
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
    if (part == 0)
      publish_pair(c, p.packets + PacketLayout::kHeadsOut, row, column, divide(low, total), divide(high, total));
  }
}

// Ask for the rows of this CTA's first item long before they are needed: their way from memory is the
// longest of a layer.
template <class D>
__device__ __forceinline__ void prefetch_first(const Context& c) {
  const ItemRows rows = c.scratch.items[0];
  constexpr int kLines = D::kHeadDim * 2 / 128;  // of a row
  const int position = AttentionItem{rows.bits}.first_position() + lane_index() / kLines;
  if (lane_index() >= kTilePositions * kLines || position >= min(rows.end, rows.first_new)) return;
  const int64_t line = cache_at<D>(c, rows) + position * D::kHeadDim + lane_index() % kLines * 64;
  prefetch_to_l2(c.p.k_cache + line);
  prefetch_to_l2(c.p.v_cache + line);
}

// One layer's attention, this CTA's part; reads c.tag - 1, publishes c.tag.
template <class D>
__device__ __forceinline__ void attend_talker(Context& c) {
  Tile<D> tile;
  fetch_item_keys<D>(c, tile, 0);
#pragma unroll 1
  for (AttentionItem item{c.scratch.items[0].bits}; item.bits != AttentionItem::kNone;
       item.bits = c.scratch.items[item.place() + 1].bits) {
    if (item.place() == 0 || !item.same_rows(AttentionItem{c.scratch.items[item.place() - 1].bits})) {
      read_new_rows<D>(c, new_rows<D>(c, item), item);
      sync_compute();
    }
    attend_item<D>(c, tile, item);
  }
  // From the last CTA on, which has the fewest items.
  for (int i = gridDim.x - 1 - block_index(); i < c.p.num_columns * D::kKvHeads; i += gridDim.x)
    if (c.p.columns[i / D::kKvHeads].position >= kSplitPositions) combine_splits<D>(c, i / D::kKvHeads, i % D::kKvHeads);
}

}  // namespace qwen_tts
