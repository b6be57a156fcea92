// One decoder layer, for the talker and for the predictor: five exchanges.
//
//   QKV        every CTA  polls the residual's deltas, multiplies its rows of Wq, Wk, Wv, publishes
//   attention  one CTA an item (stream, key-value head, chunk)      [attention.cuh]
//   O          every CTA  polls the heads' output, publishes deltas (k in two parts where rows are few)
//   gate-up    every CTA  polls the deltas, publishes silu(gate) * up
//   down       every CTA  polls that, publishes deltas
//
// Every CTA keeps the whole residual, in fp32, spread over the registers of its warps in B-fragment
// order. RMSNorm is deferred: the product runs on gamma * x, and its rows are scaled by
// 1 / rms(x) when they are finished, so nothing waits for the sum of squares.
#pragma once

#include "attention.cuh"

namespace qwen_tts {

constexpr int split_of(int rows, int k) { return rows <= 64 * 16 && k >= 1024 ? 2 : 1; }

template <class D>
struct Products {
  static constexpr int kHeadRows = D::kHeads * D::kHeadDim;
  using Qkv = Product<kHeadRows + 2 * D::kKvHeads * D::kHeadDim, D::kHidden, 1>;
  using Out = Product<D::kHidden, kHeadRows, split_of(D::kHidden, kHeadRows)>;
  using GateUp = Product<2 * D::kIntermediate, D::kHidden, 1>;
  using Down = Product<D::kHidden, D::kIntermediate, split_of(D::kHidden, D::kIntermediate)>;
  using Head = Product<D::kVocab, D::kHidden, 1>;
  static constexpr int kPieceA = Qkv::kPieceChunks * 512, kPieceB = Down::kPieceChunks * 512;
  static_assert(Out::kPieceChunks == Qkv::kPieceChunks, "pieces of a layer have two sizes");

  template <class P>
  static __device__ __forceinline__ int pieces() {
    const int b = blockIdx.x, n = gridDim.x;
    return b < P::kItems ? ceil_div(P::kItems - b, n) * P::kPieces : 0;
  }
  static __device__ __forceinline__ Cut layer_cut() {
    const int small = pieces<Qkv>() + pieces<Out>() + pieces<GateUp>();
    return {small, small + pieces<Down>()};
  }
};

// The residual rows of a tile as this warp holds them: lane n * 4 + t has, of chunk c,
// values {2t, 2t + 1, 2t + 8, 2t + 9} of stream n.
template <class D>
struct Residual {
  static constexpr int kChunks = Products<D>::Qkv::kChunks;
  float x[kChunks][4];

  static __device__ __forceinline__ bool real() {  // not padding
    return int(threadIdx.x >> 5) * kChunks < Products<D>::Qkv::kRealChunks;
  }
  static __device__ __forceinline__ int first_k(int c) {
    return (int(threadIdx.x >> 5) * kChunks + c) * kChunk + 2 * int(threadIdx.x & 3);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[c][i] = 0.f;
  }
  __device__ __forceinline__ void add_bf16(const __nv_bfloat16* row) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(row + first_k(c) + 8 * half));
        const float2 pair = unpack_bf16(bits);
        x[c][2 * half] += pair.x;
        x[c][2 * half + 1] += pair.y;
      }
  }
  __device__ __forceinline__ void add_fp32(const float* row) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = __ldcg(reinterpret_cast<const float2*>(row + first_k(c) + 8 * half));
        x[c][2 * half] += pair.x;
        x[c][2 * half + 1] += pair.y;
      }
  }
  // Deltas published by a product with kSplit parts of k.
  template <int kSplit>
  __device__ __forceinline__ void add_deltas(const uint64_t* vectors, uint32_t tag, const Watchdog& dog) {
    const uint64_t* at = vectors + (int(threadIdx.x >> 5) * kChunks * 32 + int(threadIdx.x & 31)) * 2;
#pragma unroll
    for (int s = 0; s < kSplit; ++s) {
      uint4 v[kChunks];
      wait_pairs<kChunks>(at + int64_t(s) * vector_packets(PacketLayout::kHidden), 64, tag, v, dog,
                          Phase::kInput);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const float2 low = unpack_bf16(v[c].x), high = unpack_bf16(v[c].z);
        x[c][0] += low.x;
        x[c][1] += low.y;
        x[c][2] += high.x;
        x[c][3] += high.y;
      }
    }
  }
};

// gamma of a norm, in the residual's order; fetched before the deltas are waited for.
template <class D>
struct Gamma {
  static constexpr int kChunks = Residual<D>::kChunks;
  uint32_t bits[kChunks][2];

  __device__ __forceinline__ void load(const __nv_bfloat16* weight) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        bits[c][half] = Residual<D>::real()
                            ? __ldg(reinterpret_cast<const uint32_t*>(
                                  weight + Residual<D>::first_k(c) + 8 * half))
                            : 0u;
  }
};

// What a CTA carries through the frame.
template <class R, class NextRun>
struct Context {
  const FrameParams& p;
  Scratch& scratch;
  R& ring;
  NextRun& next_run;
  Watchdog dog;
  uint32_t tag;       // of the next exchange
  int buffer = 0;     // of the partial sums
  int squares = 0;    // of the sums of squares
  int column;         // this lane's stream
  bool active;        // whether there is such a stream

  template <int kRows>
  __device__ __forceinline__ uint64_t* vector(int64_t at, int tile, int vectors = 1) const {
    return p.packets + at + int64_t(tile) * vectors * vector_packets(kRows);
  }
};

// gamma * x as B operand, and the sum of squares for the norm.
template <class D, class C>
__device__ __forceinline__ void normed_fragments(C& c, const Residual<D>& r, const Gamma<D>& gamma, int tile,
                                                 uint2 (&f)[Residual<D>::kChunks]) {
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < Residual<D>::kChunks; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 g = unpack_bf16(gamma.bits[j][half]);
      const float low = r.x[j][2 * half], high = r.x[j][2 * half + 1];
      squares += low * low + high * high;
      (half ? f[j].y : f[j].x) = pack_bf16(low * g.x, high * g.y);
    }
  }
  squares += __shfl_xor_sync(~0u, squares, 1);
  squares += __shfl_xor_sync(~0u, squares, 2);
  if ((threadIdx.x & 3) == 0)
    c.scratch.sum_of_squares[c.squares][tile][threadIdx.x >> 5][(threadIdx.x & 31) >> 2] = squares;
}

template <class D, class C>
__device__ __forceinline__ float rms_scale(const C& c, int tile, int stream) {
  float sum = 0.f;
#pragma unroll 8
  for (int w = 0; w < kWarps; ++w) sum += c.scratch.sum_of_squares[c.squares][tile][w][stream];
  return 1.0f / sqrtf(sum / D::kHidden + D::kEps);
}

// The B operand of a product whose input is a published vector.
template <class P, class C>
__device__ __forceinline__ void wait_fragments(const C& c, const uint64_t* vector, int split, uint32_t tag,
                                               Phase phase, uint2 (&f)[P::kChunks]) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  static_assert(P::kRealChunks % P::kChunks == 0, "padding is whole warps");
#pragma unroll
  for (int j = 0; j < P::kChunks; ++j) f[j] = make_uint2(0, 0);
  if (c.active && warp * P::kChunks < P::kRealChunks) {
    uint4 v[P::kChunks];
    const int chunk = split * P::kRealChunks + warp * P::kChunks;
    wait_pairs<P::kChunks>(vector + (chunk * 32 + lane) * 2, 64, tag, v, c.dog, phase);
#pragma unroll
    for (int j = 0; j < P::kChunks; ++j) f[j] = make_uint2(v[j].x, v[j].z);
  }
  __syncwarp();
}

// norms: [2][hidden] of this layer. `deltas`: whether the residual still lacks the deltas of the
// down projection before (tag - 1). After it, it lacks this layer's.
template <class D, int kUsedTiles, class C, class Attend>
__device__ __forceinline__ void decoder_layer(C& c, Residual<D> (&r)[kUsedTiles], const __nv_bfloat16* norms,
                                              bool deltas, Attend&& attend) {
  using P = Products<D>;
  using L = PacketLayout;
  const FrameParams& p = c.p;
  Gamma<D> gamma;

  // QKV
  gamma.load(norms);
  if (deltas && c.active && Residual<D>::real())
#pragma unroll
    for (int t = 0; t < kUsedTiles; ++t)
      r[t].template add_deltas<P::Down::kSplit>(c.template vector<L::kHidden>(L::kDeltaDown, t, 2), c.tag - 1,
                                                c.dog);
  __syncwarp();
  gemv<typename P::Qkv, kUsedTiles>(
      c.ring, c.next_run, c.scratch, c.buffer,
      [&](int, uint2(&f)[kUsedTiles][P::Qkv::kChunks]) {
#pragma unroll
        for (int t = 0; t < kUsedTiles; ++t) normed_fragments<D>(c, r[t], gamma, t, f[t]);
      },
      [&](int tile, int strip, int, const Cell& cell, float2 rows) {
        if (cell.stream >= p.num_streams) return;
        const float scale = rms_scale<D>(c, tile, cell.stream);
        store_packet(c.template vector<L::kQkvRows>(L::kQkv, tile) + packet_index(strip, cell.pair, cell.stream),
                     pack_bf16(rows.x * scale, rows.y * scale), c.tag);
      });
  c.squares ^= 1;

  // attention: reads tag, publishes tag + 1
  attend(c.tag);
  c.tag += 2;

  // O: reads tag - 1
  gemv<typename P::Out, kUsedTiles>(
      c.ring, c.next_run, c.scratch, c.buffer,
      [&](int split, uint2(&f)[kUsedTiles][P::Out::kChunks]) {
#pragma unroll
        for (int t = 0; t < kUsedTiles; ++t)
          wait_fragments<typename P::Out>(c, c.template vector<L::kHeadRows>(L::kHeadsOut, t), split, c.tag - 1,
                                          Phase::kOut, f[t]);
      },
      [&](int tile, int strip, int split, const Cell& cell, float2 rows) {
        if (cell.stream >= p.num_streams) return;
        store_packet(c.template vector<L::kHidden>(L::kDeltaO, tile, 2) + split * vector_packets(L::kHidden) +
                         packet_index(strip, cell.pair, cell.stream),
                     pack_bf16(rows.x, rows.y), c.tag);
      });
  ++c.tag;

  // gate-up
  gamma.load(norms + D::kHidden);
  if (c.active && Residual<D>::real())
#pragma unroll
    for (int t = 0; t < kUsedTiles; ++t)
      r[t].template add_deltas<P::Out::kSplit>(c.template vector<L::kHidden>(L::kDeltaO, t, 2), c.tag - 1, c.dog);
  __syncwarp();
  gemv<typename P::GateUp, kUsedTiles>(
      c.ring, c.next_run, c.scratch, c.buffer,
      [&](int, uint2(&f)[kUsedTiles][P::GateUp::kChunks]) {
#pragma unroll
        for (int t = 0; t < kUsedTiles; ++t) normed_fragments<D>(c, r[t], gamma, t, f[t]);
      },
      [&](int tile, int strip, int, const Cell& cell, float2 rows) {
        // Rows 0..7 of a strip are gates, 8..15 the ups of the same eight.
        const float up_low = __shfl_down_sync(~0u, rows.x, 16), up_high = __shfl_down_sync(~0u, rows.y, 16);
        if (cell.pair >= 4 || cell.stream >= p.num_streams) return;
        const float scale = rms_scale<D>(c, tile, cell.stream);
        const float low = rows.x * scale, high = rows.y * scale;
        const float inner_low = low / (1.0f + expf(-low)) * (up_low * scale);
        const float inner_high = high / (1.0f + expf(-high)) * (up_high * scale);
        store_packet(c.template vector<L::kInner>(L::kMlpInner, tile) +
                         packet_index(strip / 2, strip % 2 * 4 + cell.pair, cell.stream),
                     pack_bf16(inner_low, inner_high), c.tag);
      });
  c.squares ^= 1;
  ++c.tag;

  // down: reads tag - 1
  gemv<typename P::Down, kUsedTiles>(
      c.ring, c.next_run, c.scratch, c.buffer,
      [&](int split, uint2(&f)[kUsedTiles][P::Down::kChunks]) {
#pragma unroll
        for (int t = 0; t < kUsedTiles; ++t)
          wait_fragments<typename P::Down>(c, c.template vector<L::kInner>(L::kMlpInner, t), split, c.tag - 1,
                                           Phase::kMlp, f[t]);
      },
      [&](int tile, int strip, int split, const Cell& cell, float2 rows) {
        if (cell.stream >= p.num_streams) return;
        store_packet(c.template vector<L::kHidden>(L::kDeltaDown, tile, 2) +
                         split * vector_packets(L::kHidden) + packet_index(strip, cell.pair, cell.stream),
                     pack_bf16(rows.x, rows.y), c.tag);
      });
  ++c.tag;
}

}  // namespace qwen_tts
