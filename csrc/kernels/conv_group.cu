#include "conv_group.h"
#include "conv_group_launch.h"
#include "device/tensor_math.cuh"
#include "launch.h"
#include "tile_plan.h"

namespace inception_ext::kernels {
namespace {

constexpr int64_t kMaxExtent = 1 << 30;  // of what kernels count in 32 bits, tiles included

int32_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether bf16 and TF32 products exist.
bool has_new_tensor_cores(const DeviceLimits& device) { return device.capability >= 80; }

bool is_exact(DType dtype, bool exact, const DeviceLimits& device) {
  return dtype == DType::kFloat16   ? false
         : dtype == DType::kFloat32 ? exact || !has_new_tensor_cores(device)
                                    : !has_new_tensor_cores(device);
}

bool takes(const ConvProblem& p) {
  const int64_t m = int64_t{p.batch} * p.output_h * p.output_w;
  const int64_t k = int64_t{p.kernel_h} * p.kernel_w * p.channels;
  int64_t channels = 0;
  if (p.segments < 1 || p.segments > kMaxConvSegments) return false;
  for (int i = 0; i < p.segments; ++i) channels += p.segment[i].channels;
  const bool sizes = p.batch >= 0 && p.input_h > 0 && p.input_w > 0 && p.channels > 0 &&
                     p.output_h > 0 && p.output_w > 0 && p.filters > 0 && channels == p.filters &&
                     m <= kMaxExtent && k <= kMaxExtent && p.filters <= kMaxExtent &&
                     int64_t{p.batch} * p.input_h * p.input_w <= kMaxExtent;
  const bool window = p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0 &&
                      p.padding_h >= 0 && p.padding_w >= 0 &&
                      p.input_h + 2 * p.padding_h <= kMaxConvSide &&
                      p.input_w + 2 * p.padding_w <= kMaxConvSide && p.kernel_h <= kMaxConvSide &&
                      p.kernel_w <= kMaxConvSide;
  const bool plain = p.kernel_h == 1 && p.kernel_w == 1 && p.stride_h == 1 && p.stride_w == 1 &&
                     p.padding_h == 0 && p.padding_w == 0;
  return sizes && window && (plain || !p.max_pool);
}

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
    if (!takes(p)) return cudaErrorInvalidValue;
    group.problem[i] = p;
    gemms[i] = {p.batch * p.output_h * p.output_w, p.filters, p.kernel_h * p.kernel_w * p.channels,
                p.max_pool ? p.input_w : 0};
    useful += int64_t{gemms[i].m} * gemms[i].n * gemms[i].k;
  }
  group.plan = plan_tiles(gemms, params.problems, budget_of(params, device));
  if (group.plan.shape < 0) return cudaErrorNotSupported;
  if (group.plan.blocks == 0) return cudaSuccess;
  note_useful_macs(useful);
  const bool exact = is_exact(params.dtype, params.exact, device);
  switch (params.dtype) {
    case DType::kFloat16:
      return run_conv_group<TensorMath<__half>>(group, stream);
    case DType::kBFloat16:
      return exact ? run_conv_group<ScalarMath<__nv_bfloat16>>(group, stream)
                   : run_conv_group<TensorMath<__nv_bfloat16>>(group, stream);
    case DType::kFloat32:
      return exact ? run_conv_group<ScalarMath<float>>(group, stream)
                   : run_conv_group<TensorMath<float>>(group, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t max_pooled_width(DType dtype, int32_t* width) {
  DeviceLimits device;
  const cudaError_t error = device_limits(device);
  if (error != cudaSuccess) return error;
  *width = widest_pool({element_bytes(dtype), device.multiprocessors, device.shared_bytes, 0, 0});
  return cudaSuccess;
}

}  // namespace inception_ext::kernels
