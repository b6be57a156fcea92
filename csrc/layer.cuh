// One decoder layer, for the talker and for the predictor: five exchanges.
//
//   QKV        every CTA  polls the residual's deltas, multiplies its rows of Wq, Wk, Wv, publishes
//   attention  one CTA an item (column, key-value head, split)      [attention.cuh]
//   O          every CTA  polls the heads' output, publishes deltas (k in two parts where rows are few)
//   gate-up    every CTA  polls the deltas, publishes silu(gate) * up
//   down       every CTA  polls that, publishes deltas
//
// Every CTA keeps the whole residual, in fp32, spread over the registers of its warps in B-fragment
// order. RMSNorm is deferred: its weight is in the product that follows (decoding/weight_packing.py), which runs on x, and whose rows
// are scaled by 1 / rms(x) when they are finished, so nothing waits for the sum of squares.
#pragma once

#include "kv_tile.cuh"

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
  static constexpr int64_t kLayerBytes = Qkv::kBytes + Out::kBytes + GateUp::kBytes + Down::kBytes;
  static constexpr int kMaxPieceBytes = max_of(max_of(Qkv::kPieceBytes, Out::kPieceBytes), Down::kPieceBytes);
  static constexpr int kMinPieceBytes = min_of(min_of(Qkv::kPieceBytes, Out::kPieceBytes), Down::kPieceBytes);
};

// The talker's hidden row becomes the predictor's input; where their widths differ, through a
// projection with bias (codes come from tables that were projected when the weights were packed).
constexpr bool kProjects = TalkerDims::kHidden != PredictorDims::kHidden;
using Projection = Product<PredictorDims::kHidden, TalkerDims::kHidden, 1>;

using TalkerProducts = Products<TalkerDims>;
using PredictorProducts = Products<PredictorDims>;

// What a CTA keeps in shared memory: what is left of it is the ring.
struct SamplerShared {
  uint32_t key[kWarps], score[kWarps];
  int index[kWarps];
  int count[kWarps];
  float mass[kWarps];
};
using TalkerTile = TilePieces<TalkerDims>;
constexpr int kMaxPieceBytes =
    max_of(max_of(TalkerProducts::kMaxPieceBytes, PredictorProducts::kMaxPieceBytes), TalkerTile::kBytes);
constexpr int kMinPieceBytes =
    min_of(min_of(TalkerProducts::kMinPieceBytes, PredictorProducts::kMinPieceBytes), TalkerTile::kBytes);
constexpr int kOtherBytes = sizeof(Scratch) + sizeof(SamplerShared) + sizeof(FrameParams) + 256;
constexpr int kRingBytes = ring_bytes((kSharedBytes - kOtherBytes) / kWarps, kChunkBytes, kMinPieceBytes);
static_assert(kRingBytes >= 2 * kMaxPieceBytes, "the ring must hold two pieces");
using FrameRing = RingShared<kRingBytes, kMinPieceBytes>;

// Exchanges from the last QKV of position 0's own pass to that of the next pass: a code, and layers.
constexpr int kLoneFor = 2 + 5 * (PredictorDims::kLayers - 1);

// A bit for each column that holds a row of a stream.
__device__ __forceinline__ uint32_t columns_of(const FrameParams& p) { return (1u << p.num_columns) - 1; }

// What a computing warp carries through the frame.
struct Context {
  const FrameParams& p;
  Scratch& scratch;
  RingReader<FrameRing> ring;
  Watchdog dog;
  uint32_t tag;  // of the next exchange
  // Where it is, in one register over all waits. From bit 0 on, a bit for each column in use; which buffer of the
  // partial sums is free; whether this thread writes the stamps, and whether exchanges are dumped; the layer; the
  // predictor's pass.
  uint32_t state;
  static constexpr uint32_t kColumns = 0xff, kBuffer = 0x100, kStamps = 0x200, kDumps = 0x400;
  static constexpr int kLayerFrom = 16, kPassFrom = 24;

  __device__ __forceinline__ int layer() const { return fresh_state() >> kLayerFrom & 0xff; }
  __device__ __forceinline__ int pass() const { return fresh_state() >> kPassFrom; }
  __device__ __forceinline__ void next_layer() { state += 1u << kLayerFrom; }
  __device__ __forceinline__ void begin_pass(int pass) {
    state = (state & ((1u << kLayerFrom) - 1)) | uint32_t(pass) << kPassFrom;
  }
  __device__ __forceinline__ void use_columns(uint32_t columns) { state = (state & ~kColumns) | columns; }
  __device__ __forceinline__ int buffer() const { return state / kBuffer & 1; }
  __device__ __forceinline__ void take_buffer() { state ^= kBuffer; }
  __device__ __forceinline__ bool stamps() const { return state & kStamps; }
  __device__ __forceinline__ bool dumps() const { return state & kDumps; }
  static __device__ __forceinline__ uint32_t first_state(const FrameParams& p) {
    const bool stamps = p.stamps != nullptr && block_index() == 0 && thread_index() == 0;
    return columns_of(p) | (stamps ? kStamps : 0) | (p.dump_exchanges != nullptr ? kDumps : 0);
  }

  static __device__ __forceinline__ int column() { return lane_index() >> 2; }  // this lane's
  // The lane whose values this one takes from the exchanges: its own, or one of column 0 where its column is
  // not in use. Products keep columns apart, so what an unused one holds does not matter.
  __device__ __forceinline__ int polled_lane() const { return uses(column()) ? lane_index() : lane_index() & 3; }
  __device__ __forceinline__ bool uses(int column) const { return state >> column & 1; }
  __device__ __forceinline__ bool finishes(const Cell& cell) const { return cell.leads && uses(cell.column); }

  // This CTA has done its part of an exchange.
  __device__ __forceinline__ void advance() {
    if (stamps()) p.stamps[tag - p.epoch] = nanoseconds();
    ++tag;
    opaque(tag);
  }

 private:
  // What is computed from it is not kept over a wait.
  __device__ __forceinline__ uint32_t fresh_state() const {
    uint32_t x = state;
    opaque(x);
    return x;
  }
};

// The residual rows as this warp holds them: lane n * 4 + t has, of chunk c,
// values {2t, 2t + 1, 2t + 8, 2t + 9} of column n.
template <class D>
struct Residual {
  static constexpr int kChunks = Products<D>::Qkv::kChunks;
  float x[kChunks][4];

  static __device__ __forceinline__ bool real() { return Products<D>::Qkv::real(warp_index()); }
  // Where in a row this lane's first pair stands; the others at fixed distances from it.
  static __device__ __forceinline__ int first_k() {
    return warp_index() * kChunks * kChunk + 2 * (thread_index() & 3);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[c][i] = 0.f;
  }
  __device__ __forceinline__ void add_bf16(const __nv_bfloat16* row) {
    row += first_k();
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(row + kChunk * c + 8 * half));
        const float2 pair = unpack_bf16(bits);
        x[c][2 * half] += pair.x;
        x[c][2 * half + 1] += pair.y;
      }
  }
  __device__ __forceinline__ void add_fp32(const float* row) {
    row += first_k();
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = __ldcg(reinterpret_cast<const float2*>(row + kChunk * c + 8 * half));
        x[c][2 * half] += pair.x;
        x[c][2 * half + 1] += pair.y;
      }
  }
  // Add what a product published, in its kSplit parts of k, all polled at once.
  template <int kSplit>
  __device__ __forceinline__ void add_deltas(const Context& c, const uint64_t* vectors, uint32_t tag) {
    if (!real()) return;
    TwoPackets v[kSplit][kChunks];
    wait_pairs(vectors + (warp_index() * kChunks * 32 + c.polled_lane()) * 2, vector_packets(PacketLayout::kHidden), tag, v,
               c.dog, Phase::kInput);
#pragma unroll
    for (int s = 0; s < kSplit; ++s)
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const float2 low = unpack_bf16(v[s][j].first()), high = unpack_bf16(v[s][j].second());
        x[j][0] += low.x;
        x[j][1] += low.y;
        x[j][2] += high.x;
        x[j][3] += high.y;
      }
  }
};

// x as B operand of a norm's product, and the sum of squares for the norm. Norms that follow each other use
// different `squares`: a slow warp may still read the last one's.
template <class D>
__device__ __forceinline__ void normed_fragments(Context& c, const Residual<D>& r, int squares_at,
                                                 uint2 (&f)[Residual<D>::kChunks]) {
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < Residual<D>::kChunks; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float low = r.x[j][2 * half], high = r.x[j][2 * half + 1];
      squares += low * low + high * high;
      (half ? f[j].y : f[j].x) = pack_bf16(low, high);
    }
  }
  squares += __shfl_xor_sync(~0u, squares, 1);
  squares += __shfl_xor_sync(~0u, squares, 2);
  if ((thread_index() & 3) == 0)
    c.scratch.sum_of_squares[squares_at][warp_index()][lane_index() >> 2] = squares;
}

// 1 / rms of the column that a lane finishes rows of (Cell), for whole warps; from squares_part.
template <class D>
__device__ __forceinline__ float rms_scale(float squares) {
  squares += __shfl_xor_sync(~0u, squares, 8);
  squares += __shfl_xor_sync(~0u, squares, 16);
  return rsqrtf(squares * (1.f / D::kHidden) + D::kEps);
}

// x / (1 + exp(-x)). Where the exponential is cut off the result has long been nothing in bf16.
__device__ __forceinline__ float silu(float x) { return divide(x, 1.f + expf(fminf(-x, 80.f))); }

// The B operand of a product whose input is a published vector, from chunk `first` of this warp's.
template <class P>
__device__ __forceinline__ void wait_fragments(const Context& c, const uint64_t* vector, int split, int first,
                                               uint32_t tag, Phase phase, uint2 (&f)[P::kHeld]) {
  if (!P::real(warp_index())) {
#pragma unroll
    for (int j = 0; j < P::kHeld; ++j) f[j] = make_uint2(0, 0);
    return;
  }
  TwoPackets v[1][P::kHeld];
  const int chunk = split * P::kRealChunks + warp_index() * P::kChunks + first;
  wait_pairs(vector + (chunk * 32 + c.polled_lane()) * 2, 0, tag, v, c.dog, phase);
#pragma unroll
  for (int j = 0; j < P::kHeld; ++j) f[j] = make_uint2(v[0][j].first(), v[0][j].second());
}

// One layer. The residual comes without the deltas of the down projection before it (published
// under tag - 1; layer 0 has none), and leaves without this layer's. Where queries, keys and values are known
// already, there is no QKV exchange; where lone() holds there is nothing but that one, for the exchange kLoneFor later.
template <class D, class Lone, class Attend>
__device__ __forceinline__ void decoder_layer(Context& c, Residual<D>& r, bool qkv_known, Lone&& lone, Attend&& attend) {
  using P = Products<D>;
  using L = PacketLayout;
  const FrameParams& p = c.p;

  // QKV
  if (!qkv_known) {
    gemv<typename P::Qkv, 0>(
        c,
        [&](int, int, uint2(&f)[P::Qkv::kHeld]) {
          if (c.layer() > 0) r.template add_deltas<P::Down::kSplit>(c, p.packets + L::kDeltaDown, c.tag - 1);
          normed_fragments<D>(c, r, 0, f);
        },
        [&](int strip, int, const Cell& cell, float2 rows, uint64_t* packets, float squares) {
          const float scale = rms_scale<D>(squares);
          if (!c.finishes(cell)) return;
          publish_at(c, packets + (lone() ? L::kLoneQkv : L::kQkv) + strip * kStripPackets + cell.packet,
                     rows.x * scale, rows.y * scale, strip * 16 + 2 * cell.pair, cell.column, lone() ? kLoneFor : 0);
        });
    c.advance();
  }
  if (lone()) {
    c.next_layer();
    sync_compute();  // what follows is a QKV again, with the same sum of squares
    return;
  }
  attend();  // reads tag - 1, publishes tag
  c.advance();

  // O: reads tag - 1
  gemv<typename P::Out>(
      c,
      [&](int split, int first, uint2(&f)[P::Out::kHeld]) {
        wait_fragments<typename P::Out>(c, p.packets + L::kHeadsOut, split, first, c.tag - 1, Phase::kOut, f);
      },
      [&](int strip, int split, const Cell& cell, float2 rows, uint64_t* packets, float) {
        if (!c.finishes(cell)) return;
        publish_at(c, packets + L::kDeltaO + split * vector_packets(L::kHidden) + strip * kStripPackets + cell.packet,
                   rows.x, rows.y, split * D::kHidden + strip * 16 + 2 * cell.pair, cell.column);
      });
  c.advance();

  // gate-up
  gemv<typename P::GateUp, 1>(
      c,
      [&](int, int, uint2(&f)[P::GateUp::kHeld]) {
        r.template add_deltas<P::Out::kSplit>(c, p.packets + L::kDeltaO, c.tag - 1);
        normed_fragments<D>(c, r, 1, f);
      },
      [&](int strip, int, const Cell& cell, float2 rows, uint64_t* packets, float squares) {
        // Rows 0..7 of a strip are gates, 8..15 the ups of the same eight: two strips make one of the vector.
        const float up_low = __shfl_down_sync(~0u, rows.x, 16), up_high = __shfl_down_sync(~0u, rows.y, 16);
        const float scale = rms_scale<D>(squares);
        if (cell.pair >= 4 || !c.finishes(cell)) return;
        const float low = rows.x * scale, high = rows.y * scale;
        publish_at(c, packets + L::kMlpInner + strip / 2 * kStripPackets + strip % 2 + cell.packet,
                   silu(low) * (up_low * scale), silu(high) * (up_high * scale), strip * 8 + 2 * cell.pair,
                   cell.column);
      });
  c.advance();

  // down: reads tag - 1
  gemv<typename P::Down>(
      c,
      [&](int split, int first, uint2(&f)[P::Down::kHeld]) {
        wait_fragments<typename P::Down>(c, p.packets + L::kMlpInner, split, first, c.tag - 1, Phase::kMlp, f);
      },
      [&](int strip, int split, const Cell& cell, float2 rows, uint64_t* packets, float) {
        if (!c.finishes(cell)) return;
        publish_at(c, packets + L::kDeltaDown + split * vector_packets(L::kHidden) + strip * kStripPackets + cell.packet,
                   rows.x, rows.y, split * D::kHidden + strip * 16 + 2 * cell.pair, cell.column);
      });
  c.advance();
  c.next_layer();
}

}  // namespace qwen_tts
