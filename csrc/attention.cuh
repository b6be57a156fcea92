// The talker's attention of new rows over a long cache, split over positions.
//
// An item is a column, a key-value head and a split of kSplitPositions positions; one CTA computes
// it, sixteen positions a warp, on the tensor cores: scores = K q with the heads of the group in the
// n dimension, out = p V with them in the m dimension. Splits are cut by position alone, so a
// stream's sums do not depend on its company or the grid.
//
// Keys and values of the cache come through the weight ring, in the order in which items use them, so that they are on
// their way long before: memory is slow to answer while weights stream. A lane reads them in 16-byte pieces: which dims of a head a lane takes for which k or n of an mma is free, as long as
// both operands agree.
// Keys and values of this launch (one row a frame; up to eight in a prefill) come from the
// exchange, through shared memory.
#pragma once

#include <cfloat>

#include "head_row.cuh"
#include "layer.cuh"

namespace qwen_tts {

template <class D>
struct HeadShape {
  static constexpr int kDim = D::kHeadDim;
  static constexpr int kGroupSize = D::kHeads / D::kKvHeads;  // query heads of a key-value head
  static constexpr int kQRows = D::kHeads * D::kHeadDim, kKRows = D::kKvHeads * D::kHeadDim;
  static constexpr int kBlocks = kDim / 32;  // of a key row: four lanes read 16 bytes each
  static constexpr int kValueTiles = kDim / 16;  // of a value row: sixteen dims are the m of one mma
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

// The items of this CTA, which are the same in all layers of a frame. By the first kThreads threads, once.
template <class D>
__device__ __forceinline__ void list_items(const FrameParams& p, Scratch& scratch) {
  for (int place = thread_index(); place < kMaxItems; place += kThreads) {
    const AttentionItem item{AttentionItem::find(p, D::kKvHeads, place)};
    ItemRows rows{item.bits, 0, 0, 0};  // of none, no rows
    if (item.bits != AttentionItem::kNone) {
      const Column& own = p.columns[item.column()];
      rows.head = own.slot * D::kKvHeads + item.kv_head();
      rows.end = min((item.split() + 1) * kSplitPositions, own.position + 1);
      rows.first_new = p.columns[own.first].position;
    }
    scratch.items[place] = rows;
  }
}

// Where an item's keys and values begin in their caches.
template <class D>
__device__ __forceinline__ int64_t cache_at(const FrameParams& p, int layer, const ItemRows& rows) {
  return (layer * p.num_slots * D::kKvHeads + rows.head) * int64_t(p.max_positions * D::kHeadDim);
}

// Of a warp's tile: rows that hold positions of the stream, and those of them that are in the cache and come
// through the ring. None or fewer than none: none.
__device__ __forceinline__ int used_rows(const ItemRows& rows, int first_position) {
  return min(kTilePositions, rows.end - first_position);
}
__device__ __forceinline__ int cached_rows(const ItemRows& rows, int first_position) {
  return min(kTilePositions, min(rows.end, rows.first_new) - first_position);
}

// One warp's sixteen positions. Lane (g, t) = (lane / 4, lane % 4) holds of the keys rows g and g + 8,
// of each block of 32 dims the t-th eight. Values stay in the ring until they are used.
template <class D>
struct Tile {
  using S = HeadShape<D>;
  uint4 k[2][S::kBlocks];

  static __device__ __forceinline__ int key_row(int r) { return (lane_index() >> 2) + 8 * r; }

  // The first `rows` rows, from the ring. Of others, keys may be anything: their scores are not used.
  template <class Ring>
  __device__ __forceinline__ void read_keys(Ring& ring, int rows) {
    using P = TilePieces<D>;
    const int warp = warp_index(), lane = lane_index();
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) k[r][b] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int first = 0; first < P::kPositions; first += P::kRows) {
      if (first >= rows) break;
      const uint32_t piece = ring.template wait<P::kBytes>(warp, 0);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (key_row(r) / P::kRows == first / P::kRows)
#pragma unroll
          for (int b = 0; b < S::kBlocks; ++b) {
            const uint32_t row = piece + (key_row(r) - first) * P::kRowBytes + 16 * ((lane & 3) ^ swizzle(lane >> 2));
            k[r][b] = load_shared(row ^ 64 * b);
          }
      ring.template release<P::kBytes>(warp, lane);
    }
  }
  // The rows at positions from `begin` on, below `end`, from this launch's (whose first is at `begin`).
  __device__ __forceinline__ void take_new_keys(const NewRowsShared<D>& sh, int first, int begin, int end) {
    if (first + kTilePositions <= begin) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) take_new(k[r], sh.k, first + key_row(r), begin, end);
  }
  static __device__ __forceinline__ void take_new(uint4 (&to)[S::kBlocks], const __nv_bfloat16 (*rows)[S::kDim], int position,
                                                  int begin, int end) {
    if (position < begin || position >= end) return;
    const uint4* from = reinterpret_cast<const uint4*>(rows[position - begin]) + (lane_index() & 3);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) to[b] = from[4 * b];
  }

  // Dot products with the queries, through shared memory: [group][position], not yet scaled.
  __device__ __forceinline__ void scores(const NewRowsShared<D>& sh, float (*to)[kTilePositions]) const {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    const uint4* queries = reinterpret_cast<const uint4*>(sh.q[g % S::kGroupSize]);  // more columns than heads: not used
    float part[4][4] = {};  // short chains: an mma takes as long as thirty other instructions
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      const uint4 q = queries[4 * b + t];
      mma(part[2 * b % 4], make_uint4(k[0][b].x, k[1][b].x, k[0][b].y, k[1][b].y), make_uint2(q.x, q.y));
      mma(part[2 * b % 4 + 1], make_uint4(k[0][b].z, k[1][b].z, k[0][b].w, k[1][b].w), make_uint2(q.z, q.w));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (2 * t + (i & 1) < S::kGroupSize)
        to[2 * t + (i & 1)][g + 8 * (i >> 1)] = (part[0][i] + part[1][i]) + (part[2][i] + part[3][i]);
    __syncwarp();
  }
};

// A warp's weighted values, [head][dim], in an order in which eight lanes store, and finish_item's lanes read, with few
// conflicts of banks: lane g of a tile has dims g, g + 8, g + 16, ...
template <class D>
struct Weighed {
  using S = HeadShape<D>;
  static constexpr int kWords = S::kDim / 32;  // of 16 bytes, a lane and head
  // Where the i-th four of lane g's dims stand, in floats.
  static __device__ __forceinline__ int at(int warp, int g, int i) {
    return ((g * kWords + (i ^ (g * kWords >> 3))) ^ (warp >> 2 & 1) * 4) * 4;
  }
  static __device__ __forceinline__ int at_dim(int warp, int dim) { return at(warp, dim & 7, dim >> 5) + (dim >> 3 & 3); }
};

// Make a tile's piece in the ring whole, which holds the rows of the cache: `rows` rows from `first` on. Later ones are
// this launch's as far as `used`; beyond it nobody wrote, and what is not weighed must be a number.
template <class D>
__device__ __forceinline__ void complete_values(uint32_t piece, int first, int cached, int used, const __nv_bfloat16 (*fresh)[D::kHeadDim]) {
  using P = TilePieces<D>;
  constexpr int kWords = P::kRowBytes / 16;
  for (int i = max(cached - first, 0) * kWords + lane_index(); i < P::kRows * kWords; i += 32) {
    const int row = i / kWords, word = i % kWords;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (first + row < used) x = reinterpret_cast<const uint4*>(fresh[first + row - cached])[word];
    store_shared(piece + row * P::kRowBytes + 16 * (word ^ swizzle(first + row)), x);
  }
  fence_copy_engine();  // which fills the piece again
  __syncwarp();
}

// A warp's values, weighed by p, which lane (g, t) holds for head g and rows 2t, 2t + 1; 2t + 8, 2t + 9: as
// out^T = V^T p, with V^T as it comes from the ring by transposing loads.
template <class D>
__device__ __forceinline__ void weigh(Context& c, const ItemRows& rows, int first_position, const NewRowsShared<D>& fresh,
                                      uint32_t p_low, uint32_t p_high, float (*to)[D::kHeadDim]) {
  using S = HeadShape<D>;
  using P = TilePieces<D>;
  using W = Weighed<D>;
  const int warp = warp_index(), lane = lane_index(), g = lane >> 2, t = lane & 3;
  float out[S::kValueTiles][4] = {};
  const int used = used_rows(rows, first_position), cached = cached_rows(rows, first_position);
#pragma unroll
  for (int first = 0; first < P::kPositions; first += P::kRows) {
    if (first >= used) break;
    const uint32_t piece = c.ring.template wait<P::kBytes>(warp, 0);
    if (cached < first + P::kRows) complete_values<D>(piece, first, cached, used, fresh.v);
    // The rows of the pieces that are not this one: some of this, weighed with nothing.
    const int row = (lane & 7) + (lane & 16) / 2, word = (lane >> 3 & 1) ^ swizzle(lane);
    const uint32_t from = piece + row % P::kRows * P::kRowBytes + 16 * word;
    const bool low = 2 * t / P::kRows == first / P::kRows, high = (2 * t + 8) / P::kRows == first / P::kRows;
#pragma unroll
    for (int j = 0; j < S::kValueTiles; ++j)
      mma(out[j], load_transposed(from ^ 32 * j), make_uint2(low ? p_low : 0u, high ? p_high : 0u));
    c.ring.template release<P::kBytes>(warp, lane);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
    if (2 * t + n < S::kGroupSize)
#pragma unroll
      for (int i = 0; i < W::kWords; ++i)
        *reinterpret_cast<float4*>(to[2 * t + n] + W::at(warp, g, i)) =
            make_float4(out[2 * i][n], out[2 * i][n + 2], out[2 * i + 1][n], out[2 * i + 1][n + 2]);
}

// The query rows and this launch's keys and values of the item's stream, normed, rotated and
// rounded as the cache rounds, into shared memory.
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
  }
}

// The item's own row, now whole in shared memory, into the cache, by the CTA that has its split.
template <class D>
__device__ __forceinline__ void keep_new_row(const Context& c, const NewRowsShared<D>& sh, const AttentionItem& item) {
  constexpr int kWords = D::kHeadDim / 8;
  const FrameParams& p = c.p;
  if (warp_index() != kWarps - 1) return;
  const int position = p.columns[item.column()].position, row = position - item.rows(c).first_new;
  if (!item.leads_to(c.scratch.items, position / kSplitPositions) || lane_index() >= 2 * kWords) return;
  const bool of_keys = lane_index() < kWords;
  const int word = lane_index() % kWords;
  const int64_t at = cache_at<D>(p, c.layer(), item.rows(c)) + int64_t(position) * D::kHeadDim + 8 * (word ^ swizzle(position));
  *reinterpret_cast<uint4*>((of_keys ? p.k_cache : p.v_cache) + at) =
      reinterpret_cast<const uint4*>((of_keys ? sh.k : sh.v)[row])[word];
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
  constexpr int kPairs = S::kGroupSize * S::kDim / 2;
  constexpr int kParts = 4, kPerPart = kWarps / kParts;  // neighbouring lanes share out the warps
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
  const int low = Weighed<D>::at_dim(first, dim), high = Weighed<D>::at_dim(first, dim + 1);  // the same for all of a part
  float2 out = make_float2(0.f, 0.f);
#pragma unroll
  for (int j = 0; j < kPerPart; ++j) {
    out.x += share[j] * sh.out[first + j][g][low];
    out.y += share[j] * sh.out[first + j][g][high];
  }
  out.x = sum_of_four(out.x);
  out.y = sum_of_four(out.y);
  if (first != 0) return;
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
  const float maximum = max_of_four(fmaxf(fmaxf(s[0], s[1]), fmaxf(s[2], s[3])));
  const float from = fmaxf(maximum, -FLT_MAX);  // of no rows, a number
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = expf(s[i] - from);
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

// The keys of the item at a place in the list; of none, no rows.
template <class D>
__device__ __forceinline__ void read_item_keys(Context& c, Tile<D>& tile, int place) {
  const ItemRows rows = c.scratch.items[place];
  tile.read_keys(c.ring, cached_rows(rows, AttentionItem{rows.bits}.first_position()));
}

// One item, whose keys are in registers and whose new rows are there.
template <class D>
__device__ __forceinline__ void attend_item(Context& c, Tile<D>& tile, AttentionItem item) {
  using S = HeadShape<D>;
  const NewRowsShared<D>& fresh = new_rows<D>(c, item);
  auto& sh = *reinterpret_cast<AttentionShared<D>*>(c.scratch.partial[c.buffer()]);
  {
    const ItemRows rows = item.rows(c);
    tile.take_new_keys(fresh, item.first_position(), rows.first_new, rows.end);
  }
  tile.scores(fresh, sh.score[warp_index()]);
  opaque(item.bits);
  {
    const ItemRows rows = item.rows(c);
    uint32_t p_low, p_high;
    soften<D>(sh, item.first_position(), rows.end, p_low, p_high);
    weigh<D>(c, rows, item.first_position(), fresh, p_low, p_high, sh.out[warp_index()]);
  }
  opaque(item.bits);
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

// One layer's attention, this CTA's part; reads c.tag - 1, publishes c.tag.
template <class D>
__device__ __forceinline__ void attend_talker(Context& c) {
  Tile<D> tile;
  read_item_keys<D>(c, tile, 0);
#pragma unroll 1
  for (AttentionItem item{c.scratch.items[0].bits}; item.bits != AttentionItem::kNone;
       item.bits = c.scratch.items[item.place() + 1].bits) {
    if (item.place() == 0 || !item.same_rows(AttentionItem{c.scratch.items[item.place() - 1].bits})) {
      read_new_rows<D>(c, new_rows<D>(c, item), item);
      sync_compute();
      keep_new_row<D>(c, new_rows<D>(c, item), item);
    }
    attend_item<D>(c, tile, item);
    read_item_keys<D>(c, tile, item.place() + 1);
  }
  // From the last CTA on, which has the fewest items.
  for (int i = gridDim.x - 1 - block_index(); i < c.p.num_columns * D::kKvHeads; i += gridDim.x)
    if (c.p.columns[i / D::kKvHeads].position >= kSplitPositions) combine_splits<D>(c, i / D::kKvHeads, i % D::kKvHeads);
}

}  // namespace qwen_tts
