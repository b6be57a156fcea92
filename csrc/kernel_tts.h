// The launch and the kernel's sizes, as the bindings and the tests see them.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

extern "C" {
int frame_max_columns();            // streams of a frame
int frame_max_grid();               // CTAs that the exchanges allow
int frame_max_positions(int grid);  // of a slot, that so many CTAs can attend to
int64_t frame_num_packets();        // 64-bit words of FrameParams::packets, zeros before the first launch
int frame_num_tags();               // the most exchanges a launch has: what the host adds to the epoch after it
int frame_noise_floats();           // of FrameParams::noise_scratch, a column
int frame_dump_rows();              // of FrameParams::dump_exchanges, an exchange
int frame_shared_bytes();           // of dynamic shared memory, a CTA
int frame_ring_slots();             // of the weight ring
int frame_most_ring_slots();        // that shared memory has room for
// A line for each exchange of a frame of so many streams, in order: "talker|predictor PASS LAYER STEP", where PASS is
// -1 for the talker. The text is valid until the thread's next call.
const char* frame_exchanges(int streams);
// A line for each Phase that a wait can be in.
const char* frame_phases();
cudaError_t frame_co_resident(int* ctas);  // CTAs an SM can hold; before the first launch
cudaError_t launch_frame(const qwen_tts::FrameParams* params, int grid, cudaStream_t stream);
}
