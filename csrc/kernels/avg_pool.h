// Launchers of the NHWC average pool, forward and backward.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

// Both start at most one kernel on `stream` of the current device, allocate nothing and wait for
// nothing. N = 0 or C = 0 is a success without a launch. cudaErrorInvalidValue: a size, window,
// dtype or null pointer that they do not take.
cudaError_t avg_pool_forward(const AvgPoolParams& params, cudaStream_t stream);
cudaError_t avg_pool_backward(const AvgPoolParams& params, cudaStream_t stream);

}  // namespace inception_ext::kernels
