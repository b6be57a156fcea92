// Products of the frame. Strips of 16 weight rows come from the ring as the A operand of mma. The columns are the n
// dimension of the B operand, in registers. So 1 to 8 streams cost the same.
//
// Each warp takes a sixteenth of k. The warps store their partial sums in shared memory. Then 64 threads finish an
// item: each sums two rows of one column, always in warp order. So the bits depend neither on the grid nor on the
// number of streams.
#pragma once

#include "context.cuh"

namespace qwen_tts {

// The two rows of a finished tile that one thread holds: rows 2 * pair and 2 * pair + 1 of the strip, of one column.
// Four warps finish a tile. In each warp, lanes 0..7 hold a pair p of each column, and lanes 16..23 the pair p + 4.
// Lanes 8..15 and 24..31 sum the odd rows for them and hold nothing.
struct Cell {
  int entry, column, pair;  // entry: which of the product's tiles
  bool leads;               // whether this lane holds rows
  int packet;               // where the pair stands among a strip's packets
  uint32_t sums;            // shared address of this lane's row in the first warp's tile

  // Whether this lane holds rows of a stream.
  __device__ __forceinline__ bool holds(const Context& c) const { return leads && c.uses(column); }
};
static_assert(kTileColumns == 8 && kStripRows == 16, "a cell's lanes are those of an 8-column tile");

// The indices of the epilogue, computed before the barrier. After the barrier every step adds to the latency.
__device__ __forceinline__ Cell epilogue_cell(const float (*partial)[kWarps][kTileFloats]) {
  const int lane = lane_index(), warp = warp_index();
  Cell cell;
  cell.entry = warp >> 2;
  cell.column = lane & (kTileColumns - 1);
  cell.pair = (warp & 3) + 4 * (lane >> 4);
  cell.leads = (lane & kTileColumns) == 0;
  cell.packet = packet_index(0, cell.pair, cell.column);
  // No two of a warp's lanes read the same bank.
  const int row = 2 * cell.pair + (cell.leads ? 0 : 1);
  const int at = ((row & 7) * 4 + (cell.column >> 1)) * 4 + (row >= 8 ? 2 : 0) + (cell.column & 1);
  cell.sums = smem_address(&partial[0][0][0]) + 4 * (cell.entry * kWarps * kTileFloats + at);
  opaque(cell.packet);
  opaque(cell.sums);
  return cell;
}

// Each lane sums one row.
__device__ __forceinline__ float2 sum_rows(const Cell& cell) {
  float part[kWarps], sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) part[w] = load_shared_float(cell.sums + 4 * w * kTileFloats);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += part[w];
  return make_float2(sum, __shfl_down_sync(~0u, sum, kTileColumns));
}

// A quarter of the sum of squares of a column, in the tile of columns that begins at `first`. The four lanes of a
// column have a quarter each, and rms_scale adds them.
template <class Scratch>
__device__ __forceinline__ float squares_part(const Scratch& scratch, int norm, int first = 0) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps / 4; ++i)
    sum += scratch.sum_of_squares[norm][lane_index() / kTileColumns * (kWarps / 4) + i]
                                 [first + (lane_index() & (kTileColumns - 1))];
  return sum;
}

// Loads this warp's next weights from the ring, as many chunks as registers hold at once.
template <class Prod, class Ring>
__device__ __forceinline__ void load_weights(RingReader<Ring>& ring, uint4 (&to)[Prod::kHeld]) {
  const int warp = warp_index();
  const auto place = ring.next.after(warp / Prod::kOwners);
  const uint32_t weights = ring.wait(place) + warp % Prod::kOwners * Prod::kWarpPieceBytes + 16 * lane_index();
#pragma unroll
  for (int j = 0; j < Prod::kHeld; ++j) to[j] = load_shared(weights + j * kChunkBytes);
  uint32_t loaded = 0;
#pragma unroll
  for (int j = 0; j < Prod::kHeld; ++j) loaded |= to[j].w;
  ring.template release<Prod::kOwners>(place, loaded);
  ring.next.skip(kWarps / Prod::kOwners);
}

// The multiplications of one warp. Two independent chains of mma hide latency: an mma takes as long as thirty other
// instructions.
template <int kHeld>
__device__ __forceinline__ void multiply(float (&acc)[2][4], const uint4 (&a)[kHeld], const uint2 (&f)[kHeld]) {
#pragma unroll
  for (int j = 0; j < kHeld; ++j) mma(acc[j % 2], a[j], f[j]);
}

template <class Context>
__device__ __forceinline__ void store_tile(const Context& c, int tile, const float (&acc)[2][4]) {
  reinterpret_cast<float4*>(c.scratch.partial[tile][warp_index()])[lane_index()] =
      make_float4(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1], acc[0][2] + acc[1][2], acc[0][3] + acc[1][3]);
}

// Multiplies a group of items, advances `item` past it and returns the number of items. The weights of the first two
// items are in registers already.
template <class Prod, class Tiles>
__device__ __forceinline__ int multiply_two_ahead(Context& c, int& item, uint4 (&a)[2][Prod::kHeld],
                                                  const uint2 (&f)[Prod::kHeld]) {
  int n = 0;
#pragma unroll
  for (int i = 0; i < Tiles::kCount; ++i) {  // unrolled, so that a[i % 2] stays in registers
    if (i > 0 && item >= Prod::kItems) break;
    item += gridDim.x;
    ++n;
    float acc[2][4] = {};
    multiply(acc, a[i % 2], f);
    if (i + 2 < Tiles::kCount && item + gridDim.x < Prod::kItems) load_weights<Prod>(c.ring, a[i % 2]);
    store_tile(c, Tiles::kFirst + i, acc);
  }
  return n;
}

// The same for products that load the weights of at most one item ahead.
template <class Prod, class Tiles, class Fragments>
__device__ __forceinline__ int multiply_group(Context& c, int& item, uint4 (&a)[Prod::kHeld], uint2 (&f)[Prod::kHeld],
                                              Fragments&& fragments) {
  int n = 0;
#pragma unroll 1
  do {
    const int split = item / Prod::kStrips;
    item += gridDim.x;
    float acc[2][4] = {};
    int hold = 0;
#pragma unroll 1
    do {
      if (!Prod::kOneFill) fragments(split, hold, f);
      hold += Prod::kHeld;
      if (!Prod::kAhead) load_weights<Prod>(c.ring, a);
      multiply(acc, a, f);
      if (Prod::kAhead && (hold < Prod::kChunks || item < Prod::kItems)) load_weights<Prod>(c.ring, a);
    } while (hold < Prod::kChunks);
    store_tile(c, Tiles::kFirst + n, acc);
  } while (++n < Tiles::kCount && item < Prod::kItems);
  return n;
}

// Computes this CTA's items of a product. One step covers as much of k as registers hold. Thread indices are read again
// at each use, to save registers.
//   fragments(split, first, f): fills f[kHeld] with the B operand of this warp's part of k, from
//     chunk `first` of that part. A CTA without items does not call it.
//   finish(strip, split, cell, rows, packets, squares): takes two finished rows. Whole warps call it together.
//     `packets` is the exchange memory. `squares` is this lane's part of the sum of squares, if kNorm names a norm.
// With kAhead, a warp loads the weights of one or two items from the ring before it waits for the operand, and further
// weights while it multiplies. This shortens the time from the operand's arrival to the results. Partial sums are in
// `Tiles` (shared_memory.cuh). Every CTA passes a barrier, even one without items. Memory that was read before the call
// is free after the barrier.
template <class Prod, class Tiles, int kNorm = -1, class Fragments, class Finish>
__device__ __forceinline__ void gemv(Context& c, Fragments&& fragments, Finish&& finish) {
  int item = block_index();
  if (item >= Prod::kItems) return sync_compute();
  uint2 f[Prod::kHeld];
  uint4 a[Prod::kItemsAhead][Prod::kHeld] = {};
  auto load_first = [&] {
    load_weights<Prod>(c.ring, a[0]);
    if (Prod::kItemsAhead > 1 && item + gridDim.x < Prod::kItems) load_weights<Prod>(c.ring, a[Prod::kItemsAhead - 1]);
  };
  if (Prod::kAhead) load_first();
  if (Prod::kOneFill) fragments(0, 0, f);
#pragma unroll 1
  while (true) {
    const int first = item;
    int n;
    if constexpr (Prod::kItemsAhead == 2) {
      n = multiply_two_ahead<Prod, Tiles>(c, item, a, f);
    } else {
      n = multiply_group<Prod, Tiles>(c, item, a[0], f, fragments);
    }
    const Cell cell = epilogue_cell(c.scratch.partial + Tiles::kFirst);
    sync_compute();
    if (cell.entry < n) {
      uint64_t* const packets = c.p.packets;
      float squares = 0.f;
      if constexpr (kNorm >= 0) squares = squares_part(c.scratch, kNorm);
      const float2 rows = sum_rows(cell);
      const int finished = first + cell.entry * gridDim.x;
      const int split = Prod::kSplit > 1 ? finished / Prod::kStrips : 0;
      finish(finished - split * Prod::kStrips, split, cell, rows, packets, squares);
    }
    if (item >= Prod::kItems) break;
    if (Prod::kItemsAhead == 2) load_first();
    sync_compute();  // the tiles have been read
  }
}

}  // namespace qwen_tts
