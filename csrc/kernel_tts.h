// The launch, as the bindings see it.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

extern "C" {
int frame_max_grid();
int64_t frame_num_packets();
int frame_num_tags();
cudaError_t launch_frame(const qwen_tts::FrameParams* params, int grid, cudaStream_t stream);
}
