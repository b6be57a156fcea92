// What host and device share: the shapes, and everything one frame reads and writes.
//
// geometry.h is written by build_tts.py from the checkpoint's config.json; it defines
//   struct TalkerDims / PredictorDims { kHidden, kIntermediate, kLayers, kHeads, kKvHeads, kHeadDim, kVocab }
//   kNumControlCodes, kEosCode
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "geometry.h"

namespace qwen_tts {

constexpr int kMaxStreams = 8;  // the n columns of one mma tile
constexpr int kNumCodebooks = 16;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kMaxSplits = 16;  // position chunks of one attention head

// One column of the frame.
struct StreamParams {
  int slot;          // of the KV cache and the sampling state
  int position;      // rows already in the slot's KV cache: where this row goes
  int frame;         // counts the stream's frames, for the draws
  int suppress_eos;  // 1 before the minimum length
  uint32_t seed[2];  // low and high word
  float talker_temperature, talker_tail_mass, talker_penalty;
  float predictor_temperature, predictor_tail_mass;
  int talker_top_k, predictor_top_k;  // the vocabulary size keeps all
};

// A tape holds the weights of a run of phases in the order of consumption, for each CTA and warp
// apart: [cta][warp][stride], each warp's stretch contiguous (see pack.py).
struct Tape {
  const char* data;
  int64_t stride;  // bytes from one warp's stretch to the next
};

struct FrameParams {
  int num_streams, num_splits;
  uint32_t epoch;  // first tag of this launch; see packets.cuh
  StreamParams streams[kMaxStreams];

  Tape talker_tape;     // per layer: QKV, O, gate-up, down; then the codec head
  Tape predictor_tape;  // per layer the same; read again in every pass
  Tape head_tape;       // the 15 heads, one a pass

  const __nv_bfloat16* talker_norms;     // [layers][2][hidden], then the final norm [hidden]
  const __nv_bfloat16* talker_qk_norms;  // [layers][2][head_dim]
  const __nv_bfloat16* predictor_norms;
  const __nv_bfloat16* predictor_qk_norms;
  const float* talker_rope;     // [positions][head_dim / 2][2]: cosine, sine
  const float* predictor_rope;  // [16][head_dim / 2][2]
  const __nv_bfloat16* codec_embedding;       // [talker vocab][talker hidden]
  const __nv_bfloat16* predictor_embeddings;  // [15][predictor vocab][talker hidden]
  // Where the predictor is narrower than the talker:
  const __nv_bfloat16* projected_embeddings;  // [15][predictor vocab][predictor hidden], of codes 0..14
  const __nv_bfloat16* projection_bias;       // [predictor hidden]

  __nv_bfloat16* k_cache;  // [layers][slots][kv_heads][positions][head_dim]
  __nv_bfloat16* v_cache;
  int num_slots, max_positions;
  __nv_bfloat16* predictor_kv;  // [layers][streams][kv_heads][2][16][head_dim], scratch of one frame

  const float* text_rows;  // [streams][talker hidden], added to the rows fed now
  float* next_rows;        // [slots][talker hidden], what the next frame is fed, less its text
  uint32_t* seen;          // [slots][talker vocab / 32], codes 0 the stream has produced
  const float* noise;      // [streams][16][talker vocab] instead of the draws, or null
  int* codes;              // [streams][16], out
  float* dump_logits;      // [streams][16][talker vocab], out, or null
  float* dump_hidden;      // [streams][talker hidden], out, or null
  const int* forced_codes;  // [streams][16] instead of the drawn ones, or null

  uint64_t* packets;   // all exchange buffers, laid out by PacketLayout
  int* watchdog;       // host-mapped: {state, cta, phase, tag}
  unsigned max_spins;  // polls after which a wait is given up
};

}  // namespace qwen_tts
