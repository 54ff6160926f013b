#include "conv_problem.h"
#include "conv_train.h"
#include "conv_train_launch.h"
#include "device/batch_norm_prologue.cuh"
#include "device/tensor_math.cuh"
#include "launch.h"
#include "tile_plan.h"
#include "variants.h"

namespace inception_ext::kernels {
namespace {

bool is_valid(const ConvTrainProblem& problem) {
  const ConvProblem& p = problem.conv;
  return is_valid(p) && problem.more_filters >= 0 && problem.more_filters < kMaxConvSegments &&
         (is_plain(p) || problem.prologue != ConvPrologue::kMaxPool) &&
         (problem.tile_mean == nullptr) == (problem.tile_m2 == nullptr);
}

// The launch of these params; plan.shape < 0: nothing fits.
cudaError_t make_launch(const ConvTrainParams& params, const DeviceLimits& device,
                        ConvTrainLaunch& group) {
  if (params.problems < 1 || params.problems > kMaxConvProblems / 2) return cudaErrorInvalidValue;
  Gemm gemms[kMaxConvProblems / 2];
  int32_t table_bytes = 0;
  for (int i = 0; i < params.problems; ++i) {
    const ConvTrainProblem& problem = params.problem[i];
    if (!is_valid(problem)) return cudaErrorInvalidValue;
    group.problem[i] = problem;
    gemms[i] = gemm_of(problem.conv, problem.prologue == ConvPrologue::kMaxPool);
    if (problem.prologue == ConvPrologue::kBatchNormRelu) {
      const int32_t floats = BatchNormPrologue<float, 64>::table_floats(problem.conv.channels);
      table_bytes = table_bytes < floats * 4 ? floats * 4 : table_bytes;
    }
  }
  const TileBudget budget{element_bytes(params.dtype), device.multiprocessors,
                          device.shared_bytes - table_bytes, 0, 0};
  const bool scalar = is_scalar(params.dtype, params.exact, device);
  const int first_shape = scalar ? ScalarMath<float>::kFirstShape : 0;
  group.plan = plan_tiles(gemms, params.problems, first_shape, budget);
  group.plan.shared_bytes += table_bytes;
  return group.plan.shape < 0 ? cudaErrorNotSupported : cudaSuccess;
}

}  // namespace

cudaError_t conv_train(const ConvTrainParams& params, cudaStream_t stream) {
  DeviceLimits device;
  ConvTrainLaunch group{};
  cudaError_t error = device_limits(device);
  if (error == cudaSuccess) error = make_launch(params, device, group);
  if (error != cudaSuccess || group.plan.blocks == 0) return error;
  int64_t useful = 0;
  for (int i = 0; i < params.problems; ++i) {
    useful += useful_macs(gemm_of(params.problem[i].conv, false));
  }
  note_useful_macs(useful);
  const bool scalar = is_scalar(params.dtype, params.exact, device);
  return with_math<TensorMath, ScalarMath>(params.dtype, scalar, [&](auto math) {
    return run_conv_train<typename decltype(math)::Type>(group, stream);
  });
}

cudaError_t conv_train_rows(const ConvTrainParams& params, int32_t* rows) {
  DeviceLimits device;
  ConvTrainLaunch group{};
  cudaError_t error = device_limits(device);
  if (error == cudaSuccess) error = make_launch(params, device, group);
  if (error == cudaSuccess) *rows = kTileShapes[group.plan.shape].rows();
  return error;
}

}  // namespace inception_ext::kernels
