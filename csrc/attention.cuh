// The talker's attention of new rows over a long cache, split over positions.
//
// An item is a column, a key-value head and a split of kSplitPositions positions; one CTA computes
// it with all its warps. Splits are cut by position alone, so a stream's sums do not depend on its
// company or the grid. Old keys and values are fetched before the new query is waited for. Keys
// and values of this launch (one row a frame; up to eight in a prefill) come from the exchange.
//
// A row of the cache is read by head_dim / 8 lanes of 16 bytes; softmax is fp32.
#pragma once

#include "head_row.cuh"
#include "layer.cuh"

namespace qwen_tts {

template <class D>
struct HeadShape {
  static constexpr int kDim = D::kHeadDim;
  static constexpr int kGroupSize = D::kHeads / D::kKvHeads;  // query heads of a key-value head
  static constexpr int kQRows = D::kHeads * D::kHeadDim, kKRows = D::kKvHeads * D::kHeadDim;
  static constexpr int kRowLanes = kDim / 8;        // lanes that read one row of the cache
  static constexpr int kRowsAtOnce = 32 / kRowLanes;  // rows a warp reads at once
};

constexpr int kBatch = 2;  // reads of each lane in flight: times 16 warps and rows at once, positions

template <class D>
struct AttentionShared {
  using S = HeadShape<D>;
  float q[S::kGroupSize][S::kDim];
  __nv_bfloat16 k[kMaxColumns][S::kDim], v[kMaxColumns][S::kDim];  // this launch's rows
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

__device__ __forceinline__ void unpack_eight(const uint4& bits, float (&x)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_bf16(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// Running softmax of one group of lanes (see kRowLanes) for each query head; a lane holds 8 dims.
template <class D>
struct Running {
  using S = HeadShape<D>;
  float maximum[S::kGroupSize], total[S::kGroupSize], out[S::kGroupSize][8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int g = 0; g < S::kGroupSize; ++g) {
      maximum[g] = -INFINITY;
      total[g] = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[g][i] = 0.f;
    }
  }

  // kCount rows at once, of which those count that `valid` says. q: [group][dim] in shared memory,
  // scaled. A key or value is unpacked once for all heads: registers are short here.
  template <int kCount>
  __device__ __forceinline__ void see(const float (*q)[S::kDim], const uint4 (&k)[kCount], const uint4 (&v)[kCount],
                                      const bool (&valid)[kCount]) {
    float score[S::kGroupSize][kCount];
    score_rows<kCount>(q, k, score);
#pragma unroll
    for (int g = 0; g < S::kGroupSize; ++g) {
      float new_maximum = maximum[g];
#pragma unroll
      for (int j = 0; j < kCount; ++j) new_maximum = fmaxf(new_maximum, valid[j] ? score[g][j] : -INFINITY);
      const float fade = maximum[g] == -INFINITY ? 0.f : expf(maximum[g] - new_maximum);
      maximum[g] = new_maximum;
      total[g] *= fade;
#pragma unroll
      for (int i = 0; i < 8; ++i) out[g][i] *= fade;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        score[g][j] = valid[j] ? expf(score[g][j] - new_maximum) : 0.f;  // from here the weight
        total[g] += score[g][j];
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (!valid[j]) continue;  // memory that nobody wrote may hold anything
      float value[8];
      unpack_eight(v[j], value);
#pragma unroll
      for (int g = 0; g < S::kGroupSize; ++g)
#pragma unroll
        for (int i = 0; i < 8; ++i) out[g][i] += score[g][j] * value[i];
    }
  }

  // Dot products of the queries with kCount keys, in every lane of a row's group.
  template <int kCount>
  static __device__ __forceinline__ void score_rows(const float (*q)[S::kDim], const uint4 (&k)[kCount],
                                                    float (&score)[S::kGroupSize][kCount]) {
    const int first = (thread_index() & (S::kRowLanes - 1)) * 8;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float key[8];
      unpack_eight(k[j], key);
#pragma unroll
      for (int g = 0; g < S::kGroupSize; ++g) {
        const float4 low = *reinterpret_cast<const float4*>(q[g] + first);
        const float4 high = *reinterpret_cast<const float4*>(q[g] + first + 4);
        score[g][j] = low.x * key[0] + low.y * key[1] + low.z * key[2] + low.w * key[3] + high.x * key[4] +
                      high.y * key[5] + high.z * key[6] + high.w * key[7];
      }
    }
#pragma unroll
    for (int offset = S::kRowLanes / 2; offset; offset >>= 1)
#pragma unroll
      for (int j = 0; j < kCount; ++j)
#pragma unroll
        for (int g = 0; g < S::kGroupSize; ++g) score[g][j] += __shfl_xor_sync(~0u, score[g][j], offset);
  }

  // The warp's groups of lanes into one; the first group's lanes have the result.
  __device__ __forceinline__ void merge_lanes() {
#pragma unroll
    for (int offset = S::kRowLanes; offset < 32; offset <<= 1)
#pragma unroll
      for (int g = 0; g < S::kGroupSize; ++g) {
        const float other = __shfl_xor_sync(~0u, maximum[g], offset);
        const float new_maximum = fmaxf(maximum[g], other);
        const float mine = maximum[g] == -INFINITY ? 0.f : expf(maximum[g] - new_maximum);
        const float theirs = other == -INFINITY ? 0.f : expf(other - new_maximum);
        maximum[g] = new_maximum;
        total[g] = total[g] * mine + __shfl_xor_sync(~0u, total[g], offset) * theirs;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          out[g][i] = out[g][i] * mine + __shfl_xor_sync(~0u, out[g][i], offset) * theirs;
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
    wait_rows(q, vector, {(item.kv_head * S::kGroupSize + warp) * S::kDim}, item.column, c.tag - 1, c.dog);
    q[0].norm_rope(qk_norm, p.talker_rope + int64_t(own.position) * S::kDim, D::kEps);
    const float scale = 1.0f / sqrtf(float(S::kDim));
#pragma unroll
    for (int i = 0; i < 4; ++i) q[0].x[i] *= scale;
    q[0].store(sh.q[warp]);
  }
  const int column = own.first + (kWarps - 1 - warp);
  if (column <= item.column) {
    HeadRow<S::kDim> kv[2];
    wait_rows(kv, vector, {S::kQRows + item.kv_head * S::kDim, S::kQRows + S::kKRows + item.kv_head * S::kDim}, column,
              c.tag - 1, c.dog);
    const int position = p.columns[column].position;
    kv[0].norm_rope(qk_norm + S::kDim, p.talker_rope + int64_t(position) * S::kDim, D::kEps);
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
  for (int i = thread_index(); i < S::kGroupSize * S::kDim / 2; i += kThreads) {
    const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2));
    float maximum = -INFINITY, total = 0.f, low = 0.f, high = 0.f;
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, sh.maximum[g][w]);
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) {
      const float weight = sh.total[g][w] > 0.f ? expf(sh.maximum[g][w] - maximum) : 0.f;
      const float2 out = *reinterpret_cast<const float2*>(&sh.out[w][g][dim]);
      total += weight * sh.total[g][w];
      low += weight * out.x;
      high += weight * out.y;
    }
    if (whole) {
      const int row = (item.kv_head * S::kGroupSize + g) * S::kDim + dim;
      publish_pair(p, p.packets + PacketLayout::kHeadsOut, row, item.column, low / total, high / total, c.tag,
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

template <class D>
__device__ __forceinline__ void attend_item(Context& c, const AttentionItem& item, int layer) {
  using S = HeadShape<D>;
  const FrameParams& p = c.p;
  auto& sh = *reinterpret_cast<AttentionShared<D>*>(c.scratch.partial[c.buffer]);
  const Column& own = p.columns[item.column];
  const int64_t at =
      ((int64_t(layer) * p.num_slots + own.slot) * D::kKvHeads + item.kv_head) * p.max_positions * S::kDim;
  const int begin = item.split * kSplitPositions, end = min(begin + kSplitPositions, own.position + 1);
  const int old_end = min(end, p.columns[own.first].position);

  uint4 k[kBatch], v[kBatch];
  bool valid[kBatch];
  constexpr int kStep = kWarps * S::kRowsAtOnce;
  auto fetch = [&](int first) {
    const int lane = lane_index(), position = first + warp_index() * S::kRowsAtOnce + lane / S::kRowLanes;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      valid[j] = position + j * kStep < old_end;
      const int64_t row = at + (valid[j] ? position + j * kStep : begin) * S::kDim + lane % S::kRowLanes * 8;
      k[j] = __ldcg(reinterpret_cast<const uint4*>(p.k_cache + row));
      v[j] = __ldcg(reinterpret_cast<const uint4*>(p.v_cache + row));
    }
  };
  fetch(begin);
  read_new_rows<D>(c, sh, item, layer, p.k_cache + at, p.v_cache + at);
  sync_compute();
  Running<D> running;
  running.clear();
#pragma unroll 1
  for (int first = begin; first < old_end; first += kBatch * kStep) {
    running.see(sh.q, k, v, valid);
    if (first + kBatch * kStep < old_end) fetch(first + kBatch * kStep);
  }
  const int warp = warp_index(), lane = lane_index();
  if (warp * S::kRowsAtOnce < kMaxColumns) {  // this launch's rows, one a group of lanes
    const int row = warp * S::kRowsAtOnce + lane / S::kRowLanes;
    const int position = p.columns[own.first].position + row;
    const bool counts[1] = {position >= begin && position < end};
    const int from = counts[0] ? row : 0;
    const uint4 new_k[1] = {*reinterpret_cast<const uint4*>(sh.k[from] + lane % S::kRowLanes * 8)};
    const uint4 new_v[1] = {*reinterpret_cast<const uint4*>(sh.v[from] + lane % S::kRowLanes * 8)};
    running.see(sh.q, new_k, new_v, counts);
  }
  running.merge_lanes();
#pragma unroll
  for (int g = 0; g < S::kGroupSize; ++g) {
    if (lane == 0) {
      sh.maximum[g][warp] = running.maximum[g];
      sh.total[g][warp] = running.total[g];
    }
    if (lane < S::kRowLanes) {
      float4* to = reinterpret_cast<float4*>(&sh.out[warp][g][lane * 8]);
      to[0] = make_float4(running.out[g][0], running.out[g][1], running.out[g][2], running.out[g][3]);
      to[1] = make_float4(running.out[g][4], running.out[g][5], running.out[g][6], running.out[g][7]);
    }
  }
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
        if (ok) break;
        if (c.dog.tired(spin)) c.dog.bark(Phase::kCombine, c.tag);
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
    publish_pair(p, p.packets + PacketLayout::kHeadsOut, row, column, low / total, high / total, c.tag, row);
  }
}

// All items of one layer that fall to this CTA; reads c.tag - 1, publishes c.tag.
template <class D>
__device__ __forceinline__ void attend_talker(Context& c, int layer) {
  AttentionItem item;
  for (int i = blockIdx.x; AttentionItem::find(c.p, D::kKvHeads, i, item); i += gridDim.x) attend_item<D>(c, item, layer);
  // From the last CTA on, which has the fewest items.
  for (int i = gridDim.x - 1 - blockIdx.x; i < c.p.num_columns * D::kKvHeads; i += gridDim.x)
    if (c.p.columns[i / D::kKvHeads].position >= kSplitPositions) combine_splits<D>(c, i / D::kKvHeads, i % D::kKvHeads);
}

}  // namespace qwen_tts
