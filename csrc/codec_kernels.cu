// The codec's launches, as the host calls them. Each is asynchronous and returns a cudaError_t. A frame is a fixed
// sequence of launches (codec/cuda_plan.py).
#include "codec_attention.cuh"
#include "codec_convnext.cuh"
#include "codec_ends.cuh"
#include "codec_gemm.cuh"
#include "codec_unit.cuh"

namespace codec {

// A build may be for less shared memory than the GPU has. This limits the SM to the build's amount.
inline cudaError_t limit_shared_memory(const void* kernel) {
  int device, most;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess || most <= kSmSharedBytes) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100 * kSmSharedBytes / most);
}

template <class P>
cudaError_t launch(void (*kernel)(P), const P& params, dim3 grid, int threads, int shared, int cluster, void* stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) error = limit_shared_memory(reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = !kHopper ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <class T>
cudaError_t launch_gemm(const GemmLaunch& p, void* stream) {
  const dim3 grid(p.segments * ((p.m + T::kM - 1) / T::kM), (p.columns + T::kN - 1) / T::kN);
  return launch(gemm_kernel<T>, p, grid, T::kThreads, T::kSharedBytes, p.segments, stream);
}

template <class T>
cudaError_t launch_unit(const Gemm& p, int stages, void* stream) {
  if (p.source.rows % T::kN || stages < 2 || stages > kMaxUnitStages) return cudaErrorInvalidValue;
  const int pipeline = T::slab_bytes(p.history) + stages * T::kBlockBytes;
  const int shared = pipeline > T::kTileBytes ? pipeline : T::kTileBytes;
  return launch(unit_kernel<T>, UnitLaunch{p, stages}, dim3(p.columns / T::kN), T::kThreads, shared, 1, stream);
}

}  // namespace codec

extern "C" {

// Whether the sums of segments are exchanged in device memory, because the GPU has no clusters.
int codec_meets_in_memory() { return !kHopper; }

// tile_n: columns of a CTA: 8, 16, 32, 64 or 128. `partial` and `arrived` are those of SegmentedGemm; GPUs with
// clusters do not use them.
int codec_gemm(const codec::Gemm* gemm, int tile_n, float* partial, int* arrived, void* stream) {
  using namespace codec;
  GemmLaunch launch;
  static_cast<Gemm&>(launch) = *gemm;
  set_exchange(launch, partial, arrived);
  const GemmLaunch* const p = &launch;
  switch (tile_n) {
    case 8:
      return launch_gemm<Tile<8, 4, 1, 6>>(*p, stream);
    case 16:
      return launch_gemm<Tile<16, 4, 1, 6>>(*p, stream);
    case 32:
      return launch_gemm<Tile<32, 4, 1, 6>>(*p, stream);
    case 64:
      return launch_gemm<Tile<64, 2, 2, 5>>(*p, stream);
    case 128:
      return launch_gemm<Tile<128, 2, 2, 4>>(*p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// A residual unit of 96 or 192 channels (p->m). tile_n: columns of a CTA: 16, 32, 64 or 128. stages: 2 to 8.
int codec_unit(const codec::Gemm* p, int tile_n, int stages, void* stream) {
  using namespace codec;
  switch (p->m * 1000 + tile_n) {
    case 96016:
      return launch_unit<UnitTile<96, 16, 6, 1>>(*p, stages, stream);
    case 96032:
      return launch_unit<UnitTile<96, 32, 6, 1>>(*p, stages, stream);
    case 96064:
      return launch_unit<UnitTile<96, 64, 3, 2>>(*p, stages, stream);
    case 96128:
      return launch_unit<UnitTile<96, 128, 3, 2>>(*p, stages, stream);
    case 192016:
      return launch_unit<UnitTile<192, 16, 12, 1>>(*p, stages, stream);
    case 192032:
      return launch_unit<UnitTile<192, 32, 12, 1>>(*p, stages, stream);
    case 192064:
      return launch_unit<UnitTile<192, 64, 6, 2>>(*p, stages, stream);
    case 192128:
      return launch_unit<UnitTile<192, 128, 6, 2>>(*p, stages, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

int codec_embed(const codec::Embed* p, int streams, void* stream) {
  using namespace codec;
  return launch(embed_kernel, *p, dim3(streams), kEndThreads, 0, 1, stream);
}

int codec_attention(const codec::Attention* p, int streams, void* stream) {
  using namespace codec;
  if (p->head_dim > 4 * kAttentionThreads) return cudaErrorInvalidValue;
  const int bytes = 4 * attention_floats(p->head_dim, p->window);
  return launch(attention_kernel, *p, dim3(p->heads, streams), kAttentionThreads, bytes, 1, stream);
}

int codec_depthwise_norm(const codec::DepthwiseNorm* p, int streams, void* stream) {
  using namespace codec;
  return launch(depthwise_norm_kernel, *p, dim3(streams * p->source.rows), kNormThreads, 4 * p->source.channels, 1,
                stream);
}

int codec_last_conv(const codec::LastConv* p, int streams, void* stream) {
  using namespace codec;
  return launch(last_conv_kernel, *p, dim3((p->source.rows + kSamples - 1) / kSamples, streams), kEndThreads, 0, 1,
                stream);
}

// The shared memory of an SM, in bytes, for which the sizes of tiles are chosen.
int codec_sm_shared_bytes() { return codec::kSmSharedBytes; }

// The total size of the parameter structures. The host compares it with its own mirror of them.
int codec_param_bytes() {
  using namespace codec;
  return sizeof(Gemm) + sizeof(Embed) + sizeof(Attention) + sizeof(DepthwiseNorm) + sizeof(LastConv);
}

const char* codec_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
