// The visitor of the frame's schedule (frame_schedule.cuh) that computes a wide frame, which has more than kTileColumns
// streams. It shares attention.cuh, predictor_attention.cuh, talker.cuh and sampling.cuh with the narrow frame.
#pragma once

#include "frame_compute.cuh"
#include "wide_layer.cuh"

namespace qwen_tts {

struct WideCompute {
  WideContext c;

  __device__ __forceinline__ int layer() const { return c.layer(); }
  __device__ __forceinline__ int pass() const { return c.pass(); }
  __device__ __forceinline__ void next_layer() { c.state.next_layer(); }
  // Pass 0 is fed the talker's hidden row.
  __device__ __forceinline__ void begin_pass(int pass) {
    c.state.begin_pass(pass);
    if (pass > 0) return;
    if constexpr (kProjects) {
      wide_step::feed_projected(c);
    } else {
      wide_step::feed_hidden(c);
    }
  }
  __device__ __forceinline__ void advance(Step) { c.advance(); }

  template <class D>
  __device__ __forceinline__ void qkv() {
    wide_step::qkv<D>(c);
  }
  template <class D>
  __device__ __forceinline__ void attention() {
    if constexpr (is_same<D, T>) {
      attend_talker<T>(c);
    } else {
      attend_predictor<P>(c, new_rows(c));
    }
  }
  template <class D>
  __device__ __forceinline__ void out() {
    wide_step::out<D>(c);
  }
  template <class D>
  __device__ __forceinline__ void gate_up() {
    wide_step::gate_up<D>(c);
  }
  template <class D>
  __device__ __forceinline__ void down() {
    wide_step::down<D>(c);
  }
  __device__ __forceinline__ void skip_to_next_pass() {}
  template <class D>
  __device__ __forceinline__ void head() {
    if constexpr (is_same<D, P>) store_noise(c);
    wide_step::head<D>(c);
  }
  __device__ __forceinline__ void projection() {
    if constexpr (!kProjects) return;
    wide_step::feed_hidden(c);
    wide_step::projection(c);
  }
  // The codes of all streams, one in each lane. Every warp keeps a copy.
  __device__ __forceinline__ int code() {
    free_tiles(c);  // the sampler borrows a tile
    sample_own(c);
    return sampled_code(c, pass() - 1, min(lane_index(), c.p.num_columns - 1));
  }
  __device__ __forceinline__ void feed(int code) {
    c.scratch.codes[warp_index()][lane_index()] = code;
    __syncwarp();
    wide_step::feed_codes(c);
  }
};
static_assert(kMaxColumns == 32, "a lane has a stream's code");

__device__ __forceinline__ void compute_wide_frame(const FrameParams& p, WideForm::Scratch& scratch,
                                                   WideForm::Ring& ring) {
  const bool writes_stamps = p.stamps != nullptr && block_index() == 0 && thread_index() == 0;
  const PackedState state(0, writes_stamps, p.dump_exchanges != nullptr);
  WideCompute compute{{p, scratch, {ring}, Watchdog{p}, p.epoch, state}};
  store_noise(compute.c);  // of code 0, while the first weights are being fetched
  wide_step::feed_talker(compute.c);
  walk_frame(compute, p.num_columns, 0);
  sync_compute();
  for_own_streams<true>(p, [&](int stream) { sum_embeddings(p, stream); });
}

}  // namespace qwen_tts
