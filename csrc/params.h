// What host and device share: the shapes, and all that a frame reads and writes.
//
// build_tts.py writes geometry.h from the checkpoint's config.json. It defines
//   struct TalkerDims / PredictorDims { kHidden, kIntermediate, kLayers, kHeads, kKvHeads, kHeadDim, kVocab, kEps }
//   kNumControlCodes, kEosCode, kSharedBytes (the shared memory that a CTA may have on the target GPU)
#pragma once

#include <cuda_bf16.h>

#include "geometry.h"
#include "standard.h"

namespace qwen_tts {

__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }
__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

constexpr int kTileColumns = 8;  // the n columns of one mma tile
constexpr int kMaxColumns = 32;  // of a frame: four tiles. A frame of one tile has its own kernel.
constexpr int kNumCodebooks = 16;
constexpr int kWarps = 16;  // that compute. One more fetches weights.
constexpr int kThreads = kWarps * 32;
constexpr int kSplitPositions = 256;  // of an attention item
constexpr int kMaxSplits = 32;

// One column: a row of one stream. A frame has one column for each stream. A prefill has up to kTileColumns consecutive
// rows of one stream.
struct Stream {
  int slot;          // of the KV cache and the sampling state
  int position;      // of the row in the slot's KV cache
  int first;         // the first column that holds a row of the same stream
  int frame;         // number of the stream's frame, for the draws
  int suppress_eos;  // 1 until the stream has its minimum length
  uint32_t seed[2];  // low and high word
  float talker_temperature, talker_tail_mass, talker_penalty;
  float predictor_temperature, predictor_tail_mass;
  int talker_top_k, predictor_top_k;  // the size of the vocabulary: no truncation
};

struct FrameParams {
  int num_columns;
  int prefill;     // 1: run only the talker's layers, to fill the KV cache; the input rows are text_rows
  uint32_t epoch;  // the tag of this launch's first exchange (packets.cuh)

  // Weights in mma A-fragment order (decoding/weight_packing.py). A layer has the items of QKV, O, gate-up and down.
  const char* talker_layers;
  const char* talker_head;       // the codec head, then the projection if the model has one
  const char* predictor_layers;  // read in every pass
  const char* predictor_heads;   // the 15 heads, one for each pass
  int64_t predictor_kept_bytes;  // bytes at each layer's start that should stay in L2 over the passes

  const __nv_bfloat16* talker_norm;      // the final norm, [hidden]; the other norms are folded into products
  const __nv_bfloat16* talker_qk_norms;  // [layers][2][head_dim]
  const __nv_bfloat16* predictor_qk_norms;
  const float* talker_rope;                   // [positions][head_dim / 2][2]: cosine, sine
  const float* predictor_rope;                // [16][head_dim / 2][2]
  const __nv_bfloat16* codec_embedding;       // [talker vocab][talker hidden]
  const __nv_bfloat16* predictor_embeddings;  // [15][predictor vocab][talker hidden]
  // Queries, keys and values of the predictor's first layer for codes 1..14, as its QKV product publishes them:
  // [14][predictor vocab][rows of QKV].
  const __nv_bfloat16* predictor_first_qkv;
  // Only if the widths of predictor and talker differ:
  const __nv_bfloat16* projected_embeddings;  // [15][predictor vocab][predictor hidden], for codes 0..14
  const __nv_bfloat16* projection_bias;       // [predictor hidden]

  __nv_bfloat16* k_cache;  // [layers][kv_heads][pages][kSplitPositions][head_dim], rows in the order of swizzle()
  __nv_bfloat16* v_cache;
  const int* page_table;  // [slots][splits of max_positions]: the page of each split of a slot
  int num_slots, num_pages, max_positions;
  __nv_bfloat16* predictor_kv;  // [layers][streams][kv_heads][2][16][head_dim], scratch of one frame

  const float* text_rows;   // [columns][talker hidden], added to the input rows of this frame
  float* next_rows;         // [slots][talker hidden], the input rows of the next frame without its text rows
  uint32_t* seen;           // [slots][talker vocab / 32], a bit for each code 0 that the stream has produced
  const float* noise;       // [columns][16][talker vocab] to use instead of the draws' noise, or null
  int* codes;               // [columns][16], out: the drawn codes
  float* dump_logits;       // [columns][16][talker vocab], out, or null
  float* dump_exchanges;    // [exchange][row][column], out, or null; see PacketLayout::kDumpRows
  uint64_t* stamps;         // [exchanges], out: the time in ns when CTA 0 finished its part, or null
  const int* forced_codes;  // [columns][16] to feed instead of the drawn codes, or null

  float* noise_scratch;  // [columns][Sampler::kNoise * 4], noise that was drawn ahead
  uint64_t* packets;     // all exchange buffers, laid out by PacketLayout
  int* watchdog;         // host-mapped: {state, cta, phase, exchange}
  unsigned max_spins;    // polls after which a wait is an error
  int withheld_cta;      // a CTA that does nothing, to test the watchdog, or -1

  Stream streams[kMaxColumns];  // last, because a CTA copies only as many as its kernel has columns
};

}  // namespace qwen_tts
