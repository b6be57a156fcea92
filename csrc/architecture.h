// The GPU generation that the kernels are compiled for. Code for GPUs before Hopper is the exception at each use.
#pragma once

// Hopper and newer (sm_90) have a copy engine that fills shared memory and counts on mbarriers, registers that warps
// hand over, clusters of CTAs, and kernels that begin before the one ahead of them has ended. Ampere and Ada (sm_80 to
// sm_89) have none of these. A build has one architecture.
constexpr bool kHopper = __CUDA_ARCH__ >= 900;
