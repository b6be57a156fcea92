// The launch and the sizes of the kernel, for the bindings and the tests.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

extern "C" {
int frame_max_columns();            // streams of a frame
int frame_max_grid();               // CTAs that the exchanges allow
int frame_max_positions(int grid);  // of a slot, for a launch of `grid` CTAs
int64_t frame_num_packets();        // 64-bit words of FrameParams::packets, which are zeros before the first launch
int frame_num_tags();               // the most exchanges of a launch; the host adds it to the epoch after each launch
int frame_noise_floats();           // of FrameParams::noise_scratch, for each column
int frame_dump_rows();              // of FrameParams::dump_exchanges, for each exchange
int frame_shared_bytes();           // of dynamic shared memory, for each CTA
int frame_ring_slots();             // of the weight ring
int frame_most_ring_slots();        // for which shared memory has room
// A line for each exchange of a frame of `streams` streams, in order: "talker|predictor PASS LAYER STEP". PASS is -1
// for the talker. The text is valid until the thread's next call.
const char* frame_exchanges(int streams);
// The names of Phase, one on each line.
const char* frame_phases();
cudaError_t frame_co_resident(int* ctas);  // CTAs that an SM can hold; call it before the first launch
cudaError_t launch_frame(const qwen_tts::FrameParams* params, int grid, cudaStream_t stream);
}
