// Between the choice of a launch (conv_train.cu) and the files that hold its kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "conv_train.h"
#include "tile_plan.h"

namespace inception_ext::kernels {

struct ConvTrainLaunch {
  ConvTrainProblem problem[kMaxConvProblems / 2];
  TilePlan plan;
};

template <typename Math>
cudaError_t run_conv_train(const ConvTrainLaunch& group, cudaStream_t stream);

}  // namespace inception_ext::kernels
