// Between the choice of a launch (conv_group.cu) and the files that hold its kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"
#include "tile_plan.h"

namespace inception_ext::kernels {

struct ConvGroupLaunch {
  ConvProblem problem[kMaxConvProblems];
  TilePlan plan;
  int32_t* counters;
  float* partials;
};

// Runs the plan in any shape, with one kind of products (device/tensor_math.cuh); instantiated in
// a file for each.
template <typename Math>
cudaError_t run_conv_group(const ConvGroupLaunch& group, cudaStream_t stream);

}  // namespace inception_ext::kernels
