// The GPU generation that the kernels are compiled for. Code for GPUs before Hopper is the exception at each use.
#pragma once

// Hopper and newer (sm_90) have a copy engine that fills shared memory and counts on mbarriers, registers that warps
// hand over, clusters of CTAs, and kernels that begin before the one ahead of them has ended. Ampere and Ada (sm_80 to
// sm_89) have none of these. nvcc defines __CUDA_ARCH_LIST__ in host and device passes alike. A build has one
// architecture.
#if defined(__CUDA_ARCH_LIST__) && (__CUDA_ARCH_LIST__) < 900
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif
