// Launchers of the NHWC local response normalisation, forward and backward.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

// Both start at most one kernel on `stream` of the current device, allocate nothing and wait for
// nothing. No pixels or C = 0 is a success without a launch. What is written overlaps nothing.
// cudaErrorInvalidValue: a size, dtype or null pointer that they do not take.
cudaError_t lrn_forward(const LrnForwardParams& params, cudaStream_t stream);
cudaError_t lrn_backward(const LrnBackwardParams& params, cudaStream_t stream);

}  // namespace inception_ext::kernels
