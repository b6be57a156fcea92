// Products of a wide frame: the same weights as in gemv.cuh, for up to four tiles of eight columns. A CTA reads each
// weight once and computes only the tiles in use. One barrier covers the partial sums of all tiles of an item. After it
// four warps finish the item, a tile each. The others go on with the next item.
//
// The order of all sums is that of gemv.cuh: each warp takes the same part of k in the same two chains, and the warps'
// parts are added in the order of the warps.
#pragma once

#include "head_exchange.cuh"
#include "residual.cuh"

namespace qwen_tts {

using WideContext = ContextOf<WideForm>;

constexpr int kMaxColumnTiles = kMaxColumns / kTileColumns;
constexpr int kSets = WideForm::Scratch::kTiles / kMaxColumnTiles;  // of tiles of partial sums, used in turns
constexpr int kAsked = 2;                                           // tiles of an operand that are being loaded
static_assert(kMaxColumnTiles * 4 <= kWarps, "a warp finishes a quarter of a tile");

__device__ __forceinline__ int column_tiles(const FrameParams& p) {
  return (p.num_columns + kTileColumns - 1) / kTileColumns;
}

// The operand of a product: a published vector, which a warp reads tile by tile and, in each tile, part by part of k.
template <class Prod>
struct DenseOperand {
  static constexpr bool kInPairs = Prod::kHeld % 2 == 0 && Prod::kRealChunks % 2 == 0;
  const WideContext& c;
  int vector;
  uint32_t tag;  // of four bits
  Phase phase;
  uint64_t words[kAsked][Prod::kHeld];

  static __device__ __forceinline__ int chunk(int part, int first) {
    return part * Prod::kRealChunks + warp_index() * Prod::kChunks + first;
  }
  // The lane whose words this lane polls: its own or, if its column is not in use, one of the tile's first column.
  __device__ __forceinline__ int polled_lane(int tile) const {
    return c.uses(tile * kTileColumns + c.column()) ? lane_index() : lane_index() & 3;
  }
  // Starts the loads of this warp's chunks of a part of k, from chunk `first` on. They go to words[place].
  __device__ __forceinline__ void ask(int place, int tile, int part, int first) {
    if (!Prod::real(warp_index())) return;
    const uint64_t* from = dense_vector(c.p, tile, vector);
    const int lane = polled_lane(tile), at = chunk(part, first);
    if constexpr (kInPairs) {
#pragma unroll
      for (int j = 0; j < Prod::kHeld; j += 2)
        load_two_words(from + dense_at(at + j, lane), words[place][j], words[place][j + 1]);
    } else {
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) words[place][j] = load_word(from + dense_at(at + j, lane));
    }
  }
  // Waits until the words at `place` carry the tag, and decodes them.
  __device__ __forceinline__ void get(int place, int tile, int part, int first, uint2 (&f)[Prod::kHeld]) {
    if (!Prod::real(warp_index())) {
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) f[j] = make_uint2(0, 0);
      return;
    }
    const uint2 bits = dense_tag(tag);
    for (unsigned spin = 0;; ++spin) {
      uint32_t lack = 0;
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) lack |= dense_differs(words[place][j], bits);
      if (__all_sync(~0u, (lack & kTagMask) == 0)) break;
      c.dog.after(spin, phase, c.tag - 1);
      ask(place, tile, part, first);
    }
#pragma unroll
    for (int j = 0; j < Prod::kHeld; ++j)
      f[j] = make_uint2(dense_decode(uint32_t(words[place][j])), dense_decode(high_half(words[place][j])));
  }
};

// The row of a fed strip that a lane has, for one column. A warp has a quarter of a strip: lanes 0..7 the even row of a
// pair for each column, lanes 8..15 its odd row, and lanes 16..31 those of the pair that is eight rows further.
struct WideCell {
  int column, pair;
  bool leads;  // whether this lane has the even row of its pair

  __device__ __forceinline__ int row() const { return 2 * pair + (leads ? 0 : 1); }
};
__device__ __forceinline__ WideCell wide_cell(int quarter) {
  const int lane = lane_index();
  return {lane & (kTileColumns - 1), quarter + 4 * (lane >> 4), (lane & kTileColumns) == 0};
}

// Sums a tile of partial sums.
__device__ __forceinline__ float4 sum_quad(const WideContext& c, int tile) {
  return sum_quad(quad_address(c.scratch.partial[tile]));
}

// Starts the loads of the first tiles of a part of k.
template <class Operand>
__device__ __forceinline__ void ask_first(Operand& x, int tiles, int part, int first = 0) {
#pragma unroll
  for (int tile = 0; tile < kAsked; ++tile)
    if (tile < tiles) x.ask(tile, tile, part, first);
}

// Calls f(tile, fragments) for each tile of a part of k. ask_first has started the loads of the first tiles. kUnroll is
// the factor by which the loop is unrolled, a multiple of kAsked. It is kMaxColumnTiles if f needs the tile as a
// constant.
template <class Prod, int kUnroll, class Operand, class F>
__device__ __forceinline__ void for_tiles(Operand& x, int tiles, int part, int first, F&& f) {
#pragma unroll 1
  for (int from = 0; from < tiles; from += kUnroll)
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int tile = kUnroll == kMaxColumnTiles ? i : from + i;
      if (tile >= tiles) break;
      uint2 fragments[Prod::kHeld];
      x.get(i % kAsked, tile, part, first, fragments);
      if (tile + kAsked < tiles) x.ask(i % kAsked, tile + kAsked, part, first);
      f(tile, fragments);
    }
}

template <class Prod>
__device__ __forceinline__ void multiply_tile(WideContext& c, int set, int tile, const uint4 (&a)[Prod::kHeld],
                                              const uint2 (&f)[Prod::kHeld]) {
  float acc[2][4] = {};
  multiply(acc, a, f);
  store_tile(c, set * kMaxColumnTiles + tile, acc);
}

// A row of the residual, in the packet by which one owner of a strip hands it to the other.
struct Handed {
  uint64_t packet;

  __device__ __forceinline__ float value() const { return __uint_as_float(uint32_t(packet)); }
};

// A warp feeds a quarter of a strip, for one tile of columns.
__device__ __forceinline__ int finished_tile() { return warp_index() >> 2; }
__device__ __forceinline__ WideCell finished_cell() { return wide_cell(warp_index() & 3); }

// Computes this CTA's strips of a product whose k is not cut: strip block_index() and each gridDim.x-th after it.
//   x: a DenseOperand
//   finish(strip, tile, quad, scale): takes a lane's values (sum_quad). Whole warps call it together. `scale` is
//     1 / rms of its two columns if kNorm names a norm, otherwise 1.
// If registers can hold the operand of all tiles, it is read once. Otherwise it is read once for each item.
template <class D, class Prod, int kNorm, class Operand, class Finish>
__device__ __forceinline__ void wide_gemv(WideContext& c, Operand&& x, Finish&& finish) {
  static_assert(Prod::kSplit == 1 && Prod::kHeld == Prod::kChunks, "an item's weights are held at once");
  constexpr bool kHoldsOperand = Prod::kHeld <= 4;
  if (block_index() >= Prod::kStrips) return;
  const int tiles = column_tiles(c.p);
  uint2 held[kHoldsOperand ? kMaxColumnTiles : 1][Prod::kHeld];
  uint4 a[Prod::kHeld];
  int strip = block_index(), set = 0, turn = 0;
  load_weights<Prod>(c.ring, a);
  auto take = [&](int tile, const uint2(&f)[Prod::kHeld]) {
    if (kNorm >= 0 && strip == block_index()) store_squares(c.scratch, max(kNorm, 0), tile * kTileColumns, f);
  };
  ask_first(x, tiles, 0);
  if constexpr (kHoldsOperand)
    for_tiles<Prod, kMaxColumnTiles>(x, tiles, 0, 0, [&](int tile, const uint2(&f)[Prod::kHeld]) {
      take(tile, f);
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) held[tile][j] = f[j];
    });
  sync_compute();  // the tiles of partial sums are free
#pragma unroll 1
  while (true) {
    if constexpr (kHoldsOperand) {
#pragma unroll
      for (int tile = 0; tile < kMaxColumnTiles; ++tile)
        if (tile < tiles) multiply_tile<Prod>(c, set, tile, a, held[tile]);
    } else {
      for_tiles<Prod, kAsked>(x, tiles, 0, 0, [&](int tile, const uint2(&f)[Prod::kHeld]) {
        take(tile, f);
        multiply_tile<Prod>(c, set, tile, a, f);
      });
    }
    const int next = strip + gridDim.x;
    if (next < Prod::kStrips) load_weights<Prod>(c.ring, a);
    if (!kHoldsOperand && next < Prod::kStrips) ask_first(x, tiles, 0);
    sync_compute();
    // Four warps, one on each scheduler, finish an item, a tile each. The next four finish the next item.
    const int tile = warp_index() & 3;
    if (warp_index() >> 2 == turn && tile < tiles) {
      float2 scale = make_float2(1.f, 1.f);
      if constexpr (kNorm >= 0) scale = quad_scale<D>(squares_part(c.scratch, kNorm, tile * kTileColumns));
      finish(strip, tile, sum_quad(c, set * kMaxColumnTiles + tile), scale);
    }
    turn = (turn + 1) & (kWarps / 4 - 1);
    strip = next;
    if (strip >= Prod::kStrips) return;
    if constexpr (kSets == 1) sync_compute();  // the sums have been read
    set = kSets - 1 - set;
  }
}

// Computes this CTA's strips of a product that adds to the residual: strip `first_strip` and each gridDim.x-th after
// it, with all parts of k. The first warps finish a tile each.
//   ask(strip, tile): starts the load of the residual to which a lane's values are added
//   add(strip, tile, part, quad): adds one part of k of a lane's values (sum_quad). Whole warps call it together.
//   finish(strip, tile): takes the sum.
template <class Prod, class Operand, class Ask, class Add, class Finish>
__device__ __forceinline__ void wide_add(WideContext& c, int first_strip, Operand&& x, Ask&& ask, Add&& add,
                                         Finish&& finish) {
  constexpr int kParts = Prod::kSplit;
  constexpr bool kHoldsAll = Prod::kHeld == Prod::kChunks;
  static_assert(kHoldsAll || kParts == 1, "weights of a part of k are held at once, or k is not cut");
  const int tiles = column_tiles(c.p);
#pragma unroll 1
  for (int strip = first_strip; strip < Prod::kStrips; strip += gridDim.x) {
    uint4 a[Prod::kHeld];
    load_weights<Prod>(c.ring, a);
    ask_first(x, tiles, 0);
    sync_compute();  // the tiles of partial sums are free
    const int own = warp_index();
    const bool finishes = own < tiles;
    if constexpr (kHoldsAll) {
#pragma unroll 1
      for (int part = 0; part < kParts; ++part) {
        const int set = part & (kSets - 1);
        for_tiles<Prod, kAsked>(x, tiles, part, 0, [&](int tile, const uint2(&f)[Prod::kHeld]) {
          multiply_tile<Prod>(c, set, tile, a, f);
        });
        const bool last = part + 1 == kParts;
        if (!last) {
          ask_first(x, tiles, part + 1);
          load_weights<Prod>(c.ring, a);
        }
        if constexpr (kSets == 1) {  // all parts use the same tiles of partial sums
          if (finishes && part == 0) ask(strip, own);
          sync_compute();
          if (finishes) add(strip, own, part, sum_quad(c, own));
          if (!last) sync_compute();  // the sums have been read
        }
      }
      if constexpr (kSets > 1) {
        static_assert(kParts <= kSets, "one barrier covers the sums of all parts");
        if (finishes) ask(strip, own);
        sync_compute();
        if (finishes)
#pragma unroll
          for (int part = 0; part < kParts; ++part) add(strip, own, part, sum_quad(c, part * kMaxColumnTiles + own));
      }
    } else {
      float acc[kMaxColumnTiles][2][4] = {};
#pragma unroll 1
      for (int first = 0;;) {
        for_tiles<Prod, kMaxColumnTiles>(x, tiles, 0, first,
                                         [&](int tile, const uint2(&f)[Prod::kHeld]) { multiply(acc[tile], a, f); });
        first += Prod::kHeld;
        if (first >= Prod::kChunks) break;
        ask_first(x, tiles, 0, first);
        load_weights<Prod>(c.ring, a);
      }
#pragma unroll
      for (int tile = 0; tile < kMaxColumnTiles; ++tile)
        if (tile < tiles) store_tile(c, tile, acc[tile]);
      if (finishes) ask(strip, own);
      sync_compute();
      if (finishes) add(strip, own, 0, sum_quad(c, own));
    }
    if (finishes) finish(strip, own);
  }
}

}  // namespace qwen_tts
