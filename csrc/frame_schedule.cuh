// The order of a frame's exchanges, written once. Everybody who must agree on it walks the frame with walk_frame and
// says what to do at each step: the warp that fetches weights, the warps that compute, and the list for the host, which
// counts and names exchanges (frame_exchanges.cuh). A mismatch between two of them would hang.
//
//   talker layers ─ codec head ─ projection ─ [pass 0] ─ code 0 ─ pass 1 ─ code 1 ─ ... ─ pass 15 ─ code 15
//
// An exchange is what the CTAs publish under one tag. A layer has five. A pass takes rows through the code predictor's
// layers and is named by the position of its last row: pass p feeds the embedding of code p - 1, and its head gives
// code p. Position 0 is the talker's hidden row.
//
// Positions 0 and 1 are both known when the predictor starts. Up to kPairedStreams streams take them together in
// pass 1. More streams take position 0 in pass 0. Only its keys and values are wanted, so pass 0 ends with the last
// layer's QKV, which pass 1 reads.
#pragma once

#include "params.h"

namespace qwen_tts {

using T = TalkerDims;
using P = PredictorDims;

// If the widths of the two models differ, a projection makes the predictor's input from the talker's hidden row.
constexpr bool kProjects = T::kHidden != P::kHidden;

// What an exchange publishes.
enum class Step : int { kQkv, kAttention, kOut, kGateUp, kDown, kHead, kProjection, kCode };
#define QWEN_TTS_STEP_NAMES "qkv\nattention\nout\ngate_up\ndown\nhead\nprojection\ncode\n"

// What a wait is for. The watchdog reports it. The names are in the same order.
enum class Phase : int { kInput, kAttention, kCombine, kOut, kMlp, kLogits, kCode };
#define QWEN_TTS_PHASE_NAMES "input\nattention\ncombine\nO\nMLP\nlogits\ncode\n"

constexpr int kPairedStreams = kTileColumns / 2;  // streams that fit into a tile with two columns each
constexpr int kLastPass = kNumCodebooks - 1;

__device__ __forceinline__ constexpr int first_pass(int streams) { return streams <= kPairedStreams ? 1 : 0; }

// Whether a layer's queries, keys and values come from a table (FrameParams::predictor_first_qkv). This is so in the
// first layer from position 2 on, because there the input of every column is a code's embedding.
__device__ __forceinline__ constexpr bool qkv_from_table(int pass, int layer) { return layer == 0 && pass > 1; }

// Whether a layer ends with its QKV.
__device__ __forceinline__ constexpr bool ends_with_qkv(int pass, int layer) {
  return pass == 0 && layer == P::kLayers - 1;
}

// A visitor of the walks has a place in the frame, and a member for each step:
//   layer(), next_layer(), pass(), begin_pass(p)    the place. layer() is 0 at the start and after begin_pass
//   qkv<D>(), attention<D>(), out<D>(), gate_up<D>(), down<D>()    the steps of a layer; D is T or P
//   skip_to_next_pass()                             a layer has ended with its QKV
//   head<D>()                                       the logits
//   projection()                                    the predictor's input
//   code()                                          sample code pass() - 1, and return it
//   feed(code)                                      that code becomes the input of pass()
//   advance(Step)                                   the exchange of a step is published: the next one begins
template <class D, class Visitor>
__device__ __forceinline__ constexpr void walk_layer(Visitor& v) {
  constexpr bool kPredictor = is_same<D, P>;
  if (!kPredictor || !qkv_from_table(v.pass(), v.layer())) {
    v.template qkv<D>();
    v.advance(Step::kQkv);
  }
  // Evaluated here, because an earlier result would take a register over the waits of QKV.
  if (kPredictor && ends_with_qkv(v.pass(), v.layer())) {
    v.skip_to_next_pass();
    return;
  }
  v.template attention<D>();
  v.advance(Step::kAttention);
  v.template out<D>();
  v.advance(Step::kOut);
  v.template gate_up<D>();
  v.advance(Step::kGateUp);
  v.template down<D>();
  v.advance(Step::kDown);
}

// Walks a frame of `streams` streams, or a prefill (1, or 0 for a frame), which has only the talker's layers. Both are
// references, so that they are read at their use: copies would take registers over all layers.
template <class Visitor>
__device__ __forceinline__ constexpr void walk_frame(Visitor& v, const int& streams, const int& prefill) {
#pragma unroll 1
  for (; v.layer() < T::kLayers; v.next_layer()) walk_layer<T>(v);
  if (prefill) return;
  v.template head<T>();
  v.advance(Step::kHead);
  if constexpr (kProjects) {
    v.projection();
    v.advance(Step::kProjection);
  }
#pragma unroll 1
  for (v.begin_pass(first_pass(streams));; v.begin_pass(v.pass() + 1)) {
    if (v.pass() > 0) {
      const int code = v.code();
      v.advance(Step::kCode);
      if (v.pass() > kLastPass) return;
      v.feed(code);
    }
#pragma unroll 1
    for (; v.layer() < P::kLayers; v.next_layer()) walk_layer<P>(v);
    if (v.pass() > 0) {
      v.template head<P>();
      v.advance(Step::kHead);
    }
  }
}

constexpr int kTalkerPass = -1;  // FramePlace::pass() before the first pass

// A base for visitors. It keeps the place in the frame and does nothing at each step.
struct FramePlace {
  int at_layer = 0, at_pass = kTalkerPass;

  __device__ __forceinline__ constexpr int layer() const { return at_layer; }
  __device__ __forceinline__ constexpr int pass() const { return at_pass; }
  __device__ __forceinline__ constexpr void next_layer() { ++at_layer; }
  __device__ __forceinline__ constexpr void begin_pass(int pass) {
    at_pass = pass;
    at_layer = 0;
  }
  template <class D>
  __device__ __forceinline__ constexpr void qkv() {}
  template <class D>
  __device__ __forceinline__ constexpr void attention() {}
  template <class D>
  __device__ __forceinline__ constexpr void out() {}
  template <class D>
  __device__ __forceinline__ constexpr void gate_up() {}
  template <class D>
  __device__ __forceinline__ constexpr void down() {}
  template <class D>
  __device__ __forceinline__ constexpr void head() {}
  __device__ __forceinline__ constexpr void projection() {}
  __device__ __forceinline__ constexpr void skip_to_next_pass() {}
  __device__ __forceinline__ constexpr int code() { return 0; }
  __device__ __forceinline__ constexpr void feed(int) {}
  __device__ __forceinline__ constexpr void advance(Step) {}
};

// Counts exchanges, and finds the number of one.
struct ExchangeCounter : FramePlace {
  Step wanted{};
  int wanted_pass = 0, wanted_layer = 0;
  int total = 0, found = -1;

  __device__ constexpr void advance(Step step) {
    if (step == wanted && at_pass == wanted_pass && at_layer == wanted_layer) found = total;
    ++total;
  }
};
// How many exchanges of a frame come before the named one.
__device__ constexpr int exchange_of(Step step, int pass, int layer, int streams) {
  ExchangeCounter counter{{}, step, pass, layer};
  walk_frame(counter, streams, 0);
  return counter.found;
}
__device__ constexpr int num_exchanges(int streams) {
  ExchangeCounter counter{};
  walk_frame(counter, streams, 0);
  return counter.total;
}

constexpr int kMaxExchanges = num_exchanges(kMaxColumns);
static_assert(num_exchanges(1) < kMaxExchanges, "more streams, more exchanges");

// The exchange of the talker's logits. The head comes after all layers.
constexpr int kTalkerLogits = exchange_of(Step::kHead, kTalkerPass, T::kLayers, 1);

// The number of exchanges from the last QKV of pass 0 to that of pass 1. The attention of pass 1 reads both, so pass 0
// publishes under the later tag.
constexpr int kFirstPositionDelay =
    exchange_of(Step::kQkv, 1, P::kLayers - 1, kMaxColumns) - exchange_of(Step::kQkv, 0, P::kLayers - 1, kMaxColumns);
static_assert(kTalkerLogits > 0 && kFirstPositionDelay > 0, "both are exchanges of a frame");

}  // namespace qwen_tts
