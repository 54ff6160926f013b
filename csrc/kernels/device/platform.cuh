// The seam between nvcc and the host: every kernel source includes CUDA through this file.
//
// With INCEPTION_EXT_EMULATE defined, the same source compiles with a host compiler, and every
// wrapper in this folder calls its twin in csrc/emulator instead of the hardware.
#pragma once

#ifdef INCEPTION_EXT_EMULATE

#include "../../emulator/cuda_names.h"

namespace inception_ext::kernels {

using emulator::Place;

// Multiply-accumulates that this thread issues outside mma.
inline void count_macs(int64_t macs) { emulator::count_macs(macs); }

constexpr int kArchitecture = 0;

inline void never_launched() {}

}  // namespace inception_ext::kernels

#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace inception_ext::kernels {

// The line of a kernel that calls a wrapper: of use to the emulator's reports only.
struct Place {
  __host__ __device__ static constexpr Place current() { return {}; }
};

__device__ __forceinline__ void count_macs(int64_t /*macs*/) {}

// That code is compiled for: 750, 800 and so on; 0 for the host, whose emulator runs all code.
#ifdef __CUDA_ARCH__
constexpr int kArchitecture = __CUDA_ARCH__;
#else
constexpr int kArchitecture = 0;
#endif

// In the place of a kernel that launchers do not choose on this architecture.
__device__ __forceinline__ void never_launched() { __trap(); }

}  // namespace inception_ext::kernels

#endif
