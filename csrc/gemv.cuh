// Products of the frame: 16-row weight strips (mma A operand, from the ring) with the columns in
// the n dimension (B operand, in registers), so that 1 to 8 streams cost the same.
//
// Every warp takes a sixteenth of k. Partial sums of the warps meet in shared memory, and 64
// threads an item finish two rows each for one column, always in the order of the warps: the same
// bits for every grid and every company.
#pragma once

#include "ring.cuh"

namespace qwen_tts {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int kChunk = 16;  // k of one mma
constexpr int kChunkBytes = 512;
constexpr bool kSmallShared = kSharedBytes < 128 * 1024;
constexpr int kMaxPieceChunks = kSmallShared ? 2 : 6;

// The largest piece of `chunks` that divides them evenly.
constexpr int piece_chunks(int chunks) {
  for (int n = kMaxPieceChunks; n > 1; --n)
    if (chunks % n == 0) return n;
  return 1;
}

// A product W x: rows of W in strips of 16, k cut in kSplit parts that different items take.
template <int kRows_, int kK_, int kSplit_>
struct Product {
  static constexpr int kRows = kRows_, kK = kK_, kSplit = kSplit_;
  static constexpr int kStrips = kRows / 16;
  static constexpr int kItems = kStrips * kSplit;
  static constexpr int kRealChunks = kK / kSplit / kChunk;    // of all warps; the rest is padding
  static constexpr int kChunks = ceil_div(kRealChunks, kWarps);  // of one warp
  static constexpr int kPieceChunks = piece_chunks(kChunks);
  static constexpr int kPieceBytes = kPieceChunks * kChunkBytes;
  static constexpr int kPieces = kChunks / kPieceChunks;  // of one item, a warp
  // Chunks of the B operand that registers hold at once; beyond 8 it is fetched piece by piece.
  static constexpr int kHeld = kChunks <= 8 ? kChunks : kPieceChunks;
  static constexpr bool kOneFill = kHeld == kChunks && kSplit == 1;  // one B operand serves all items
  // Whether registers hold an item's weights, too, while its operand is waited for; of how many items.
  static constexpr bool kAhead = kHeld == kChunks && kHeld <= 6;
  static constexpr int kItemsAhead = kAhead && kOneFill && kHeld <= 4 ? 2 : 1;
  static constexpr int64_t kItemBytes = int64_t(kWarps) * kChunks * kChunkBytes;
  static constexpr int64_t kBytes = kItems * kItemBytes;
  static_assert(kRows % 16 == 0, "rows come in strips of 16");
  static_assert(kRealChunks % kChunks == 0, "padding is whole warps");
  // Whether a warp's chunks are not padding.
  static __device__ __forceinline__ bool real(int warp) {
    return kRealChunks == kWarps * kChunks || warp * kChunks < kRealChunks;
  }
  static_assert((kK / kSplit) % kChunk == 0, "k comes in chunks of 16");
};

constexpr int kGroup = 3;            // tiles whose partial sums meet at one barrier
constexpr int kTileFloats = 16 * 8;  // of one warp's 16 x 8 result

// What a CTA must know of one of its items of the talker's attention (AttentionItem), the same in all layers.
struct alignas(16) ItemRows {
  uint32_t bits;
  int head;       // of the cache: slot * kv_heads + kv_head
  int end;        // the position after its last
  int first_new;  // from here on, rows come from the exchange
};

// Of a CTA, where all streams are as long as can be and the grid is as small as can be; and an end.
constexpr int kMaxItems = kMaxSplits * TalkerDims::kKvHeads + 1;

struct alignas(16) Scratch {  // of float4s
  float partial[2][kGroup][kWarps][kTileFloats];
  float sum_of_squares[2][kWarps][kMaxColumns];
  int codes[kWarps][kMaxColumns];  // the last ones of the streams; each warp's own copy
  ItemRows items[kMaxItems];       // this CTA's of the talker's attention
};

// The two rows of a finished tile that one thread holds: rows 2 * pair and 2 * pair + 1 of the
// strip, of one column. Four warps finish a tile. Of a warp, lanes 0..7 hold a pair p for each column
// and lanes 16..23 the pair p + 4; the lanes beside them sum the odd rows, and hold nothing.
struct Cell {
  int entry, column, pair;  // entry: which tile of the group
  bool leads;               // whether this lane holds rows
  int packet;               // where the pair stands among a strip's packets
  uint32_t sums;            // shared address of this lane's row in the first warp's tile
};

// All that the epilogue can know before the warps have met: afterwards each step is waited for.
__device__ __forceinline__ Cell epilogue_cell(const float (&partial)[kGroup][kWarps][kTileFloats]) {
  const int lane = lane_index(), warp = warp_index();
  Cell cell;
  cell.entry = warp >> 2;
  cell.column = lane & 7;
  cell.pair = (warp & 3) + 4 * (lane >> 4);
  cell.leads = (lane & 8) == 0;
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
  return make_float2(sum, __shfl_down_sync(~0u, sum, 8));
}

// A quarter of a column's sum of squares: the four lanes of a column share it out (rms_scale).
__device__ __forceinline__ float squares_part(const Scratch& scratch, int norm) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kWarps / 4; ++i)
    sum += scratch.sum_of_squares[norm][(lane_index() >> 3) * (kWarps / 4) + i][lane_index() & 7];
  return sum;
}

// The next of this warp's weights from the ring: as many chunks as registers hold at once.
template <class P, class Ring>
__device__ __forceinline__ void load_weights(Ring& ring, uint4 (&to)[P::kHeld]) {
  const int warp = warp_index(), lane = lane_index();
#pragma unroll
  for (int piece = 0; piece < P::kHeld; piece += P::kPieceChunks) {
    const uint32_t weights = ring.template wait<P::kPieceBytes>(warp, lane);
#pragma unroll
    for (int j = 0; j < P::kPieceChunks; ++j) to[piece + j] = load_shared(weights + j * kChunkBytes);
    ring.template release<P::kPieceBytes>(warp, lane);
  }
}

// What one warp multiplies: two chains of mma, for each takes as long as thirty other instructions.
template <int kHeld>
__device__ __forceinline__ void multiply(float (&acc)[2][4], const uint4 (&a)[kHeld], const uint2 (&f)[kHeld]) {
#pragma unroll
  for (int j = 0; j < kHeld; ++j) mma(acc[j % 2], a[j], f[j]);
}

template <class Context>
__device__ __forceinline__ void lay_tile(const Context& c, int entry, const float (&acc)[2][4]) {
  reinterpret_cast<float4*>(c.scratch.partial[c.buffer()][entry][warp_index()])[lane_index()] =
      make_float4(acc[0][0] + acc[1][0], acc[0][1] + acc[1][1], acc[0][2] + acc[1][2], acc[0][3] + acc[1][3]);
}

// A group of items whose first two's weights are in registers; `item` moves on. How many there were.
template <class P, class Context>
__device__ __forceinline__ int multiply_two_ahead(Context& c, int& item, uint4 (&a)[2][P::kHeld],
                                                  const uint2 (&f)[P::kHeld]) {
  int n = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {  // not a loop: which registers are next is known
    if (i > 0 && item >= P::kItems) break;
    item += gridDim.x;
    ++n;
    float acc[2][4] = {};
    multiply(acc, a[i % 2], f);
    if (i + 2 < kGroup && item + gridDim.x < P::kItems) load_weights<P>(c.ring, a[i % 2]);
    lay_tile(c, i, acc);
  }
  return n;
}

// The same where one item's weights are ahead, or none.
template <class P, class Context, class Fragments>
__device__ __forceinline__ int multiply_group(Context& c, int& item, uint4 (&a)[P::kHeld], uint2 (&f)[P::kHeld],
                                              Fragments&& fragments) {
  int n = 0;
#pragma unroll 1
  do {
    const int split = item / P::kStrips;
    item += gridDim.x;
    float acc[2][4] = {};
    int hold = 0;
#pragma unroll 1
    do {
      if (!P::kOneFill) fragments(split, hold, f);
      hold += P::kHeld;
      if (!P::kAhead) load_weights<P>(c.ring, a);
      multiply(acc, a, f);
      if (P::kAhead && (hold < P::kChunks || item < P::kItems)) load_weights<P>(c.ring, a);
    } while (hold < P::kChunks);
    lay_tile(c, n, acc);
  } while (++n < kGroup && item < P::kItems);
  return n;
}

// Run all items of product P that fall to this CTA, in steps of as much of k as registers hold. Threads' numbers are
// read anew where they are needed, for registers' sake.
//   fragments(split, first, f): fills f[P::kHeld] with the B operand of this warp's part of k, from
//     chunk `first` of it; not called in a CTA without items
//   finish(strip, split, cell, rows, packets, squares): takes two finished rows (whole warps together), and what
//     was read beside them: where the exchanges lie, and where kNorm names a norm, this lane's part of its sum
// Where it can (kAhead), the weights of an item or two are read from the ring before their operand is waited for, and
// later ones while products are made: what is left between an operand's arrival and the results is short.
// c.buffer() says which half of the partial sums is free; it is used, synced once, read, and toggled.
template <class P, int kNorm = -1, class Context, class Fragments, class Finish>
__device__ __forceinline__ void gemv(Context& c, Fragments&& fragments, Finish&& finish) {
  int item = block_index();
  if (item >= P::kItems) return;
  uint2 f[P::kHeld];
  uint4 a[P::kItemsAhead][P::kHeld] = {};
  auto load_first = [&] {
    load_weights<P>(c.ring, a[0]);
    if (P::kItemsAhead > 1 && item + gridDim.x < P::kItems) load_weights<P>(c.ring, a[P::kItemsAhead - 1]);
  };
  if (P::kAhead) load_first();
  if (P::kOneFill) fragments(0, 0, f);
#pragma unroll 1
  while (true) {
    const int first = item;
    int n;
    if constexpr (P::kItemsAhead == 2) {
      n = multiply_two_ahead<P>(c, item, a, f);
    } else {
      n = multiply_group<P>(c, item, a[0], f, fragments);
    }
    const Cell cell = epilogue_cell(c.scratch.partial[c.buffer()]);
    sync_compute();
    if (cell.entry < n) {
      uint64_t* const packets = c.p.packets;
      float squares = 0.f;
      if constexpr (kNorm >= 0) squares = squares_part(c.scratch, kNorm);
      const float2 rows = sum_rows(cell);
      const int finished = first + cell.entry * gridDim.x;
      const int split = P::kSplit > 1 ? finished / P::kStrips : 0;
      finish(finished - split * P::kStrips, split, cell, rows, packets, squares);
    }
    c.take_buffer();
    if (item >= P::kItems) break;
    if (P::kItemsAhead == 2) load_first();
  }
}

}  // namespace qwen_tts
