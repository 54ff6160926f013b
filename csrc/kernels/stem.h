// Launchers of the stem: the layers before the first Inception module, in two kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

// Both start at most one kernel on `stream` of the current device, allocate nothing and wait for
// nothing. N = 0 is a success without a launch. cudaErrorInvalidValue: a size, dtype or null
// pointer that they do not take; cudaErrorInvalidConfiguration: too little shared memory
// (stem_fits).
cudaError_t stem_conv_pool(const StemConvPoolParams& params, cudaStream_t stream);
cudaError_t stem_conv_conv_pool(const StemConvConvPoolParams& params, cudaStream_t stream);

// Whether the current device has enough shared memory for both. float32 takes 97 KiB: it does not
// fit on compute capability 7.5.
cudaError_t stem_fits(DType dtype, bool& fits);

}  // namespace inception_ext::kernels
