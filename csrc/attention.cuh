// Attention of one new row a stream: the talker's over a long cache, split over positions, and the
// predictor's over at most 16 positions of the same frame.
//
// An item is a stream, a key-value head and a chunk of positions; one CTA computes it with all its
// threads. Old keys and values are fetched before the new query is waited for. RMSNorm over
// head_dim, RoPE and softmax are in fp32; the new key and value are rounded to bf16, as they will
// be read in later frames.
#pragma once

#include "gemv.cuh"

namespace qwen_tts {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <class D>
struct HeadShape {
  static constexpr int kDim = D::kHeadDim;
  static constexpr int kGroupSize = D::kHeads / D::kKvHeads;  // query heads of a key-value head
  static constexpr int kPer = kDim / 32;                      // dims a lane holds
  static_assert(kDim == 64 || kDim == 128, "head_dim is 64 or 128");
};

template <class D>
struct AttentionShared {
  using S = HeadShape<D>;
  float q[kTiles][S::kGroupSize][S::kDim];
  float k[kTiles][S::kDim];
  float v[kTiles][S::kDim];
  float maximum[kTiles][S::kGroupSize][kWarps];
  float total[kTiles][S::kGroupSize][kWarps];
  float out[kWarps][S::kGroupSize][S::kDim];
};

// Read one head's worth (dims) of rows from a packet vector into shared memory, by threads
// `thread` .. of a group of dims / 2.
__device__ __forceinline__ void read_pair(const uint64_t* vector, int row, int stream, uint32_t tag,
                                          float* to, const Watchdog& dog) {
  const uint32_t bits =
      wait_packet(vector + packet_index(row / 16, (row % 16) / 2, stream), tag, dog, Phase::kAttention);
  const float2 pair = unpack_bf16(bits);
  to[0] = pair.x;
  to[1] = pair.y;
}

// RMSNorm and RoPE of one head by one warp, in place; rope: [dim / 2][2].
template <int kDim>
__device__ __forceinline__ void norm_rope(float* x, const __nv_bfloat16* weight, const float* rope,
                                          float eps) {
  constexpr int kPer = kDim / 32;
  const int lane = threadIdx.x & 31;
  float value[kPer], squares = 0.f;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    value[i] = x[lane + 32 * i];
    squares += value[i] * value[i];
  }
  const float scale = 1.0f / sqrtf(warp_sum(squares) / kDim + eps);
#pragma unroll
  for (int i = 0; i < kPer; ++i) value[i] *= scale * __bfloat162float(weight[lane + 32 * i]);
#pragma unroll
  for (int i = 0; i < kPer / 2; ++i) {
    const float2 angle = reinterpret_cast<const float2*>(rope)[lane + 32 * i];
    const float low = value[i], high = value[i + kPer / 2];
    x[lane + 32 * i] = low * angle.x - high * angle.y;
    x[lane + 32 * (i + kPer / 2)] = high * angle.x + low * angle.y;
  }
}

// The new row's q (all heads of the group), k and v into shared memory, normed and rotated.
// kTilesUsed rows (positions) of the same stream; without_kv leaves k and v out.
template <class D, int kUsedTiles>
__device__ __forceinline__ void read_new_rows(AttentionShared<D>& sh, const uint64_t* qkv, int stream,
                                              int kv_head, bool with_kv, const __nv_bfloat16* qk_norm,
                                              const float* rope, int rope_stride, uint32_t tag,
                                              const Watchdog& dog) {
  using S = HeadShape<D>;
  constexpr int kPairs = S::kDim / 2;
  constexpr int kQRows = D::kHeads * S::kDim, kKRows = D::kKvHeads * S::kDim;
  const int count = (S::kGroupSize + (with_kv ? 2 : 0)) * kPairs;
  for (int i = threadIdx.x; i < kUsedTiles * count; i += kThreads) {
    const int tile = i / count, j = i % count, head = j / kPairs, dim = 2 * (j % kPairs);
    const uint64_t* vector = qkv + int64_t(tile) * vector_packets(PacketLayout::kQkvRows);
    if (head < S::kGroupSize) {
      const int row = (kv_head * S::kGroupSize + head) * S::kDim + dim;
      read_pair(vector, row, stream, tag, &sh.q[tile][head][dim], dog);
    } else {
      const bool is_k = head == S::kGroupSize;
      const int row = kQRows + (is_k ? 0 : kKRows) + kv_head * S::kDim + dim;
      read_pair(vector, row, stream, tag, is_k ? &sh.k[tile][dim] : &sh.v[tile][dim], dog);
    }
  }
  __syncthreads();
  const int warp = threadIdx.x >> 5;
  const int heads = S::kGroupSize + (with_kv ? 1 : 0);
  for (int i = warp; i < kUsedTiles * heads; i += kWarps) {
    const int tile = i / heads, head = i % heads;
    const bool is_k = head == S::kGroupSize;
    norm_rope<S::kDim>(is_k ? sh.k[tile] : sh.q[tile][head], qk_norm + (is_k ? S::kDim : 0),
                       rope + tile * rope_stride, D::kEps);
  }
  __syncthreads();
  // What is attended now is what will be read later: bf16.
  if (with_kv)
    for (int i = threadIdx.x; i < kUsedTiles * S::kDim; i += kThreads) {
      const int tile = i / S::kDim, dim = i % S::kDim;
      sh.k[tile][dim] = __bfloat162float(__float2bfloat16_rn(sh.k[tile][dim]));
      sh.v[tile][dim] = __bfloat162float(__float2bfloat16_rn(sh.v[tile][dim]));
    }
  __syncthreads();
}

template <int kPer>
struct LaneRow {  // kPer bf16 of a key or value row, consecutive
  uint32_t bits[kPer / 2];

  __device__ __forceinline__ void load(const __nv_bfloat16* row, int lane) {
    const uint32_t* p = reinterpret_cast<const uint32_t*>(row) + lane * (kPer / 2);
#pragma unroll
    for (int i = 0; i < kPer / 2; ++i) bits[i] = __ldcg(p + i);
  }
  __device__ __forceinline__ void unpack(float (&x)[kPer]) const {
#pragma unroll
    for (int i = 0; i < kPer / 2; ++i) {
      const float2 pair = unpack_bf16(bits[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
};

// A warp's running softmax over the positions it has seen, for each query head of the group.
template <class D>
struct Running {
  using S = HeadShape<D>;
  float maximum[S::kGroupSize], total[S::kGroupSize], out[S::kGroupSize][S::kPer];

  __device__ __forceinline__ Running() {
#pragma unroll
    for (int g = 0; g < S::kGroupSize; ++g) {
      maximum[g] = -INFINITY;
      total[g] = 0.f;
#pragma unroll
      for (int i = 0; i < S::kPer; ++i) out[g][i] = 0.f;
    }
  }

  __device__ __forceinline__ void see(const float (&q)[S::kGroupSize][S::kPer], const float (&k)[S::kPer],
                                      const float (&v)[S::kPer]) {
#pragma unroll
    for (int g = 0; g < S::kGroupSize; ++g) {
      float score = 0.f;
#pragma unroll
      for (int i = 0; i < S::kPer; ++i) score += q[g][i] * k[i];
      score = warp_sum(score);
      const float new_maximum = fmaxf(maximum[g], score);
      const float fade = expf(maximum[g] - new_maximum), weight = expf(score - new_maximum);
      maximum[g] = new_maximum;
      total[g] = total[g] * fade + weight;
#pragma unroll
      for (int i = 0; i < S::kPer; ++i) out[g][i] = out[g][i] * fade + weight * v[i];
    }
  }
};

constexpr int kPreload = 4;  // positions a warp fetches before it waits for the query

// One item of the talker's attention. Publishes the heads' output, or with several splits this
// chunk's part of it.
template <class D>
__device__ __forceinline__ void attend_talker(const FrameParams& p, AttentionShared<D>& sh, int layer,
                                              int column, int kv_head, int split, uint32_t tag,
                                              const Watchdog& dog) {
  using S = HeadShape<D>;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const StreamParams& stream = p.streams[column];
  const int chunk = ceil_div(stream.position + 1, p.num_splits);
  const int begin = split * chunk, end = min(begin + chunk, stream.position + 1);
  const bool is_last = begin <= stream.position && stream.position < end;
  const int old_end = is_last ? stream.position : end;
  const int64_t head_at =
      ((int64_t(layer) * p.num_slots + stream.slot) * D::kKvHeads + kv_head) * p.max_positions;
  __nv_bfloat16* k_rows = p.k_cache + head_at * S::kDim;
  __nv_bfloat16* v_rows = p.v_cache + head_at * S::kDim;

  LaneRow<S::kPer> k_old[kPreload], v_old[kPreload];
#pragma unroll
  for (int i = 0; i < kPreload; ++i) {
    const int position = begin + warp + i * kWarps;
    if (position < old_end) {
      k_old[i].load(k_rows + int64_t(position) * S::kDim, lane);
      v_old[i].load(v_rows + int64_t(position) * S::kDim, lane);
    }
  }
  read_new_rows<D, 1>(sh, p.packets + PacketLayout::kQkv, column, kv_head, is_last,
                      p.talker_qk_norms + layer * 2 * S::kDim,
                      p.talker_rope + int64_t(stream.position) * S::kDim, 0, tag, dog);
  if (is_last && threadIdx.x < S::kDim) {
    k_rows[int64_t(stream.position) * S::kDim + threadIdx.x] = __float2bfloat16_rn(sh.k[0][threadIdx.x]);
    v_rows[int64_t(stream.position) * S::kDim + threadIdx.x] = __float2bfloat16_rn(sh.v[0][threadIdx.x]);
  }
  float q[S::kGroupSize][S::kPer], k[S::kPer], v[S::kPer];
  const float scale = 1.0f / sqrtf(float(S::kDim));
#pragma unroll
  for (int g = 0; g < S::kGroupSize; ++g)
#pragma unroll
    for (int i = 0; i < S::kPer; ++i) q[g][i] = sh.q[0][g][lane * S::kPer + i] * scale;

  Running<D> running;
  for (int first = begin + warp; first < old_end; first += kPreload * kWarps) {
#pragma unroll
    for (int i = 0; i < kPreload; ++i) {
      const int position = first + i * kWarps;
      if (position >= old_end) break;
      k_old[i].unpack(k);
      v_old[i].unpack(v);
      running.see(q, k, v);
      const int next = position + kPreload * kWarps;
      if (next < old_end) {
        k_old[i].load(k_rows + int64_t(next) * S::kDim, lane);
        v_old[i].load(v_rows + int64_t(next) * S::kDim, lane);
      }
    }
  }
  if (is_last && warp == 0) {
#pragma unroll
    for (int i = 0; i < S::kPer; ++i) {
      k[i] = sh.k[0][lane * S::kPer + i];
      v[i] = sh.v[0][lane * S::kPer + i];
    }
    running.see(q, k, v);
  }
#pragma unroll
  for (int g = 0; g < S::kGroupSize; ++g) {
    if (lane == 0) {
      sh.maximum[0][g][warp] = running.maximum[g];
      sh.total[0][g][warp] = running.total[g];
    }
#pragma unroll
    for (int i = 0; i < S::kPer; ++i) sh.out[warp][g][lane * S::kPer + i] = running.out[g][i];
  }
  __syncthreads();
  // Merge the warps, always in their order.
  uint64_t* partial = p.packets + PacketLayout::kPartials +
                      (int64_t(column * D::kKvHeads + kv_head) * kMaxSplits + split) * PacketLayout::kPartial;
  for (int i = threadIdx.x; i < S::kGroupSize * S::kDim / 2; i += kThreads) {
    const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2));
    float maximum = -INFINITY, total = 0.f, low = 0.f, high = 0.f;
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, sh.maximum[0][g][w]);
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) {
      const float weight = sh.total[0][g][w] > 0.f ? expf(sh.maximum[0][g][w] - maximum) : 0.f;
      total += weight * sh.total[0][g][w];
      low += weight * sh.out[w][g][dim];
      high += weight * sh.out[w][g][dim + 1];
    }
    if (p.num_splits == 1) {
      const int row = (kv_head * S::kGroupSize + g) * S::kDim + dim;
      store_packet(p.packets + PacketLayout::kHeadsOut + packet_index(row / 16, (row % 16) / 2, column),
                   pack_bf16(low / total, high / total), tag + 1);
    } else {
      uint64_t* to = partial + g * (S::kDim + 2);
      store_packet(to + dim, __float_as_uint(low), tag + 1);
      store_packet(to + dim + 1, __float_as_uint(high), tag + 1);
      if (dim == 0) {
        store_packet(to + S::kDim, __float_as_uint(maximum), tag + 1);
        store_packet(to + S::kDim + 1, __float_as_uint(total), tag + 1);
      }
    }
  }
  __syncthreads();
}

// With several splits: merge the parts of one head group, in the order of the splits, and publish.
template <class D>
__device__ __forceinline__ void combine_splits(const FrameParams& p, int column, int kv_head, uint32_t tag,
                                               const Watchdog& dog) {
  using S = HeadShape<D>;
  const uint64_t* parts = p.packets + PacketLayout::kPartials +
                          int64_t(column * D::kKvHeads + kv_head) * kMaxSplits * PacketLayout::kPartial;
  for (int i = threadIdx.x; i < S::kGroupSize * S::kDim / 2; i += kThreads) {
    const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2));
    float maximum = -INFINITY, total = 0.f, low = 0.f, high = 0.f;
    for (int s = 0; s < p.num_splits; ++s) {
      const uint64_t* from = parts + int64_t(s) * PacketLayout::kPartial + g * (S::kDim + 2);
      auto value = [&](int at) {
        return __uint_as_float(wait_packet(from + at, tag + 1, dog, Phase::kCombine));
      };
      const float part_maximum = value(S::kDim), part_total = value(S::kDim + 1);
      const float part_low = value(dim), part_high = value(dim + 1);
      if (part_total <= 0.f) continue;  // a chunk without positions
      const float new_maximum = fmaxf(maximum, part_maximum);
      const float fade = expf(maximum - new_maximum), weight = expf(part_maximum - new_maximum);
      maximum = new_maximum;
      total = total * fade + weight * part_total;
      low = low * fade + weight * part_low;
      high = high * fade + weight * part_high;
    }
    const int row = (kv_head * S::kGroupSize + g) * S::kDim + dim;
    store_packet(p.packets + PacketLayout::kHeadsOut + packet_index(row / 16, (row % 16) / 2, column),
                 pack_bf16(low / total, high / total), tag + 1);
  }
}

// One item of the predictor's attention: kUsedTiles new positions, the first at `position`.
// Its keys and values are written and read by this CTA alone.
template <class D, int kUsedTiles>
__device__ __forceinline__ void attend_predictor(const FrameParams& p, AttentionShared<D>& sh, int layer,
                                                 int column, int kv_head, int position, uint32_t tag,
                                                 const Watchdog& dog) {
  using S = HeadShape<D>;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  __nv_bfloat16* k_rows =
      p.predictor_kv +
      ((int64_t(layer) * kMaxStreams + column) * D::kKvHeads + kv_head) * 2 * kNumCodebooks * S::kDim;
  __nv_bfloat16* v_rows = k_rows + kNumCodebooks * S::kDim;
  LaneRow<S::kPer> k_old, v_old;  // a warp's position is its number
  if (warp < position) {
    k_old.load(k_rows + warp * S::kDim, lane);
    v_old.load(v_rows + warp * S::kDim, lane);
  }
  read_new_rows<D, kUsedTiles>(sh, p.packets + PacketLayout::kQkv, column, kv_head, true,
                               p.predictor_qk_norms + layer * 2 * S::kDim,
                               p.predictor_rope + position * S::kDim, S::kDim, tag, dog);
  for (int i = threadIdx.x; i < kUsedTiles * S::kDim; i += kThreads) {
    const int tile = i / S::kDim, dim = i % S::kDim;
    k_rows[(position + tile) * S::kDim + dim] = __float2bfloat16_rn(sh.k[tile][dim]);
    v_rows[(position + tile) * S::kDim + dim] = __float2bfloat16_rn(sh.v[tile][dim]);
  }
  float k[S::kPer], v[S::kPer];
  const int mine = warp - position;  // >= 0: one of the new rows
  if (mine < 0) {
    k_old.unpack(k);
    v_old.unpack(v);
  } else if (mine < kUsedTiles) {
#pragma unroll
    for (int i = 0; i < S::kPer; ++i) {
      k[i] = sh.k[mine][lane * S::kPer + i];
      v[i] = sh.v[mine][lane * S::kPer + i];
    }
  }
  const float scale = 1.0f / sqrtf(float(S::kDim));
#pragma unroll
  for (int tile = 0; tile < kUsedTiles; ++tile)
#pragma unroll
    for (int g = 0; g < S::kGroupSize; ++g) {
      float score = -INFINITY;
      if (mine <= tile && mine < kUsedTiles) {
        score = 0.f;
#pragma unroll
        for (int i = 0; i < S::kPer; ++i) score += sh.q[tile][g][lane * S::kPer + i] * scale * k[i];
        score = warp_sum(score);
      }
      if (lane == 0) sh.maximum[tile][g][warp] = score;
    }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < kUsedTiles; ++tile) {
#pragma unroll
    for (int g = 0; g < S::kGroupSize; ++g) {
      float maximum = -INFINITY, total = 0.f;
#pragma unroll 4
      for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, sh.maximum[tile][g][w]);
#pragma unroll 4
      for (int w = 0; w < kWarps; ++w) total += expf(sh.maximum[tile][g][w] - maximum);
      const bool sees = mine <= tile && mine < kUsedTiles;
      const float weight = sees ? expf(sh.maximum[tile][g][warp] - maximum) / total : 0.f;
#pragma unroll
      for (int i = 0; i < S::kPer; ++i) sh.out[warp][g][lane * S::kPer + i] = sees ? weight * v[i] : 0.f;
    }
    __syncthreads();
    uint64_t* to = p.packets + PacketLayout::kHeadsOut +
                   int64_t(tile) * vector_packets(PacketLayout::kHeadRows);
    for (int i = threadIdx.x; i < S::kGroupSize * S::kDim / 2; i += kThreads) {
      const int g = i / (S::kDim / 2), dim = 2 * (i % (S::kDim / 2));
      float low = 0.f, high = 0.f;
#pragma unroll 4
      for (int w = 0; w < kWarps; ++w) {
        low += sh.out[w][g][dim];
        high += sh.out[w][g][dim + 1];
      }
      const int row = (kv_head * S::kGroupSize + g) * S::kDim + dim;
      store_packet(to + packet_index(row / 16, (row % 16) / 2, column), pack_bf16(low, high), tag + 1);
    }
    __syncthreads();
  }
}

}  // namespace qwen_tts
