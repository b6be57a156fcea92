// What host and device share: the shapes, and everything one frame reads and writes.
//
// geometry.h is written by build_tts.py from the checkpoint's config.json; it defines
//   struct TalkerDims / PredictorDims { kHidden, kIntermediate, kLayers, kHeads, kKvHeads, kHeadDim, kVocab, kEps }
//   kNumControlCodes, kEosCode, kSharedBytes (shared memory a CTA of the target may have)
#pragma once

#include <cuda_bf16.h>

#include "geometry.h"
#include "standard.h"

namespace qwen_tts {

__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int kTileColumns = 8;  // the n columns of one mma tile
constexpr int kMaxColumns = 32;  // of a frame: four tiles. A frame of one tile has a kernel of its own.
constexpr int kNumCodebooks = 16;
constexpr int kWarps = 16;  // that compute; one more fetches weights
constexpr int kThreads = kWarps * 32;
constexpr int kSplitPositions = 256;  // positions an attention item covers
constexpr int kMaxSplits = 32;

// One column: a row of one stream. A frame has one column a stream; a prefill has up to kTileColumns
// consecutive rows of one stream.
struct Stream {
  int slot;          // of the KV cache and the sampling state
  int position;      // of the row in the slot's keys and values
  int first;         // the first column that holds a row of the same stream
  int frame;         // counts the stream's frames, for the draws
  int suppress_eos;  // 1 before the minimum length
  uint32_t seed[2];  // low and high word
  float talker_temperature, talker_tail_mass, talker_penalty;
  float predictor_temperature, predictor_tail_mass;
  int talker_top_k, predictor_top_k;  // the vocabulary size keeps all
};

struct FrameParams {
  int num_columns;
  int prefill;     // 1: the talker's layers alone, for their keys and values; rows are text_rows
  uint32_t epoch;  // tag of this launch's first exchange; see packets.cuh
  Stream streams[kMaxColumns];

  // Weights in mma A-fragment order (decoding/weight_packing.py): per layer the items of QKV, O, gate-up, down.
  const char* talker_layers;
  const char* talker_head;       // the codec head, then the projection where there is one
  const char* predictor_layers;  // read again in every pass
  const char* predictor_heads;   // the 15 heads, one a pass
  int64_t predictor_kept_bytes;  // of each layer's start that shall stay in L2 over the passes

  const __nv_bfloat16* talker_norm;      // the final one, [hidden]; weights of others are in the products after them
  const __nv_bfloat16* talker_qk_norms;  // [layers][2][head_dim]
  const __nv_bfloat16* predictor_qk_norms;
  const float* talker_rope;                   // [positions][head_dim / 2][2]: cosine, sine
  const float* predictor_rope;                // [16][head_dim / 2][2]
  const __nv_bfloat16* codec_embedding;       // [talker vocab][talker hidden]
  const __nv_bfloat16* predictor_embeddings;  // [15][predictor vocab][talker hidden]
  // Queries, keys and values of the predictor's first layer for the rows of codes 1..14, as its product would
  // publish them: [14][predictor vocab][rows of QKV].
  const __nv_bfloat16* predictor_first_qkv;
  // Where the predictor is narrower than the talker:
  const __nv_bfloat16* projected_embeddings;  // [15][predictor vocab][predictor hidden], of codes 0..14
  const __nv_bfloat16* projection_bias;       // [predictor hidden]

  __nv_bfloat16* k_cache;  // [layers][kv_heads][pages][kSplitPositions][head_dim], rows in the order of swizzle()
  __nv_bfloat16* v_cache;
  const int* page_table;  // [slots][splits of max_positions], the page of each; of a slot's own positions
  int num_slots, num_pages, max_positions;
  __nv_bfloat16* predictor_kv;  // [layers][streams][kv_heads][2][16][head_dim], scratch of one frame

  const float* text_rows;   // [columns][talker hidden], added to the rows fed now
  float* next_rows;         // [slots][talker hidden], what the next frame is fed, less its text
  uint32_t* seen;           // [slots][talker vocab / 32], codes 0 the stream has produced
  const float* noise;       // [columns][16][talker vocab] instead of the draws, or null
  int* codes;               // [columns][16], out: what was drawn
  float* dump_logits;       // [columns][16][talker vocab], out, or null
  float* dump_exchanges;    // [exchange][row][column], out, or null; see PacketLayout::kDumpRows
  uint64_t* stamps;         // [exchanges], when CTA 0 had done its part of each, ns; or null
  const int* forced_codes;  // [columns][16] to go on with instead of the drawn ones, or null

  float* noise_scratch;  // [columns][Sampler::kNoise * 4], drawn before it is needed
  uint64_t* packets;     // all exchange buffers, laid out by PacketLayout
  int* watchdog;         // host-mapped: {state, cta, phase, exchange}
  unsigned max_spins;    // polls after which a wait is given up
  int withheld_cta;      // a CTA that does not take part (test of the watchdog), or -1
};

}  // namespace qwen_tts
