// Numbers that the host must know of a built kernel. It reads them out of the cubin, without a GPU
// (qwen_megakernel/installation/cubin.py).
#pragma once

#define QWEN_TTS_FACT(name, ...) extern "C" __device__ const long long fact_##name = __VA_ARGS__
