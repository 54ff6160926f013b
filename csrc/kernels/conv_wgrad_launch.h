// Between the choice of a launch (conv_wgrad.cu) and the files that hold its kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "conv_wgrad.h"
#include "wgrad_plan.h"

namespace inception_ext::kernels {

struct ConvWgradLaunch {
  WgradProblem problem[kMaxConvProblems];
  WgradPlan plan;
  int32_t* counters;
  float* partials;
};

// Runs the plan in any shape, with one kind of products (device/pixel_math.cuh); instantiated in a
// file for each.
template <typename Math>
cudaError_t run_conv_wgrad(const ConvWgradLaunch& group, cudaStream_t stream);

}  // namespace inception_ext::kernels
