// Products of the frame. Strips of 16 weight rows come from the ring as the A operand of mma. The columns are the n
// dimension of the B operand, in registers. So 1 to 8 streams cost the same.
//
// Each warp takes a sixteenth of k. The warps store their partial sums in shared memory. Then 64 threads finish an
// item: each sums two rows of one column, always in warp order. So the bits depend neither on the grid nor on the
// number of streams.
#pragma once

#include "context.cuh"

namespace qwen_tts {

// The four values of a finished tile that a lane has, its quad. One warp finishes a tile. Lane (r, t) = (lane / 4,
// lane % 4) has rows r and r + 8 of columns 2t and 2t + 1, where the tensor cores leave them.
__device__ __forceinline__ int quad_row() { return lane_index() >> 2; }
__device__ __forceinline__ int quad_column() { return 2 * (lane_index() & 3); }
static_assert(kTileColumns == 8 && kStripRows == 16, "a lane has four values of a tile");

// The shared address of this lane's quad in the first warp's part of a tile.
__device__ __forceinline__ uint32_t quad_address(const float (&tile)[kWarps][kTileFloats]) {
  return smem_address(&tile[0][0]) + 16 * lane_index();
}
// Sums the warps' parts of a lane's quad in the order of the warps: {row r of column 2t, row r of 2t + 1, row r + 8 of
// 2t, row r + 8 of 2t + 1}. No two lanes read the same bank at once.
__device__ __forceinline__ float4 sum_quad(uint32_t from) {
  constexpr int kAtOnce = 4;  // as registers allow
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int first = 0; first < kWarps; first += kAtOnce) {
    float4 part[kAtOnce];
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) part[w] = load_shared_floats(from + 4 * (first + w) * kTileFloats);
#pragma unroll
    for (int w = 0; w < kAtOnce; ++w) {
      sum.x += part[w].x;
      sum.y += part[w].y;
      sum.z += part[w].z;
      sum.w += part[w].w;
    }
  }
  return sum;
}

// Two lanes of neighbouring rows exchange values. Then each has rows 2 * word_pair() and the next of word_column().
__device__ __forceinline__ int word_column() { return quad_column() + (quad_row() & 1); }
__device__ __forceinline__ int word_pair() { return quad_row() >> 1; }
__device__ __forceinline__ float2 word_rows(float even, float odd) {  // of columns 2t and 2t + 1
  const bool upper = quad_row() & 1;
  const float other = __shfl_xor_sync(~0u, upper ? even : odd, 4);
  return upper ? make_float2(other, odd) : make_float2(even, other);
}
// The index of a lane's first packet among those of a strip. The next packet has the rows that are eight further.
__device__ __forceinline__ int word_packets() { return packet_index(0, word_pair(), word_column()); }

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
//   finish(strip, split, quad, packets, squares): takes a lane's values (sum_quad). Whole warps call it together.
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
    // Each of the first warps finishes an item. The address is computed before the barrier, because after it every step
    // adds to the latency.
    const int entry = warp_index();
    uint32_t sums = quad_address(c.scratch.partial[Tiles::kFirst]) + 4 * kWarps * kTileFloats * entry;
    opaque(sums);
    sync_compute();
    if (entry < n) {
      uint64_t* const packets = c.p.packets;
      float squares = 0.f;
      if constexpr (kNorm >= 0) squares = squares_part(c.scratch, kNorm);
      const int finished = first + entry * gridDim.x;
      const int split = Prod::kSplit > 1 ? finished / Prod::kStrips : 0;
      finish(finished - split * Prod::kStrips, split, sum_quad(sums), packets, squares);
    }
    if (item >= Prod::kItems) break;
    if (Prod::kItemsAhead == 2) load_first();
    sync_compute();  // the tiles have been read
  }
}

}  // namespace qwen_tts
