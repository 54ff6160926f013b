// Launcher of the NHWC global average pool.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

// Starts at most one kernel on `stream` of the current device, allocates nothing and waits for
// nothing. N = 0 or C = 0 is a success without a launch. cudaErrorInvalidValue: a size, dtype or
// null pointer that it does not take.
cudaError_t global_avg_pool(const GlobalAvgPoolParams& params, cudaStream_t stream);

}  // namespace inception_ext::kernels
