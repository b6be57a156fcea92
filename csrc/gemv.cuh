// Products of the frame: 16-row weight strips (mma A operand, from the ring) with the streams in
// the n dimension (B operand, in registers), so that 1 to 8 streams cost the same.
//
// Every warp takes a sixteenth of k. Partial sums of the warps meet in shared memory, and 64
// threads an item finish two rows each for one stream, always in the order of the warps: the same
// bits for every grid and every company.
//
// Called by all threads of the CTA. After `gemv` the scratch may be reused once the CTA has passed
// one more __syncthreads (it is double-buffered).
#pragma once

#include "packets.cuh"
#include "ring.cuh"

namespace qwen_tts {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int kChunk = 16;                    // k of one mma
constexpr int kWarpChunk = kChunk * kWarps;   // k of one chunk in every warp

// The largest piece of `chunks` that divides them evenly, at most 6 (3 KB a piece).
constexpr int piece_chunks(int chunks) {
  for (int n = 6; n > 1; --n)
    if (chunks % n == 0) return n;
  return 1;
}

// A product W x: rows of W in strips of 16, k cut in kSplit parts that different items take.
template <int kRows_, int kK_, int kSplit_>
struct Product {
  static constexpr int kRows = kRows_, kK = kK_, kSplit = kSplit_;
  static constexpr int kStrips = kRows / 16;
  static constexpr int kItems = kStrips * kSplit;
  static constexpr int kChunks = ceil_div(kK / kSplit, kWarpChunk);  // of one warp
  static constexpr int kPieceChunks = piece_chunks(kChunks);
  static constexpr int kPieces = kChunks / kPieceChunks;  // of one item
  static constexpr int kRealChunks = kK / kSplit / kChunk;  // of all warps; the rest is padding
  static_assert(kRows % 16 == 0, "rows come in strips of 16");
  static_assert((kK / kSplit) % kChunk == 0, "k comes in chunks of 16");
};

constexpr int kGroup = 3;             // tiles whose partial sums meet in one __syncthreads
constexpr int kTileFloats = 16 * 8;  // of one warp's 16 x 8 result

struct Scratch {
  float partial[2][kGroup][kWarps][kTileFloats];
  float sum_of_squares[2][kTiles][kWarps][kMaxStreams];
};

__device__ __forceinline__ void mma(float (&acc)[4], const uint4& a, const uint2& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float2 unpack_bf16(uint32_t bits) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
}

// The two rows of a finished tile that one thread holds: rows 2 * pair and 2 * pair + 1 of the
// strip, of one stream. Lanes l and l + 16 of a warp hold pairs p and p + 4.
struct Cell {
  int entry, stream, pair;  // entry: which tile of the group
  bool valid;
};

__device__ __forceinline__ Cell epilogue_cell() {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int quarter = lane >> 3;
  Cell cell;
  cell.entry = warp >> 1;
  cell.stream = lane & 7;
  cell.pair = (quarter & 1) + 2 * (warp & 1) + 4 * (quarter >> 1);
  cell.valid = warp < 2 * kGroup;
  return cell;
}

__device__ __forceinline__ float2 sum_rows(const float (&partial)[kWarps][kTileFloats],
                                           const Cell& cell) {
  const int row = 2 * cell.pair;
  const int element = (row >= 8 ? 2 : 0) + (cell.stream & 1);
  const int lane0 = (row & 7) * 4 + (cell.stream >> 1), lane1 = lane0 + 4;
  float first = 0.f, second = 0.f;
#pragma unroll 8
  for (int w = 0; w < kWarps; ++w) {
    first += partial[w][lane0 * 4 + element];
    second += partial[w][lane1 * 4 + element];
  }
  return make_float2(first, second);
}

// Run all items of product P that fall to this CTA.
//   fragments(split, f): fills f[tile][chunk] with the B operand of this warp's part of k
//   finish(tile, strip, split, cell, rows): takes two finished rows (cell.valid threads only, all
//     lanes of a warp together)
template <class P, int kUsedTiles, class R, class NextRun, class Fragments, class Finish>
__device__ __forceinline__ void gemv(R& ring, NextRun& next_run, Scratch& scratch, int& buffer,
                                     Fragments&& fragments, Finish&& finish) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  constexpr int kItemsAtOnce = kGroup / kUsedTiles;
  constexpr int kChains = kUsedTiles == 1 ? 2 : 1;  // accumulators in turn, where registers allow
  uint2 f[kUsedTiles][P::kChunks];
  int have = -1;
  const Cell cell = epilogue_cell();
  const int tile = cell.entry % kUsedTiles, nth = cell.entry / kUsedTiles;
  for (int first = blockIdx.x; first < P::kItems; first += kItemsAtOnce * gridDim.x) {
#pragma unroll 1
    for (int n = 0; n < kItemsAtOnce; ++n) {
      const int item = first + n * gridDim.x;
      if (item >= P::kItems) break;
      const int split = item / P::kStrips;
      if (split != have) {
        fragments(split, f);
        have = split;
      }
      float acc[kUsedTiles][kChains][4] = {};
#pragma unroll
      for (int piece = 0; piece < P::kPieces; ++piece) {
        const uint32_t weights = ring.wait();
        uint4 a[P::kPieceChunks];
#pragma unroll
        for (int j = 0; j < P::kPieceChunks; ++j) a[j] = load_shared(weights + j * 512);
#pragma unroll
        for (int t = 0; t < kUsedTiles; ++t)
#pragma unroll
          for (int j = 0; j < P::kPieceChunks; ++j)
            mma(acc[t][j % kChains], a[j], f[t][piece * P::kPieceChunks + j]);
        ring.release(next_run);
      }
#pragma unroll
      for (int t = 0; t < kUsedTiles; ++t)
        reinterpret_cast<float4*>(scratch.partial[buffer][n * kUsedTiles + t][warp])[lane] =
            kChains == 1 ? make_float4(acc[t][0][0], acc[t][0][1], acc[t][0][2], acc[t][0][3])
                         : make_float4(acc[t][0][0] + acc[t][kChains - 1][0],
                                       acc[t][0][1] + acc[t][kChains - 1][1],
                                       acc[t][0][2] + acc[t][kChains - 1][2],
                                       acc[t][0][3] + acc[t][kChains - 1][3]);
    }
    __syncthreads();
    const int item = first + nth * gridDim.x;
    if (cell.valid && nth < kItemsAtOnce && item < P::kItems)
      finish(tile, item % P::kStrips, item / P::kStrips, cell,
             sum_rows(scratch.partial[buffer][cell.entry], cell));
    buffer ^= 1;
  }
}

}  // namespace qwen_tts
