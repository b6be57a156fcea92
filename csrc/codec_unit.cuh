// A whole residual unit in one launch: input after snake -> dilated convolution -> snake -> product -> residual. It is
// for units whose channels fit one tile: 96 and 192. These have the most time steps, and so the most values.
//
// The columns of a tile are steps of one stream, so the rows that all taps read are one slab, which is fetched once.
// The input of the second product overwrites the slab. The weights of both products pass through the pipeline stages as
// one sequence. The order of sums is that of codec_gemm.cuh.
#pragma once

#include "codec_gemm.cuh"

namespace codec {

constexpr int kMaxUnitStages = 8;
constexpr int kSlabAlign = 128;  // of the stages that follow a slab

template <int kChannels_, int kN_, int kWarpsM_, int kWarpsN_>
struct UnitTile {
  static constexpr int kM = kChannels_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kMi = kM / 16 / kWarpsM, kNi = kN / 8 / kWarpsN;
  static constexpr int kPitch = kM + 4;  // floats between columns of the finished tile
  static constexpr int kTileBytes = kN * kPitch * 4;
  static constexpr int kParts = kM / 8, kColumnsAtOnce = kThreads / kParts;
  static constexpr int kTapSteps = kM / 16;               // of 16 k in one tap
  static constexpr int kSteps = kM % 64 ? kTapSteps : 4;  // in one stage
  static constexpr int kBlocksPerTap = kTapSteps / kSteps;
  static constexpr int kStripBytes = kSteps * 512, kBlockBytes = kM / 16 * kStripBytes;
  static constexpr int kSlabPitch = 2 * kM + 16;  // an odd number of pieces: no bank conflicts
  __device__ static constexpr int slab_bytes(int history) {
    return (kN + history) * kSlabPitch + kSlabAlign - 1 & -kSlabAlign;
  }
  static constexpr int kAtOnce = kN <= 32 ? 1 : 2;
  static_assert(kThreads % kParts == 0, "a thread keeps its rows");
};

struct UnitLaunch {
  Gemm gemm;
  int stages;
};

// Multiplies one stage: acc += weights * columns. `columns` is the address of this lane's row and piece.
template <class T>
__device__ __forceinline__ void multiply_slab(float (&acc)[T::kMi][T::kNi][4], uint32_t weights, uint32_t columns) {
#pragma unroll
  for (int step = 0; step < T::kSteps; ++step) {
    uint4 a[T::kMi];
#pragma unroll
    for (int i = 0; i < T::kMi; ++i) a[i] = load_shared(weights + i * T::kStripBytes + step * 512);
#pragma unroll
    for (int j = 0; j < T::kNi; j += 2) {
      uint32_t b[4];
      ldmatrix(b, columns + step * 32 + j * 8 * T::kSlabPitch);
#pragma unroll
      for (int i = 0; i < T::kMi; ++i) {
        mma(acc[i][j], a[i], make_uint2(b[0], b[1]));
        mma(acc[i][j + 1], a[i], make_uint2(b[2], b[3]));
      }
    }
  }
}

// Fetches the rows that all taps read.
template <class T>
__device__ __forceinline__ void load_slab(const Gemm& p, const Call& call, int stream, int t0, uint32_t to) {
  constexpr int kPieces = T::kM / 8;
  const int ring = p.source.frames * p.source.rows, rows = T::kN + p.history;
  const bf16* const in = static_cast<const bf16*>(p.source.data) + part_of(p.source, stream, call);
  int start = first_row(p.source, call) + t0 - p.history;
  if (start < 0) start += ring;
  for (int i = threadIdx.x; i < rows * kPieces; i += T::kThreads) {
    const int row = i / kPieces, piece = i - row * kPieces;
    const int from = start + row < ring ? start + row : start + row - ring;
    cp_async(to + row * T::kSlabPitch + piece * 16, in + from * T::kM + piece * 8, true);
  }
  cp_async_commit();
}

// The bias and snake between the two products, for the rows of this thread's accumulators.
template <class T>
struct Middle {
  float add[T::kMi][2], frequency[T::kMi][2], strength[T::kMi][2];

  __device__ __forceinline__ void load(const Gemm& p, int strip0) {
#pragma unroll
    for (int i = 0; i < T::kMi; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int m = (strip0 + i) * 16 + half * 8 + (threadIdx.x & 31) / 4;
        add[i][half] = p.middle_add[m];
        frequency[i][half] = p.middle_a[m], strength[i][half] = p.middle_b[m];
      }
  }

  // Applies bias and snake to the accumulators, stores them as bf16 rows of the slab, and sets them to zero.
  __device__ __forceinline__ void apply(float (&acc)[T::kMi][T::kNi][4], uint8_t* slab) const {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int m0 = warp % T::kWarpsM * (16 * T::kMi) + lane / 4;
    const int n0 = warp / T::kWarpsM * (8 * T::kNi) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < T::kMi; ++i)
#pragma unroll
      for (int j = 0; j < T::kNi; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int half = e >> 1, n = n0 + j * 8 + (e & 1), m = m0 + i * 16 + half * 8;
          const float y = snake(acc[i][j][e] + add[i][half], frequency[i][half], strength[i][half]);
          *reinterpret_cast<bf16*>(slab + n * T::kSlabPitch + m * 2) = __float2bfloat16(y);
          acc[i][j][e] = 0.f;
        }
  }
};

// grid (n tiles)
template <class T>
__device__ __forceinline__ void unit(const UnitLaunch& launch) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t full[kMaxUnitStages];
  const Gemm& p = launch.gemm;
  const int stages = launch.stages, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  launch_dependents();
  const uint32_t slab_at = smem_address(shared), full_at = smem_address(full);
  const uint32_t weights_at = slab_at + T::slab_bytes(p.history);
  const int conv_blocks = p.taps * T::kBlocksPerTap, blocks = conv_blocks + T::kBlocksPerTap;

  const auto load_weights = [&](int block, int stage) {
    expect_stage(full_at + stage * 8, T::kBlockBytes);
    copy_stage<T::kThreads>(weights_at + stage * T::kBlockBytes,
                            static_cast<const char*>(p.weights) + block * T::kBlockBytes, T::kBlockBytes,
                            full_at + stage * 8);
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) mbarrier_init(full_at + s * 8, kStageArrivals<T::kThreads>);
    mbarrier_init_fence();
    if (kHopper)
      for (int block = 0; block < stages - 1; ++block) load_weights(block, block);
  }
  if (!kHopper) {
    __syncthreads();  // all threads see the barriers
    for (int block = 0; block < stages - 1; ++block) load_weights(block, block);
  }
  const int strip0 = warp % T::kWarpsM * T::kMi;
  Middle<T> middle;
  middle.load(p, strip0);
  const int n0 = blockIdx.x * T::kN, stream = n0 / p.source.rows, m = threadIdx.x % T::kParts * 8;
  wait_for_previous();
  load_slab<T>(p, p.calls[stream], stream, n0 - stream * p.source.rows, slab_at);
  cp_async_wait<0>();
  __syncthreads();

  float acc[T::kMi][T::kNi][4] = {};
  const uint32_t a_at = weights_at + strip0 * T::kStripBytes + lane * 16;
  const int row = warp / T::kWarpsM * (8 * T::kNi) + (lane & 7) + lane / 16 * 8;
  const uint32_t b_at = slab_at + row * T::kSlabPitch + (lane / 8 & 1) * 16;
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    const int tap = block / T::kBlocksPerTap, part = block - tap * T::kBlocksPerTap;
    if (block == conv_blocks) {
      __syncthreads();  // all threads are done with the slab
      middle.apply(acc, shared);
    }
    mbarrier_wait(full_at + stage * 8, parity);
    __syncthreads();  // all threads are done with the previous stage
    if (copies_stages() && block + stages - 1 < blocks)
      load_weights(block + stages - 1, stage ? stage - 1 : stages - 1);
    const int shift = block < conv_blocks ? tap * p.dilation * T::kSlabPitch : 0;
    multiply_slab<T>(acc, a_at + stage * T::kBlockBytes, b_at + shift + part * T::kSteps * 32);
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  Vectors vectors;
  vectors.load(p, m);
  const int n = threadIdx.x / T::kParts;
  Destination to[T::kAtOnce];
  find_destinations<T>(p, vectors, to, n0, n, T::kN, T::kColumnsAtOnce);
  __syncthreads();
  spread<T, false>(acc, reinterpret_cast<float*>(shared));
  __syncthreads();
  finish_tile<T>(p, vectors, to, slab_at + m * 4, n0, n, T::kN, T::kColumnsAtOnce, nullptr, [] {});
}

}  // namespace codec
