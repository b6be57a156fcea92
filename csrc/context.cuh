// The state that a computing warp keeps through a frame: the tag of the next exchange, its place in the schedule, its
// ring position.
#pragma once

#include "shared_memory.cuh"

namespace qwen_tts {

// A bit for each column that holds a row of a stream.
__device__ __forceinline__ uint32_t columns_of(const FrameParams& p) { return (1u << p.num_columns) - 1; }

// A warp's place in the frame and a few flags, packed into one register.
class PackedState {
 public:
  __device__ __forceinline__ PackedState(uint32_t columns, bool writes_stamps, bool dumps)
      : bits_(columns | (writes_stamps ? kStamps : 0) | (dumps ? kDumps : 0)) {}

  __device__ __forceinline__ int layer() const { return fresh() >> kLayerFrom & 0xff; }
  __device__ __forceinline__ int pass() const { return fresh() >> kPassFrom; }
  __device__ __forceinline__ void next_layer() { bits_ += 1u << kLayerFrom; }
  __device__ __forceinline__ void begin_pass(int pass) {
    bits_ = (bits_ & ((1u << kLayerFrom) - 1)) | uint32_t(pass) << kPassFrom;
  }
  __device__ __forceinline__ void use_columns(uint32_t columns) { bits_ = (bits_ & ~kColumns) | columns; }
  __device__ __forceinline__ bool uses(int column) const { return bits_ >> column & 1; }
  __device__ __forceinline__ bool writes_stamps() const { return bits_ & kStamps; }
  __device__ __forceinline__ bool dumps() const { return bits_ & kDumps; }

 private:
  // From bit 0 on: a bit for each column in use, the flags, the layer, the predictor's pass.
  static constexpr uint32_t kColumns = (1u << kTileColumns) - 1;
  static constexpr uint32_t kStamps = 1u << kTileColumns, kDumps = 2 * kStamps;
  static constexpr int kLayerFrom = 16, kPassFrom = 24;
  static_assert(kDumps < 1u << kLayerFrom && max_of(T::kLayers, P::kLayers) < 256, "fields do not overlap");

  // Makes the compiler compute fields again at each use, so that they take no registers over a wait.
  __device__ __forceinline__ uint32_t fresh() const {
    uint32_t x = bits_;
    opaque(x);
    return x;
  }

  uint32_t bits_;
};

template <class Form_>
struct ContextOf {
  using Form = Form_;
  const FrameParams& p;
  typename Form::Scratch& scratch;
  RingReader<typename Form::Ring> ring;
  Watchdog dog;
  uint32_t tag;  // of the next exchange
  PackedState state;

  __device__ __forceinline__ int layer() const { return state.layer(); }
  __device__ __forceinline__ int pass() const { return state.pass(); }
  __device__ __forceinline__ bool dumps() const { return state.dumps(); }

  static __device__ __forceinline__ int column() { return lane_index() >> 2; }  // this lane's, of a tile
  __device__ __forceinline__ bool uses(int column) const {
    return Form::kWide ? column < p.num_columns : state.uses(column);
  }
  // The lane whose packets this lane polls: its own or, if its column is not in use, one of column 0. Products keep
  // columns apart, so the values of an unused column do not matter.
  __device__ __forceinline__ int polled_lane() const { return uses(column()) ? lane_index() : lane_index() & 3; }

  // This CTA has done its part of an exchange.
  __device__ __forceinline__ void advance() {
    if (state.writes_stamps()) p.stamps[tag - p.epoch] = nanoseconds();
    ++tag;
    opaque(tag);
  }
};

using Context = ContextOf<NarrowForm>;

}  // namespace qwen_tts
