#include "conv_group.h"
#include "conv_group_launch.h"
#include "conv_problem.h"
#include "device/tensor_math.cuh"
#include "launch.h"
#include "tile_plan.h"
#include "variants.h"

namespace inception_ext::kernels {
namespace {

TileBudget budget_of(const ConvGroupParams& params, const DeviceLimits& device) {
  const bool splits = params.counters != nullptr && params.partials != nullptr;
  return {element_bytes(params.dtype), device.multiprocessors, device.shared_bytes,
          splits ? kConvCounterBytes / static_cast<int64_t>(sizeof(int32_t)) : 0,
          splits ? kConvPartialBytes : 0};
}

}  // namespace

cudaError_t conv_group(const ConvGroupParams& params, cudaStream_t stream) {
  if (params.problems < 1 || params.problems > kMaxConvProblems) return cudaErrorInvalidValue;
  DeviceLimits device;
  const cudaError_t error = device_limits(device);
  if (error != cudaSuccess) return error;
  ConvGroupLaunch group{{}, {}, params.counters, params.partials};
  Gemm gemms[kMaxConvProblems];
  int64_t useful = 0;
  for (int i = 0; i < params.problems; ++i) {
    const ConvProblem& p = params.problem[i];
    if (!is_valid(p) || (p.max_pool && !is_plain(p))) return cudaErrorInvalidValue;
    group.problem[i] = p;
    gemms[i] = gemm_of(p, p.max_pool);
    useful += useful_macs(gemms[i]);
  }
  const bool scalar = is_scalar(params.dtype, params.exact, device);
  const int first_shape = scalar ? ScalarMath<float>::kFirstShape : 0;
  group.plan = plan_tiles(gemms, params.problems, first_shape, budget_of(params, device));
  if (group.plan.shape < 0) return cudaErrorNotSupported;
  if (group.plan.blocks == 0) return cudaSuccess;
  note_useful_macs(useful);
  return with_math<TensorMath, ScalarMath>(params.dtype, scalar, [&](auto math) {
    return run_conv_group<typename decltype(math)::Type>(group, stream);
  });
}

cudaError_t max_pooled_width(DType dtype, int32_t* width) {
  DeviceLimits device;
  const cudaError_t error = device_limits(device);
  if (error != cudaSuccess) return error;
  *width = widest_pool({element_bytes(dtype), device.multiprocessors, device.shared_bytes, 0, 0});
  return cudaSuccess;
}

}  // namespace inception_ext::kernels
