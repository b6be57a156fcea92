// The launch, as the bindings see it.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

extern "C" {
int frame_max_grid();         // CTAs the exchanges allow
int64_t frame_num_packets();  // 64-bit words of FrameParams::packets, zeros before the first launch
int frame_num_tags();         // exchanges of a launch
int frame_noise_floats();     // of FrameParams::noise_aside, a column
int frame_dump_rows();
cudaError_t frame_co_resident(int* ctas);  // CTAs an SM can hold; before the first launch
cudaError_t launch_frame(const qwen_tts::FrameParams* params, int grid, cudaStream_t stream);
}
