// The visitor of the frame's schedule (frame_schedule.cuh) for the computing warps.
#pragma once

#include "predictor.cuh"
#include "predictor_attention.cuh"

namespace qwen_tts {

// The rows that a pass adds.
template <class Context>
__device__ __forceinline__ NewRows new_rows(const Context& c) {
  const bool both = c.pass() == 1, paired = c.p.num_columns <= kPairedStreams;
  return {c.pass(), both && paired ? kPairedStreams : 0, both && !paired && c.layer() == P::kLayers - 1};
}

struct FrameCompute {
  Context c;
  Residual<T> hidden;
  Residual<P> row;

  __device__ __forceinline__ int layer() const { return c.layer(); }
  __device__ __forceinline__ int pass() const { return c.pass(); }
  __device__ __forceinline__ void next_layer() { c.state.next_layer(); }
  __device__ __forceinline__ void begin_pass(int pass) {
    c.state.begin_pass(pass);
    c.state.use_columns(columns_of(c.p) | columns_of(c.p) << new_rows(c).first);
  }
  __device__ __forceinline__ void advance(Step) { c.advance(); }

  template <class D>
  __device__ __forceinline__ Residual<D>& residual() {
    if constexpr (is_same<D, T>) {
      return hidden;
    } else {
      return row;
    }
  }
  template <class D>
  __device__ __forceinline__ void qkv() {
    layer_step::qkv<D>(c, residual<D>(), [&] { return is_same<D, P> && ends_with_qkv(pass(), layer()); });
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
    layer_step::out<D>(c);
  }
  template <class D>
  __device__ __forceinline__ void gate_up() {
    layer_step::gate_up<D>(c, residual<D>());
  }
  template <class D>
  __device__ __forceinline__ void down() {
    layer_step::down<D>(c);
  }
  // The barrier is needed because the next product is a QKV too and uses the same array for its sums of squares.
  __device__ __forceinline__ void skip_to_next_pass() { sync_compute(); }

  // The talker's head also norms the residual, which then holds the hidden row.
  template <class D>
  __device__ __forceinline__ void head() {
    if constexpr (is_same<D, T>) {
      head_logits<T>(c, hidden, [] { return 0; });
      norm_hidden(c, hidden);
      if constexpr (!kProjects) {
        sync_compute();  // QKV uses the same tiles
#pragma unroll
        for (int j = 0; j < Residual<P>::kChunks; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) row.x[j][i] = hidden.x[j][i];
      }
    } else {
      store_noise(c);
      head_logits<P>(c, row, [&] { return new_rows(c).first; });
    }
  }
  __device__ __forceinline__ void projection() { project_hidden(c, hidden, row); }

  __device__ __forceinline__ int code() {
    sample_own(c);
    // This lane's stream. A lane whose column has no stream takes the last stream.
    const int own = min(c.column() % (new_rows(c).first > 0 ? kPairedStreams : kTileColumns), c.p.num_columns - 1);
    return sampled_code(c, pass() - 1, own);
  }
  __device__ __forceinline__ void feed(int own_code) {
    if (lane_index() % 4 == 0) c.scratch.codes[warp_index()][c.column()] = own_code;
    __syncwarp();
    if (c.column() >= new_rows(c).first) feed_code(c.p, pass() - 1, own_code, row);
  }
};

// Computes a frame, or a prefill.
__device__ __forceinline__ void compute_frame(const FrameParams& p, NarrowForm::Scratch& scratch,
                                              NarrowForm::Ring& ring) {
  const bool writes_stamps = p.stamps != nullptr && block_index() == 0 && thread_index() == 0;
  const PackedState state(columns_of(p), writes_stamps, p.dump_exchanges != nullptr);
  FrameCompute compute{{p, scratch, {ring}, Watchdog{p}, p.epoch, state}};
  if (!p.prefill) store_noise(compute.c);  // of code 0, while the first weights are being fetched
  feed_talker(compute.c, compute.hidden);
  walk_frame(compute, p.num_columns, p.prefill);
  if (p.prefill) return;
  sync_compute();
  for_own_streams<false>(p, [&](int stream) { sum_embeddings(p, stream); });
}

}  // namespace qwen_tts
