// Convolutions + bias + ReLU in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

// Up to kMaxConvProblems convolutions that do not depend on one another. cudaErrorInvalidValue:
// sizes that do not belong together; cudaErrorNotSupported: a max pool prologue over images wider
// than shared memory holds (max_pooled_width).
cudaError_t conv_group(const ConvGroupParams& params, cudaStream_t stream);

// The widest images that a max pool prologue takes on the current device.
cudaError_t max_pooled_width(DType dtype, int32_t* width);

}  // namespace inception_ext::kernels
