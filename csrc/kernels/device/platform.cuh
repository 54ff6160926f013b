// The seam between nvcc and the host: every kernel source includes CUDA through this file.
//
// With INCEPTION_EXT_EMULATE defined, the same source compiles with a host compiler, and the
// emulator supplies the launch, the thread indices and the check of every global access.
#pragma once

#ifdef INCEPTION_EXT_EMULATE

#include "../../emulator/host_shim.h"

#else

#include <cuda_runtime.h>

#include <cstddef>

namespace inception_ext::kernels {

// The emulator checks that [pointer, pointer + bytes) lies in a tensor of the launch.
__device__ __forceinline__ void check_access(const void* /*pointer*/, size_t /*bytes*/) {}

}  // namespace inception_ext::kernels

#endif
