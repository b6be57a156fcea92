// Finds the rows of a stream, in a buffer of this frame or in the ring of its slot.
//
// A ring has room for the history that a layer needs and for the new frame. So a kernel that writes the new frame never
// writes rows that another kernel still reads.
#pragma once

#include "codec_params.h"
#include "codec_prologue.cuh"
#include "codec_vectors.cuh"

namespace codec {

// The stream's slot and age. Skips the load where `r` is not indexed by slot, because all other loads wait for it.
__device__ __forceinline__ Call call_of(const Rows& r, const Call* calls, int stream) {
  if (r.by_slot) return calls[stream];
  return {stream, 0};
}
// The first element of the stream's part.
__device__ __forceinline__ int64_t part_of(const Rows& r, int stream, const Call& call) {
  return (r.by_slot ? call.slot : stream) * r.stride;
}
// The row at which this frame begins, within the stream's part.
__device__ __forceinline__ int first_row(const Rows& r, const Call& call) {
  return r.by_slot ? (call.age % r.frames) * r.rows : 0;
}
// The element of channel 0 at step t of this frame.
__device__ __forceinline__ int64_t element(const Rows& r, int stream, const Call& call, int t) {
  return part_of(r, stream, call) + static_cast<int64_t>(first_row(r, call) + t) * r.channels;
}

}  // namespace codec
