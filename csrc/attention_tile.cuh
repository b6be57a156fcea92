// A warp's part of an item of the talker's attention: sixteen positions, on the tensor cores. It computes scores = K q
// and then out^T = V^T p. Both have the heads of the group in the n dimension.
//
// The words of a row are already swizzled in the cache, so a piece is one copy. The k order of K q may be any order
// that both operands share. The one used here lets a lane read 16 bytes at once.
#pragma once

#include "attention_item.cuh"
#include "head_row.cuh"

namespace qwen_tts {

template <class D>
struct HeadShape {
  static constexpr int kDim = D::kHeadDim;
  static constexpr int kGroupSize = D::kHeads / D::kKvHeads;  // query heads of a key-value head
  static constexpr int kQRows = D::kHeads * D::kHeadDim, kKRows = D::kKvHeads * D::kHeadDim;
  static constexpr int kBlocks = kDim / 32;      // of a key row: four lanes read 16 bytes each
  static constexpr int kValueTiles = kDim / 16;  // of a value row: sixteen dims are the m of one mma
  static_assert(kGroupSize <= kTileColumns, "the heads of a group are the n of one mma");
};

template <class D>
struct AttentionShared {
  using S = HeadShape<D>;
  float score[kWarps][S::kGroupSize][kTilePositions];
  float maximum[S::kGroupSize][kWarps], total[S::kGroupSize][kWarps];
  float out[kWarps][S::kGroupSize][S::kDim];
};

// The queries of a head group, and this launch's keys and values of a stream. All splits of the head in a CTA use them.
template <class D>
struct NewRowsShared {
  using S = HeadShape<D>;
  __nv_bfloat16 q[S::kGroupSize][S::kDim];
  __nv_bfloat16 k[kTileColumns][S::kDim], v[kTileColumns][S::kDim];
};
static_assert(sizeof(AttentionShared<T>) <= sizeof(NarrowForm::Scratch::partial[0]) * WideTiles::kCount &&
                  sizeof(NewRowsShared<T>) <= sizeof(NarrowForm::Scratch::partial[0]) * LastTile::kCount,
              "attention borrows the tiles of partial sums");
static_assert(sizeof(AttentionShared<T>) % 16 == 0, "rows are read 16 bytes at once");

// One warp's sixteen positions. Lane (g, t) = (lane / 4, lane % 4) holds the t-th eight dims of each block of 32, for
// the key rows g and g + 8. Values stay in the ring until they are used.
template <class D>
struct Tile {
  using S = HeadShape<D>;
  uint4 k[2][S::kBlocks];

  static __device__ __forceinline__ int key_row(int r) { return (lane_index() >> 2) + 8 * r; }

  // Reads this warp's rows from the ring. `cached` rows of the whole item come through the ring. The keys of missing
  // rows may have any value, because their scores are not used.
  template <class Ring>
  __device__ __forceinline__ void read_keys(RingReader<Ring>& ring, int cached) {
    const int warp = warp_index(), lane = lane_index(), tiles = warps_with_rows(cached);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) k[r][b] = make_uint4(0, 0, 0, 0);
    if (warp < tiles) {
      const auto place = ring.next.after(warp);
      const uint32_t tile = ring.wait(place);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) {
          const uint32_t row = tile + key_row(r) * KvTile<D>::kRowBytes + 16 * ((lane & 3) ^ swizzle(lane >> 2));
          k[r][b] = load_shared(row ^ 64 * b);
        }
      uint32_t loaded = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) loaded |= k[r][b].w;
      ring.template release<1>(place, loaded);
    }
    ring.next.skip(tiles);
  }

  // Takes the rows at positions begin..end - 1 from this launch's new rows, the first of which is at `begin`.
  __device__ __forceinline__ void take_new_keys(const NewRowsShared<D>& sh, int first, int begin, int end) {
    if (first + kTilePositions <= begin) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) take_new(k[r], sh.k, first + key_row(r), begin, end);
  }
  static __device__ __forceinline__ void take_new(uint4 (&to)[S::kBlocks], const __nv_bfloat16 (*rows)[S::kDim],
                                                  int position, int begin, int end) {
    if (position < begin || position >= end) return;
    const uint4* from = reinterpret_cast<const uint4*>(rows[position - begin]) + (lane_index() & 3);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) to[b] = from[4 * b];
  }

  // Dot products with the queries, through shared memory: [group][position], not yet scaled.
  __device__ __forceinline__ void scores(const NewRowsShared<D>& sh, float (*to)[kTilePositions]) const {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    // Columns beyond the heads of the group repeat those heads. Their results are not used.
    const uint4* queries = reinterpret_cast<const uint4*>(sh.q[g % S::kGroupSize]);
    float part[4][4] = {};  // short chains, as in multiply
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

// The order of a warp's weighted values in shared memory, for each head. Lane g of a tile has dims g, g + 8, g + 16,
// ... The order spreads the stores of eight lanes over as many banks as possible, and likewise the loads of
// finish_item.
template <class D>
struct ValueOrder {
  using S = HeadShape<D>;
  static constexpr int kWords = S::kDim / 32;  // of 16 bytes, a lane and head
  // The index, in floats, of the i-th four of lane g's dims.
  static __device__ __forceinline__ int at(int warp, int g, int i) {
    return ((g * kWords + (i ^ (g * kWords >> 3))) ^ (warp >> 2 & 1) * 4) * 4;
  }
  static __device__ __forceinline__ int at_dim(int warp, int dim) {
    return at(warp, dim & 7, dim >> 5) + (dim >> 3 & 3);
  }
};

// Completes a warp's tile of values in the ring. Its first `cached` rows come from the cache. The rows up to `used`
// come from this launch. The rows after them are filled with zeros: their weights are zero, and zero times NaN is NaN.
template <class D>
__device__ __forceinline__ void complete_values(uint32_t tile, int cached, int used,
                                                const __nv_bfloat16 (*fresh)[D::kHeadDim]) {
  constexpr int kWords = KvTile<D>::kRowBytes / 16;
  for (int i = max(cached, 0) * kWords + lane_index(); i < kTilePositions * kWords; i += 32) {
    const int row = i / kWords, word = i % kWords;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (row < used) x = reinterpret_cast<const uint4*>(fresh[row - cached])[word];
    store_shared(tile + row * KvTile<D>::kRowBytes + 16 * (word ^ swizzle(row)), x);
  }
  fence_copy_engine();  // because the copy engine fills the slot again
  __syncwarp();
}

// Sums a warp's values with the weights p, as out^T = V^T p. Transposing loads read V^T from the ring. Lane (g, t) has
// the weights of head g for rows 2t and 2t + 1 (p_low), and 2t + 8 and 2t + 9 (p_high).
template <class D, class Context>
__device__ __forceinline__ void attend_values(Context& c, const ItemRows& rows, int item_begin,
                                              const NewRowsShared<D>& fresh, uint32_t p_low, uint32_t p_high,
                                              float (*to)[D::kHeadDim]) {
  using S = HeadShape<D>;
  using Order = ValueOrder<D>;
  const int warp = warp_index(), lane = lane_index(), g = lane >> 2, t = lane & 3;
  const int tiles = warps_with_rows(used_rows(rows, item_begin));
  float out[S::kValueTiles][4] = {};
  if (warp < tiles) {
    const auto place = c.ring.next.after(warp);
    const uint32_t tile = c.ring.wait(place);
    const int first = item_begin + warp * kTilePositions, cached = cached_rows(rows, first);
    if (cached < kTilePositions) complete_values<D>(tile, cached, used_rows(rows, first), fresh.v);
    const int row = (lane & 7) + (lane & 16) / 2, word = (lane >> 3 & 1) ^ swizzle(lane);
    const uint32_t from = tile + row * KvTile<D>::kRowBytes + 16 * word;
#pragma unroll
    for (int j = 0; j < S::kValueTiles; ++j) mma(out[j], ldmatrix_transposed(from ^ 32 * j), make_uint2(p_low, p_high));
    c.ring.template release<1>(place, __float_as_uint(out[S::kValueTiles - 1][0]));
  }
  c.ring.next.skip(tiles);
#pragma unroll
  for (int n = 0; n < 2; ++n)
    if (2 * t + n < S::kGroupSize)
#pragma unroll
      for (int i = 0; i < Order::kWords; ++i)
        *reinterpret_cast<float4*>(to[2 * t + n] + Order::at(warp, g, i)) =
            make_float4(out[2 * i][n], out[2 * i][n + 2], out[2 * i + 1][n], out[2 * i + 1][n + 2]);
}

// The softmax of a tile's scores. The maximum and the sum of each head go to shared memory. The weights go, as bf16, to
// the lanes that need them.
template <class D>
__device__ __forceinline__ void softmax(AttentionShared<D>& sh, int first, int end, uint32_t& p_low, uint32_t& p_high) {
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
  const float from = fmaxf(maximum, -FLT_MAX);  // finite even without rows
#pragma unroll
  for (int i = 0; i < 4; ++i) s[i] = expf(s[i] - from);
  p_low = pack_bf16(s[0], s[1]);
  p_high = pack_bf16(s[2], s[3]);
  const float2 low = unpack_bf16(p_low), high = unpack_bf16(p_high);  // the sum is over the rounded weights
  float total = low.x + low.y + high.x + high.y;
  total = sum_of_four(total);
  if (g < S::kGroupSize && t == 0) {
    sh.maximum[g][warp] = maximum;
    sh.total[g][warp] = total;
  }
}

}  // namespace qwen_tts
