// The product of every dense layer of the codec: weights (A operand) times columns of activations (B operand).
//
// Convolutions are implicit: k runs over taps, then channels, and each 16-byte piece of a column is fetched from the
// row that its tap reads. A transposed convolution is `upsample` such products stacked in m. Bulk copies fetch the
// weights, which are in fragment order. The first of these copies start before the previous kernel has finished.
// 16-byte copies fetch the activations and swizzle them for ldmatrix.
//
// The order of all sums is fixed: within a segment of k, each group of warps adds up its half of every block in steps
// of 16. Then the two groups are added, then the segments. The number of columns of a tile does not change the order,
// so it may follow the batch.
#pragma once

#include "codec_epilogue.cuh"
#include "codec_segments.cuh"

namespace codec {

constexpr int kBlock = 64;                    // k of one pipeline stage
constexpr int kStripBytes = 2 * 16 * kBlock;  // one strip of 16 rows of weights in a stage
constexpr int kGroups = 2;                    // of warps; each takes half of a stage's k

// Two CTAs share an SM: one loads while the other multiplies. CTAs of the next kernel can start beside them.
constexpr int kCtasAnSm = 2;
// Shared memory for the pipeline of one CTA, without the part that the driver and static variables take.
constexpr int kPipelineLimit = kSmSharedBytes / kCtasAnSm - 1536;

template <int kN_, int kWarpsM_, int kWarpsN_, int kMostStages>
struct Tile {
  static constexpr int kM = 64, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kGroups;
  static constexpr int kMi = kM / 16 / kWarpsM, kNi = kN / 8 / kWarpsN;  // mma tiles of a warp
  static constexpr int kWeightBytes = kM / 16 * kStripBytes, kColumnBytes = kN * 2 * kBlock;
  static constexpr int kStagesThatFit = kPipelineLimit / (kWeightBytes + kColumnBytes);
  static constexpr int kStages = kMostStages < kStagesThatFit ? kMostStages : kStagesThatFit;
  static constexpr int kPitch = kM + 4;  // floats between columns of the finished tile
  static constexpr int kPipelineBytes = kStages * (kWeightBytes + kColumnBytes);
  static constexpr int kTileBytes = kN * kPitch * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kTileBytes ? kPipelineBytes : kTileBytes;
  static_assert(kStages >= 2 && kSharedBytes <= kPipelineLimit, "two CTAs share an SM");
  // A thread finishes eight rows of every kColumnsAtOnce-th column.
  static constexpr int kParts = kM / 8, kColumnsAtOnce = kThreads / kParts;
  // When the operands of the epilogue are fetched: before the product, after it or after its sums have left the
  // registers. Tiles of few columns gain by an early fetch, because their time is all latency. The largest tile has no
  // registers for it.
  static constexpr bool kVectorsEarly = kN <= 32, kVectorsLate = kN > 64;
  static constexpr int kAtOnce = kN == 64 ? 2 : 1;  // columns that a thread finishes together; registers limit it
  static_assert(kThreads % kParts == 0, "a thread keeps its rows");
  static_assert(kNi == 1 || kNi % 2 == 0, "columns are loaded 16 at a time, or 8");
};

// Copies the blocks of k of the tile's columns to shared memory, one after the other.
template <class T>
struct ColumnLoader {
  static constexpr int kRowsAtOnce = T::kThreads / 8;
  static constexpr int kPasses = (T::kN + kRowsAtOnce - 1) / kRowsAtOnce;
  const bf16* data[kPasses];
  int start[kPasses];  // the row of the first tap, or -1 beyond the last column
  int tap, piece;      // of this thread's next 16 bytes

  __device__ __forceinline__ ColumnLoader(const Gemm& p, int n0, int first_block) {
    const int ring = p.source.frames * p.source.rows;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int local = pass * kRowsAtOnce + threadIdx.x / 8, n = n0 + local;
      start[pass] = -1;
      data[pass] = static_cast<const bf16*>(p.source.data);
      if (local < T::kN && n < p.columns) {
        const int stream = n / p.source.rows;
        const Call call = call_of(p.source, p.calls, stream);
        int row = first_row(p.source, call) + n - stream * p.source.rows - p.history;
        start[pass] = row < 0 ? row + ring : row;
        data[pass] += part_of(p.source, stream, call);
      }
    }
    const int q = first_block * (kBlock / 8) + threadIdx.x % 8, pieces = p.source.channels / 8;
    tap = q / pieces;
    piece = q - tap * pieces;
  }

  __device__ __forceinline__ void load(const Gemm& p, uint32_t to) {
    const int ring = p.source.frames * p.source.rows, pieces = p.source.channels / 8;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int local = pass * kRowsAtOnce + threadIdx.x / 8;
      if (T::kN % kRowsAtOnce != 0 && local >= T::kN) break;
      int row = start[pass] + tap * p.dilation;
      if (row >= ring) row -= ring;
      const bool valid = start[pass] >= 0 && tap < p.taps;
      const bf16* from = valid ? data[pass] + row * p.source.channels + piece * 8 : data[pass];
      cp_async(to + local * (2 * kBlock) + ((threadIdx.x ^ local) & 7) * 16, from, valid);
    }
    for (piece += kBlock / 8; piece >= pieces; piece -= pieces) ++tap;
  }
};

// Multiplies one stage: acc += weights * columns.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[T::kMi][T::kNi][4], uint32_t weights, uint32_t columns) {
  constexpr int kSteps = kBlock / 16 / kGroups;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int strip0 = warp % T::kWarpsM * T::kMi, n0 = warp / T::kWarpsM % T::kWarpsN * (8 * T::kNi);
  const int first = warp / (T::kWarpsM * T::kWarpsN) * kSteps;
  weights += strip0 * kStripBytes + first * 512 + lane * 16;
  const int row = n0 + (lane & 7) + (T::kNi > 1 ? lane / 16 * 8 : 0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint4 a[T::kMi];
#pragma unroll
    for (int i = 0; i < T::kMi; ++i) a[i] = load_shared(weights + i * kStripBytes + step * 512);
    const uint32_t b_from = columns + row * (2 * kBlock) + ((((first + step) * 2 + (lane / 8 & 1)) ^ row) & 7) * 16;
    if constexpr (T::kNi == 1) {
      uint32_t b[2];
      ldmatrix(b, b_from);
#pragma unroll
      for (int i = 0; i < T::kMi; ++i) mma(acc[i][0], a[i], make_uint2(b[0], b[1]));
    } else {
#pragma unroll
      for (int j = 0; j < T::kNi; j += 2) {
        uint32_t b[4];
        ldmatrix(b, b_from + j * 8 * (2 * kBlock));
#pragma unroll
        for (int i = 0; i < T::kMi; ++i) {
          mma(acc[i][j], a[i], make_uint2(b[0], b[1]));
          mma(acc[i][j + 1], a[i], make_uint2(b[2], b[3]));
        }
      }
    }
  }
}

// Writes the accumulators to shared memory as [column][row]. With kAdd it adds them to the values there.
template <class T, bool kAdd>
__device__ __forceinline__ void spread(const float (&acc)[T::kMi][T::kNi][4], float* tile) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int m0 = warp % T::kWarpsM * (16 * T::kMi) + lane / 4;
  const int n0 = warp / T::kWarpsM % T::kWarpsN * (8 * T::kNi) + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < T::kMi; ++i)
#pragma unroll
    for (int j = 0; j < T::kNi; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& cell = tile[(n0 + j * 8 + (e & 1)) * T::kPitch + m0 + i * 16 + (e >> 1) * 8];
        cell = kAdd ? cell + acc[i][j][e] : acc[i][j][e];
      }
}

// Finds the destinations of columns n, n + step, ... They are counted from column n0, and `end` is the limit.
template <class T>
__device__ __forceinline__ void find_destinations(const Gemm& p, const Vectors& vectors, Destination (&to)[T::kAtOnce],
                                                  int n0, int n, int end, int step) {
#pragma unroll
  for (int i = 0; i < T::kAtOnce; ++i)
    if (n + i * step < end) to[i].load(p, vectors, n0 + n + i * step);
}

// Finishes this thread's share of the tile at `rows_at`: columns n, n + step, ... below `end`, counted from column n0.
// `to` has the destinations of the first kAtOnce. Columns are finished in batches, so that the fetches of a batch
// overlap. Calls done_reading after the last read of the tile.
template <class T, class DoneReading>
__device__ __forceinline__ void finish_tile(const Gemm& p, const Vectors& vectors, Destination (&to)[T::kAtOnce],
                                            uint32_t rows_at, int n0, int n, int end, int step, const float* scale,
                                            DoneReading&& done_reading) {
  if (n >= end) done_reading();
  while (n < end) {
    float v[T::kAtOnce][8];
#pragma unroll
    for (int i = 0; i < T::kAtOnce; ++i)
      if (n + i * step < end) sum_segments(p.segments, rows_at + (n + i * step) * T::kPitch * 4, v[i]);
    if (n + T::kAtOnce * step >= end) done_reading();
#pragma unroll
    for (int i = 0; i < T::kAtOnce; ++i)
      if (n + i * step < end) finish(p, vectors, to[i], scale ? scale[n + i * step] : 1.f, v[i]);
    n += T::kAtOnce * step;
    find_destinations<T>(p, vectors, to, n0, n, end, step);
  }
}

// This CTA's part of the product: all stages of its segment of k.
template <class T>
struct Pipeline {
  uint32_t weights_at, columns_at, full_at;
  const char* weights;  // of the first block
  int first, blocks;    // of k

  __device__ __forceinline__ Pipeline(const Gemm& p, int rank, int m_tile, const uint8_t* shared,
                                      const uint64_t* full) {
    first = rank * p.k_blocks / p.segments;
    blocks = (rank + 1) * p.k_blocks / p.segments - first;
    weights_at = smem_address(shared);
    columns_at = weights_at + T::kStages * T::kWeightBytes;
    full_at = smem_address(full);
    weights =
        static_cast<const char*>(p.weights) + (static_cast<int64_t>(m_tile) * p.k_blocks + first) * T::kWeightBytes;
  }

  __device__ __forceinline__ void load_weights(int block) {
    const int stage = block % T::kStages;
    expect_stage(full_at + stage * 8, T::kWeightBytes);
    copy_stage<T::kThreads>(weights_at + stage * T::kWeightBytes, weights + block * T::kWeightBytes, T::kWeightBytes,
                            full_at + stage * 8);
  }

  // Starts the copies of the first weights. Runs before the previous kernel has finished.
  __device__ __forceinline__ void start() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < T::kStages; ++s) mbarrier_init(full_at + s * 8, kStageArrivals<T::kThreads>);
      mbarrier_init_fence();
      if (kHopper) start_weights();
    }
    if (kHopper) return;
    __syncthreads();  // all threads see the barriers
    start_weights();
  }

  __device__ __forceinline__ void start_weights() {
    for (int block = 0; block < min(blocks, T::kStages - 1); ++block) load_weights(block);
  }

  __device__ __forceinline__ void start_columns(const Gemm& p, ColumnLoader<T>& loader) {
#pragma unroll 1
    for (int block = 0; block < T::kStages - 1; ++block) {
      if (block < blocks) loader.load(p, columns_at + block * T::kColumnBytes);
      cp_async_commit();
    }
  }

  __device__ __forceinline__ void run(const Gemm& p, ColumnLoader<T>& loader, float (&acc)[T::kMi][T::kNi][4]) {
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      const int stage = block % T::kStages, next = block + T::kStages - 1;
      cp_async_wait<T::kStages - 2>();
      mbarrier_wait(full_at + stage * 8, block / T::kStages & 1);
      __syncthreads();  // all threads see the stage and are done with the previous one
      if (next < blocks) {
        if (copies_stages()) load_weights(next);
        loader.load(p, columns_at + next % T::kStages * T::kColumnBytes);
      }
      cp_async_commit();
      multiply<T>(acc, weights_at + stage * T::kWeightBytes, columns_at + stage * T::kColumnBytes);
    }
  }
};

// Adds the sums of both groups in one tile in shared memory.
template <class T>
__device__ __forceinline__ void join_groups(const float (&acc)[T::kMi][T::kNi][4], float* tile) {
  cp_async_wait<0>();
  __syncthreads();
  const bool second = threadIdx.x >= T::kThreads / 2;
  if (second) spread<T, false>(acc, tile);
  __syncthreads();
  if (!second) spread<T, true>(acc, tile);
}

// Makes the tile visible to all CTAs of the cluster.
__device__ __forceinline__ void share_tile(bool alone) {
  if (alone) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

// grid (segments * m tiles, n tiles), clusters of `segments`.
template <class T>
__device__ __forceinline__ void gemm(const GemmLaunch& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t full[T::kStages];
  __shared__ float scale[T::kN];
  launch_dependents();
  const int rank = blockIdx.x % p.segments, m_tile = blockIdx.x / p.segments, m0 = m_tile * T::kM;
  const int n0 = blockIdx.y * T::kN, m = threadIdx.x % T::kParts * 8;
  Pipeline<T> pipeline(p, rank, m_tile, shared, full);
  pipeline.start();
  Vectors vectors;
  if (T::kVectorsEarly && m0 + m < p.m) vectors.load(p, m0 + m);
  __syncthreads();  // all threads see the barriers
  wait_for_previous();

  ColumnLoader<T> loader(p, n0, pipeline.first);
  pipeline.start_columns(p, loader);
  for (int n = threadIdx.x / 32; n < T::kN; n += T::kThreads / 32)
    scale[n] = p.squares_in && n0 + n < p.columns ? inverse_rms(p, n0 + n) : 1.f;
  float acc[T::kMi][T::kNi][4] = {};
  pipeline.run(p, loader, acc);

  if (!T::kVectorsEarly && !T::kVectorsLate && m0 + m < p.m) vectors.load(p, m0 + m);
  // Without clusters one CTA finishes the whole tile.
  const int step = (kHopper ? p.segments : 1) * T::kColumnsAtOnce;
  const int n = (kHopper ? rank : 0) * T::kColumnsAtOnce + threadIdx.x / T::kParts;
  const int end = m0 + m < p.m ? min(T::kN, p.columns - n0) : 0;
  Destination to[T::kAtOnce];
  if (!T::kVectorsLate) find_destinations<T>(p, vectors, to, n0, n, end, step);
  const bool alone = p.segments == 1;
  float* const tile = reinterpret_cast<float*>(shared);
  join_groups<T>(acc, tile);
  if (T::kVectorsLate) {
    if (m0 + m < p.m) vectors.load(p, m0 + m);
    find_destinations<T>(p, vectors, to, n0, n, end, step);
  }
  if constexpr (kHopper) {
    share_tile(alone);
  } else {
    __syncthreads();
    if (!alone && !join_segments<T>(p, tile, m_tile, rank)) return;
  }
  finish_tile<T>(p, vectors, to, pipeline.weights_at + m * 4, n0, n, end, step, scale, [&] {
    if (kHopper && !alone) cluster_arrive();
  });
  if (kHopper && !alone) cluster_wait();  // no CTA ends while another reads its tile
}

}  // namespace codec
