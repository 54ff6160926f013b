// Launcher of the NHWC local response normalisation.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

// Starts at most one kernel on `stream` of the current device, allocates nothing and waits for
// nothing. No pixels or C = 0 is a success without a launch. x and y do not overlap.
// cudaErrorInvalidValue: a size, dtype or null pointer that it does not take.
cudaError_t lrn_forward(const LrnParams& params, cudaStream_t stream);

}  // namespace inception_ext::kernels
