// Products of a wide frame: the weights of gemv.cuh for up to four tiles of eight columns. A CTA's weights stay in registers
// while the tiles pass one by one, so that a weight is read once and only tiles in use are paid for. The next tile's
// operand is asked for before this one's warps meet.
//
// Sums are those of gemv.cuh, in the same order: each warp takes the same part of k, in the same two chains, and the
// warps' parts are added in the order of the warps.
#pragma once

#include "head_exchange.cuh"
#include "residual.cuh"

namespace qwen_tts {

#ifndef QWEN_TTS_WIDE_GROUP
#define QWEN_TTS_WIDE_GROUP 3
#endif

using WideContext = ContextOf<WideForm>;

constexpr int kMaxColumnTiles = kMaxColumns / kTileColumns;
constexpr int kSetTiles = WideForm::Scratch::kTiles / 2;  // two sets of tiles of partial sums, used in turns

__device__ __forceinline__ int column_tiles(const FrameParams& p) {
  return (p.num_columns + kTileColumns - 1) / kTileColumns;
}

// The published vector that is a product's operand, as one warp reads it: tile by tile, part by part of k.
template <class Prod>
struct DenseOperand {
  static constexpr bool kInPairs = Prod::kHeld % 2 == 0 && Prod::kRealChunks % 2 == 0;
  const WideContext& c;
  int vector;
  uint32_t tag;  // of four bits
  Phase phase;
  uint64_t words[Prod::kHeld];

  static __device__ __forceinline__ int chunk(int part, int first) {
    return part * Prod::kRealChunks + warp_index() * Prod::kChunks + first;
  }
  // The lane whose words this one takes: its own, or one of the tile's first column where its column is not in use.
  __device__ __forceinline__ int polled_lane(int tile) const {
    return c.uses(tile * kTileColumns + c.column()) ? lane_index() : lane_index() & 3;
  }
  // Ask for the words of this warp's chunks of a part of k, from `first` on.
  __device__ __forceinline__ void ask(int tile, int part, int first) {
    if (!Prod::real(warp_index())) return;
    const uint64_t* from = dense_vector(c.p, tile, vector);
    const int lane = polled_lane(tile), at = chunk(part, first);
    if constexpr (kInPairs) {
#pragma unroll
      for (int j = 0; j < Prod::kHeld; j += 2) load_two_words(from + dense_at(at + j, lane), words[j], words[j + 1]);
    } else {
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) words[j] = load_word(from + dense_at(at + j, lane));
    }
  }
  // Wait until they have come, and decode them.
  __device__ __forceinline__ void get(int tile, int part, int first, uint2 (&f)[Prod::kHeld]) {
    if (!Prod::real(warp_index())) {
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) f[j] = make_uint2(0, 0);
      return;
    }
    const uint2 bits = dense_tag(tag);
    for (unsigned spin = 0;; ++spin) {
      uint32_t lack = 0;
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) lack |= dense_lacks(words[j], bits);
      if (__all_sync(~0u, lack == 0)) break;
      c.dog.after(spin, phase, c.tag - 1);
      ask(tile, part, first);
    }
#pragma unroll
    for (int j = 0; j < Prod::kHeld; ++j)
      f[j] = make_uint2(dense_decode(uint32_t(words[j])), dense_decode(high_half(words[j])));
  }
};

// The two rows of a finished tile that one thread holds, of one column: 2 * pair and 2 * pair + 1 of the strip. Two warps
// finish a tile.
struct WideCell {
  int column, pair;
};

// `warp` counts the warps that finish; base: the tile's sums.
__device__ __forceinline__ WideCell wide_cell(int warp) {
  const int lane = lane_index();
  return {lane & (kTileColumns - 1), (lane >> 3 & 1) | (warp & 1) << 1 | (lane >> 4 & 1) << 2};
}

// Where the first warp's sum of a row and column stands in a tile of partial sums, in floats.
__device__ __forceinline__ int sum_at(int row, int column) {
  return ((row & 7) * 4 + (column >> 1)) * 4 + (row >= 8 ? 2 : 0) + (column & 1);
}

__device__ __forceinline__ float sum_warps(uint32_t from) {
  float sum = 0.f;
#pragma unroll
  for (int first = 0; first < kWarps; first += 4) {
    float part[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) part[w] = load_shared_float(from + 4 * (first + w) * kTileFloats);
#pragma unroll
    for (int w = 0; w < 4; ++w) sum += part[w];
  }
  return sum;
}

__device__ __forceinline__ float2 sum_pair(uint32_t tile, const WideCell& cell) {
  // Neighbouring groups of lanes read the rows in turns, so that no two read the same bank.
  const int swap = lane_index() >> 3 & 1;
  const float first = sum_warps(tile + 4 * sum_at(2 * cell.pair + swap, cell.column));
  const float second = sum_warps(tile + 4 * sum_at(2 * cell.pair + 1 - swap, cell.column));
  return swap ? make_float2(second, first) : make_float2(first, second);
}

// The partial sums that a set's tile has, as an address in shared memory.
__device__ __forceinline__ uint32_t tile_address(const WideContext& c, int tile) {
  return smem_address(&c.scratch.partial[tile][0][0]);
}

// Weights of an item; the next one's place in the ring is worked out only then, for registers' sake.
template <class Prod>
__device__ __forceinline__ void load_ahead(WideContext& c, uint4 (&a)[Prod::kHeld]) {
  load_weights<Prod>(c.ring, a);
  opaque(c.ring.next.slot);
  opaque(c.ring.next.round);
}

// All strips of a product whose k is not cut: those of this CTA are block_index() and every grid-th from there on.
//   x: a DenseOperand, or what has its ask and get
//   finish(strip, tile, cell, rows, scale): takes two finished rows, whole warps together. scale is 1 / rms of the column,
//     where kNorm names a norm.
template <class D, class Prod, int kNorm, class Operand, class Finish>
__device__ __forceinline__ void wide_gemv(WideContext& c, Operand&& x, Finish&& finish) {
  static_assert(Prod::kSplit == 1 && Prod::kHeld == Prod::kChunks, "an item's weights are held at once");
  constexpr int kGroup = min_of(kSetTiles, Prod::kHeld <= 4 ? QWEN_TTS_WIDE_GROUP : Prod::kHeld <= 6 ? 2 : 1);
  constexpr int kFinishers = 2 * kGroup;  // warps
  const int tiles = column_tiles(c.p);
#pragma unroll 1
  for (int strip = block_index(); strip < Prod::kStrips; strip += kGroup * gridDim.x) {
    const int n = min(kGroup, (Prod::kStrips - strip + int(gridDim.x) - 1) / int(gridDim.x));
    uint4 a[kGroup][Prod::kHeld];
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < n) load_ahead<Prod>(c, a[i]);
    x.ask(0, 0, 0);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      uint2 f[Prod::kHeld];
      x.get(tile, 0, 0, f);
      if (tile + 1 < tiles) x.ask(tile + 1, 0, 0);
      if constexpr (kNorm >= 0) store_squares(c.scratch, kNorm, tile * kTileColumns, f);
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        if (i < n) {
          float acc[2][4] = {};
          multiply(acc, a[i], f);
          store_tile(c, c.set + i, acc);
        }
      sync_compute();
      // Each tile's rows are finished by other warps, which meanwhile are late for the next.
      const int warp = (warp_index() - tile * kFinishers) & (kWarps - 1), entry = warp >> 1;
      if (entry < n) {
        const WideCell cell = wide_cell(warp);
        float scale = 1.f;
        if constexpr (kNorm >= 0) scale = rms_scale<D>(squares_part(c.scratch, kNorm, tile * kTileColumns));
        const float2 rows = sum_pair(tile_address(c, c.set + entry), cell);
        finish(strip + entry * int(gridDim.x), tile, cell, rows, scale);
      }
      c.set = kSetTiles - c.set;
    }
  }
}

// Strips of a product that adds to the residual: this CTA's are `first_strip` and every grid-th from there on, with all
// parts of k.
//   before(strip, tile, row, column): asks for the residual to which a lane's row is added, as a packet
//   finish(strip, tile, row, column, leads, parts, packet): takes a row's parts of k, and that packet; whole warps together
template <class Prod, class Operand, class Before, class Finish>
__device__ __forceinline__ void wide_add(WideContext& c, int first_strip, Operand&& x, Before&& before,
                                         Finish&& finish) {
  constexpr int kParts = Prod::kSplit;
  constexpr bool kHoldsAll = Prod::kHeld == Prod::kChunks;
  static_assert(kParts <= kSetTiles && (kHoldsAll || kParts == 1), "all parts of k meet in a set of tiles");
  static_assert(kHoldsAll || kMaxColumnTiles <= 2 * kSetTiles, "a tile of sums for each tile of columns");
  const int tiles = column_tiles(c.p);
  // Four warps finish a tile of columns; each lane sums one row (Cell).
  auto finishes = [&](int tile) { return (warp_index() >> 2) == (tile & 3); };
  const int lane = lane_index(), column = lane & (kTileColumns - 1);
  const bool leads = (lane & kTileColumns) == 0;
  auto row = [&] { return 2 * ((warp_index() & 3) + 4 * (lane >> 4)) + (leads ? 0 : 1); };
  auto finish_tile = [&](int strip, int tile, int sums, uint64_t packet) {
    float parts[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      parts[part] = sum_warps(tile_address(c, sums + part) + 4 * sum_at(row(), column));
    finish(strip, tile, row(), column, leads, parts, packet);
  };
#pragma unroll 1
  for (int strip = first_strip; strip < Prod::kStrips; strip += gridDim.x) {
    if constexpr (kHoldsAll) {
      uint4 a[kParts][Prod::kHeld];
#pragma unroll
      for (int part = 0; part < kParts; ++part) load_ahead<Prod>(c, a[part]);
      x.ask(0, 0, 0);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        uint64_t packet = 0;
        if (finishes(tile)) packet = before(strip, tile, row(), column);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          uint2 f[Prod::kHeld];
          x.get(tile, part, 0, f);
          if (part + 1 < kParts) {
            x.ask(tile, part + 1, 0);
          } else if (tile + 1 < tiles) {
            x.ask(tile + 1, 0, 0);
          }
          float acc[2][4] = {};
          multiply(acc, a[part], f);
          store_tile(c, c.set + part, acc);
        }
        sync_compute();
        if (finishes(tile)) finish_tile(strip, tile, c.set, packet);
        c.set = kSetTiles - c.set;
      }
    } else {
      float acc[kMaxColumnTiles][2][4] = {};
#pragma unroll 1
      for (int first = 0; first < Prod::kChunks; first += Prod::kHeld) {
        uint4 a[Prod::kHeld];
        load_weights<Prod>(c.ring, a);
        x.ask(0, 0, first);
#pragma unroll
        for (int tile = 0; tile < kMaxColumnTiles; ++tile)
          if (tile < tiles) {
            uint2 f[Prod::kHeld];
            x.get(tile, 0, first, f);
            if (tile + 1 < tiles) x.ask(tile + 1, 0, first);
            multiply(acc[tile], a, f);
          }
      }
      sync_compute();  // the product before has been finished, from whichever set
#pragma unroll
      for (int tile = 0; tile < kMaxColumnTiles; ++tile)
        if (tile < tiles) store_tile(c, tile, acc[tile]);
      uint64_t packet = 0;
      const int own = warp_index() >> 2;
      if (own < tiles) packet = before(strip, own, row(), column);
      sync_compute();
      if (own < tiles) finish_tile(strip, own, own, packet);
      sync_compute();  // the sums have been read
    }
  }
}

}  // namespace qwen_tts
