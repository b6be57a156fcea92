// The codec's kernels, and what their launches need (codec/cuda_launcher.py). A frame is a fixed sequence of launches,
// see codec/cuda_plan.py.
#include "codec_attention.cuh"
#include "codec_convnext.cuh"
#include "codec_ends.cuh"
#include "codec_gemm.cuh"
#include "codec_unit.cuh"
#include "facts.cuh"

namespace codec {

// Named after its columns a CTA.
#define QWEN_TTS_GEMM(columns, ...)                                                \
  using Tile##columns = Tile<columns, __VA_ARGS__>;                                \
  extern "C" __global__ void __launch_bounds__(Tile##columns::kThreads, kCtasAnSm) \
      codec_gemm_##columns(const __grid_constant__ GemmLaunch p) {                 \
    gemm<Tile##columns>(p);                                                        \
  }                                                                                \
  QWEN_TTS_FACT(codec_gemm_##columns##_threads, Tile##columns::kThreads);          \
  QWEN_TTS_FACT(codec_gemm_##columns##_shared_bytes, Tile##columns::kSharedBytes)

QWEN_TTS_GEMM(8, 4, 1, 6);
QWEN_TTS_GEMM(16, 4, 1, 6);
QWEN_TTS_GEMM(32, 4, 1, 6);
QWEN_TTS_GEMM(64, 2, 2, 5);
QWEN_TTS_GEMM(128, 2, 2, 4);

// A residual unit, named after its channels and its columns a CTA.
#define QWEN_TTS_UNIT(channels, columns, ...)                                                       \
  using Unit##channels##_##columns = UnitTile<channels, columns, __VA_ARGS__>;                      \
  extern "C" __global__ void __launch_bounds__(Unit##channels##_##columns::kThreads)                \
      codec_unit_##channels##_##columns(const __grid_constant__ UnitLaunch p) {                     \
    unit<Unit##channels##_##columns>(p);                                                            \
  }                                                                                                 \
  QWEN_TTS_FACT(codec_unit_##channels##_##columns##_threads, Unit##channels##_##columns::kThreads); \
  QWEN_TTS_FACT(codec_unit_##channels##_##columns##_tile_bytes, Unit##channels##_##columns::kTileBytes)

QWEN_TTS_UNIT(96, 16, 6, 1);
QWEN_TTS_UNIT(96, 32, 6, 1);
QWEN_TTS_UNIT(96, 64, 3, 2);
QWEN_TTS_UNIT(96, 128, 3, 2);
QWEN_TTS_UNIT(192, 16, 12, 1);
QWEN_TTS_UNIT(192, 32, 12, 1);
QWEN_TTS_UNIT(192, 64, 6, 2);
QWEN_TTS_UNIT(192, 128, 6, 2);

}  // namespace codec

// Bytes of a row of a unit's slab, what the slab is rounded up to, and bytes of one of its stages.
QWEN_TTS_FACT(codec_unit_96_row_bytes, codec::Unit96_16::kSlabPitch);
QWEN_TTS_FACT(codec_unit_96_stage_bytes, codec::Unit96_16::kBlockBytes);
QWEN_TTS_FACT(codec_unit_192_row_bytes, codec::Unit192_16::kSlabPitch);
QWEN_TTS_FACT(codec_unit_192_stage_bytes, codec::Unit192_16::kBlockBytes);
QWEN_TTS_FACT(unit_slab_align, codec::kSlabAlign);
QWEN_TTS_FACT(max_unit_stages, codec::kMaxUnitStages);

QWEN_TTS_FACT(gemm_rows, codec::Tile8::kM);  // of a CTA, whatever its columns
QWEN_TTS_FACT(codec_embed_threads, codec::kEndThreads);
QWEN_TTS_FACT(codec_attention_threads, codec::kAttentionThreads);
QWEN_TTS_FACT(codec_depthwise_norm_threads, codec::kNormThreads);
QWEN_TTS_FACT(codec_last_conv_threads, codec::kEndThreads);
QWEN_TTS_FACT(last_conv_samples, codec::kSamples);  // of a CTA

// Whether a product's segments are a cluster, and a kernel may begin before the one ahead of it has ended. Otherwise
// segments exchange their sums in device memory (codec_segments.cuh).
QWEN_TTS_FACT(has_clusters, kHopper);
QWEN_TTS_FACT(sm_shared_bytes, codec::kSmSharedBytes);  // that the tiles are cut for

// The host compares these with its own mirror of the structures.
QWEN_TTS_FACT(gemm_bytes, sizeof(codec::GemmLaunch));
QWEN_TTS_FACT(unit_bytes, sizeof(codec::UnitLaunch));
QWEN_TTS_FACT(embed_bytes, sizeof(codec::Embed));
QWEN_TTS_FACT(attention_bytes, sizeof(codec::Attention));
QWEN_TTS_FACT(depthwise_norm_bytes, sizeof(codec::DepthwiseNorm));
QWEN_TTS_FACT(last_conv_bytes, sizeof(codec::LastConv));
