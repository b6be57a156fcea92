// Which of two generations of GPUs the kernels are compiled for. The older one is the exception wherever it is asked for.
#pragma once

// Hopper and newer (sm_90) have a copy engine that fills shared memory and counts on mbarriers, registers that warps hand
// over, clusters of CTAs, and kernels that begin before the one ahead of them has ended. Ampere and Ada (sm_80 to sm_89)
// have none of these. nvcc says the same to the host and to the device; a build is for one architecture.
#if defined(__CUDA_ARCH_LIST__) && (__CUDA_ARCH_LIST__) < 900
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif
