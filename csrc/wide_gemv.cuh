// Products of a wide frame: the weights of gemv.cuh for up to four tiles of eight columns. A CTA reads each weight once, and
// only tiles in use are paid for. All tiles' results of an item meet in shared memory at one barrier, and then each warp
// finishes a quarter of a tile.
//
// Sums are those of gemv.cuh, in the same order: each warp takes the same part of k, in the same two chains, and the
// warps' parts are added in the order of the warps.
#pragma once

#include "head_exchange.cuh"
#include "residual.cuh"

namespace qwen_tts {

#ifndef QWEN_TTS_ASKED
#define QWEN_TTS_ASKED kMaxColumnTiles
#endif
using WideContext = ContextOf<WideForm>;

constexpr int kMaxColumnTiles = kMaxColumns / kTileColumns;
constexpr int kItemsAtOnce = WideForm::Scratch::kTiles / kMaxColumnTiles;  // whose sums meet at one barrier

__device__ __forceinline__ int column_tiles(const FrameParams& p) {
  return (p.num_columns + kTileColumns - 1) / kTileColumns;
}

// The published vector that is a product's operand, as one warp reads it: tile by tile, part by part of k.
template <class Prod, int kPlaces>
struct DenseOperand {
  static constexpr bool kInPairs = Prod::kHeld % 2 == 0 && Prod::kRealChunks % 2 == 0;
  const WideContext& c;
  int vector;
  uint32_t tag;  // of four bits
  Phase phase;
  uint64_t words[kPlaces][Prod::kHeld];

  static __device__ __forceinline__ int chunk(int part, int first) {
    return part * Prod::kRealChunks + warp_index() * Prod::kChunks + first;
  }
  // The lane whose words this one takes: its own, or one of the tile's first column where its column is not in use.
  __device__ __forceinline__ int polled_lane(int tile) const {
    return c.uses(tile * kTileColumns + c.column()) ? lane_index() : lane_index() & 3;
  }
  // Ask for the words of this warp's chunks of a part of k, from `first` on; they come to a place of `words`.
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
  // Wait until they have come, and decode them.
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

// The row of a finished strip that one lane sums, of one column; pairs stand as in a narrow frame's Cell. A quarter of a
// strip is a warp's.
struct WideCell {
  int column, pair;
  bool leads;  // whether this lane has the even row of its pair

  __device__ __forceinline__ int row() const { return 2 * pair + (leads ? 0 : 1); }
};
__device__ __forceinline__ WideCell wide_cell(int quarter) {
  const int lane = lane_index();
  return {lane & (kTileColumns - 1), quarter + 4 * (lane >> 4), (lane & kTileColumns) == 0};
}

// The sum of all warps' parts of a lane's row, from a tile of partial sums. No two lanes read the same bank.
__device__ __forceinline__ float sum_row(const WideContext& c, int tile, const WideCell& cell) {
  const int row = cell.row();
  const int at = ((row & 7) * 4 + (cell.column >> 1)) * 4 + (row >= 8 ? 2 : 0) + (cell.column & 1);
  const uint32_t from = smem_address(&c.scratch.partial[tile][0][0]) + 4 * at;
  float part[kWarps], sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) part[w] = load_shared_float(from + 4 * w * kTileFloats);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += part[w];
  return sum;
}

template <class Prod>
__device__ __forceinline__ void multiply_tile(WideContext& c, int to, const uint4 (&a)[Prod::kHeld],
                                              const uint2 (&f)[Prod::kHeld]) {
  float acc[2][4] = {};
  multiply(acc, a, f);
  store_tile(c, to, acc);
}

// How a product whose k is not cut is run. Where registers hold the operand of all tiles, it is read once; else once an item.
template <class Prod>
struct WideRun {
  static_assert(Prod::kSplit == 1 && Prod::kHeld == Prod::kChunks, "an item's weights are held at once");
  static constexpr bool kHoldsOperand = Prod::kHeld <= 4;
  static constexpr int kAsked = kHoldsOperand ? QWEN_TTS_ASKED : 2;  // tiles of the operand that are under way
  // Items whose sums meet at one barrier: as many as a CTA has on 128 SMs, or as fit.
  static constexpr int kGroup = min_of(kItemsAtOnce, Prod::kStrips <= 256 ? 2 : 3);
  using Operand = DenseOperand<Prod, kAsked>;
};

// All strips of a product whose k is not cut: those of this CTA are block_index() and every grid-th from there on.
//   prepare(tile, cell): what a lane can know of its rows before they are there
//   finish(prepared, strip, row, scale): takes a lane's finished row, whole warps together. scale is 1 / rms of the
//     column, where kNorm names a norm.
template <class D, class Prod, int kNorm, class Prepare, class Finish>
__device__ __forceinline__ void wide_gemv(WideContext& c, typename WideRun<Prod>::Operand& x, Prepare&& prepare,
                                          Finish&& finish) {
  using Run = WideRun<Prod>;
  constexpr int kGroup = Run::kGroup, kAsked = Run::kAsked;
  if (block_index() >= Prod::kStrips) return;
  const int tiles = column_tiles(c.p);
  uint2 held[Run::kHoldsOperand ? kMaxColumnTiles : 1][Prod::kHeld];
  uint4 a[Run::kHoldsOperand ? 2 : 1][Prod::kHeld];
  int strip = block_index();
  auto ask_first = [&] {
#pragma unroll
    for (int tile = 0; tile < kAsked; ++tile)
      if (tile < tiles) x.ask(tile, tile, 0, 0);
  };
  // Calls f(tile, fragments) for all tiles, the first of which have been asked for.
  auto for_tiles = [&](auto&& f) {
#pragma unroll
    for (int tile = 0; tile < kMaxColumnTiles; ++tile) {
      if (tile >= tiles) break;
      uint2 fragments[Prod::kHeld];
      x.get(tile % kAsked, tile, 0, 0, fragments);
      if (tile + kAsked < kMaxColumnTiles && tile + kAsked < tiles) x.ask(tile % kAsked, tile + kAsked, 0, 0);
      if (kNorm >= 0 && strip == block_index())
        store_squares(c.scratch, max(kNorm, 0), tile * kTileColumns, fragments);
      f(tile, fragments);
    }
  };
  ask_first();
  load_weights<Prod>(c.ring, a[0]);
  if constexpr (Run::kHoldsOperand)
    for_tiles([&](int tile, const uint2(&f)[Prod::kHeld]) {
#pragma unroll
      for (int j = 0; j < Prod::kHeld; ++j) held[tile][j] = f[j];
    });
  // A warp finishes a quarter of an item's tile: of one tile, of all items or of every second one.
  const int own = warp_index() >> 2, tile = tiles > 2 ? own : own & 1;
  const int first_item = tiles > 2 ? 0 : own >> 1, next_item = tiles > 2 ? 1 : 2;
  const bool finishes = tile < tiles;
  const WideCell cell = wide_cell(warp_index() & 3);
#pragma unroll 1
  while (true) {
    const int first = strip;
    int n = 0;
    sync_compute();  // the tiles of partial sums are free
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (strip >= Prod::kStrips) break;
      const uint4(&weights)[Prod::kHeld] = a[Run::kHoldsOperand ? i % 2 : 0];
      strip += gridDim.x;
      ++n;
      if constexpr (Run::kHoldsOperand) {
        // The last of a group leaves the next group's first, which begins at a[0].
        if (strip < Prod::kStrips && i + 1 < kGroup) load_weights<Prod>(c.ring, a[(i + 1) % 2]);
#pragma unroll
        for (int t = 0; t < kMaxColumnTiles; ++t)
          if (t < tiles) multiply_tile<Prod>(c, i * kMaxColumnTiles + t, weights, held[t]);
      } else {
        for_tiles([&](int t, const uint2(&f)[Prod::kHeld]) {
          multiply_tile<Prod>(c, i * kMaxColumnTiles + t, weights, f);
        });
        if (strip < Prod::kStrips) {
          ask_first();
          load_weights<Prod>(c.ring, a[0]);
        }
      }
    }
    if (Run::kHoldsOperand && strip < Prod::kStrips) load_weights<Prod>(c.ring, a[0]);
    const auto prepared = prepare(tile, cell);
    sync_compute();
    if (finishes) {
      float scale = 1.f, rows[kGroup];
      if constexpr (kNorm >= 0) scale = rms_scale<D>(squares_part(c.scratch, kNorm, tile * kTileColumns));
      // Also of items that are not there: sums side by side, and no branch between them.
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        rows[j] = sum_row(c, min(first_item + j * next_item, kGroup - 1) * kMaxColumnTiles + tile, cell);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int item = first_item + j * next_item;
        if (item < n) finish(prepared, first + item * int(gridDim.x), rows[j], scale);
      }
    }
    if (strip >= Prod::kStrips) return;
  }
}

// Strips of a product that adds to the residual, this CTA's jobs of them (WideJobs).
//   before(strip, tile, cell): asks for the residual to which a lane's row is added
//   prepare(tile, cell), finish(prepared, strip, cell, parts, residual): as those of wide_gemv, for all parts of k
template <class Prod, class Before, class Prepare, class Finish>
__device__ __forceinline__ void wide_add(WideContext& c, int input, uint32_t tag, Phase phase, Before&& before,
                                         Prepare&& prepare, Finish&& finish) {
  constexpr int kParts = Prod::kSplit;
  constexpr bool kHoldsAll = Prod::kHeld == Prod::kChunks;
  static_assert(kHoldsAll || kParts == 1, "weights of a part of k are held at once, or k is not cut");
  static_assert(kParts <= 2 && WideForm::Scratch::kTiles >= kMaxColumnTiles, "a job's sums meet at one barrier");
  const WideJobs<Prod> jobs(c.p);
#pragma unroll 1
  for (int job = block_index(); job < jobs.count; job += gridDim.x) {
    const int strip = jobs.strip(job), from = jobs.first_tile(job), tiles = jobs.tiles_of(from);
    // A warp finishes a quarter of a tile.
    const int own = warp_index() >> 2;
    const WideCell cell = wide_cell(warp_index() & 3);
    uint4 a[Prod::kHeld];
    load_weights<Prod>(c.ring, a);
    float residual = 0.f;
    if constexpr (kParts == 2) {
      // Both parts of both tiles are asked for at once.
      DenseOperand<Prod, 4> x{c, input, tag, phase};
#pragma unroll
      for (int step = 0; step < 4; ++step)
        if ((step & 1) < tiles) x.ask(step, from + (step & 1), step >> 1, 0);
      if (own < tiles) residual = before(strip, from + own, cell);
      sync_compute();  // the tiles of partial sums are free
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if ((step & 1) < tiles) {
          uint2 f[Prod::kHeld];
          x.get(step, from + (step & 1), step >> 1, 0, f);
          multiply_tile<Prod>(c, step, a, f);
        }
        if (step == 1) load_weights<Prod>(c.ring, a);
      }
    } else {
      constexpr int kAsked = 2;
      DenseOperand<Prod, kAsked> x{c, input, tag, phase};
      if (own < tiles) residual = before(strip, from + own, cell);
      float acc[kMaxColumnTiles][2][4] = {};
#pragma unroll 1
      for (int first = 0;;) {
#pragma unroll
        for (int tile = 0; tile < kAsked; ++tile)
          if (tile < tiles) x.ask(tile, tile, 0, first);
#pragma unroll
        for (int tile = 0; tile < kMaxColumnTiles; ++tile) {
          if (tile >= tiles) break;
          uint2 f[Prod::kHeld];
          x.get(tile % kAsked, tile, 0, first, f);
          if (tile + kAsked < tiles) x.ask(tile % kAsked, tile + kAsked, 0, first);
          multiply(acc[tile], a, f);
        }
        first += Prod::kHeld;
        if (first >= Prod::kChunks) break;
        load_weights<Prod>(c.ring, a);
      }
      sync_compute();  // the tiles of partial sums are free
#pragma unroll
      for (int tile = 0; tile < kMaxColumnTiles; ++tile)
        if (tile < tiles) store_tile(c, tile, acc[tile]);
    }
    const auto prepared = prepare(from + own, cell);
    sync_compute();
    if (own < tiles) {
      float parts[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) parts[part] = sum_row(c, 2 * part + own, cell);
      finish(prepared, strip, cell, parts, residual);
    }
  }
}

}  // namespace qwen_tts
