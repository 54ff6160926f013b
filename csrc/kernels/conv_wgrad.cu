#include "conv_problem.h"
#include "conv_wgrad.h"
#include "conv_wgrad_launch.h"
#include "device/pixel_math.cuh"
#include "launch.h"
#include "variants.h"
#include "wgrad_plan.h"

namespace inception_ext::kernels {
namespace {

// The convolution whose weights these are, without its memory.
ConvProblem convolution_of(const WgradProblem& p) {
  ConvProblem conv{.x_stride = p.x_stride,
                   .batch = p.batch,
                   .input_h = p.input_h,
                   .input_w = p.input_w,
                   .channels = p.channels,
                   .output_h = p.output_h,
                   .output_w = p.output_w,
                   .filters = p.filters,
                   .kernel_h = p.kernel_h,
                   .kernel_w = p.kernel_w,
                   .stride_h = p.stride_h,
                   .stride_w = p.stride_w,
                   .padding_h = p.padding_h,
                   .padding_w = p.padding_w,
                   .segments = p.segments};
  for (int i = 0; i < p.segments && i < kMaxConvSegments; ++i) {
    conv.segment[i].channels = p.segment[i].filters;
  }
  return conv;
}

TileBudget budget_of(const ConvWgradParams& params, const DeviceLimits& device) {
  return {element_bytes(params.dtype), device.multiprocessors, device.shared_bytes,
          params.counters ? kConvCounterBytes / static_cast<int64_t>(sizeof(int32_t)) : 0,
          kConvPartialBytes};
}

}  // namespace

cudaError_t conv_wgrad(const ConvWgradParams& params, cudaStream_t stream) {
  if (params.problems < 1 || params.problems > kMaxConvProblems || params.partials == nullptr) {
    return cudaErrorInvalidValue;
  }
  DeviceLimits device;
  const cudaError_t error = device_limits(device);
  if (error != cudaSuccess) return error;
  ConvWgradLaunch group{{}, {}, params.counters, params.partials};
  WgradGemm gemms[kMaxConvProblems];
  int64_t useful = 0;
  for (int i = 0; i < params.problems; ++i) {
    const WgradProblem& p = params.problem[i];
    const ConvProblem conv = convolution_of(p);
    const bool pools = p.prologue == WgradPrologue::kMaxPool;
    if (!is_valid(conv) || (pools && !is_plain(conv))) return cudaErrorInvalidValue;
    group.problem[i] = p;
    const Gemm gemm = gemm_of(conv, pools);
    gemms[i] = {gemm.k, gemm.n, gemm.m, gemm.pool_width,
                p.prologue == WgradPrologue::kBatchNormRelu};
    useful += useful_macs(gemm);
  }
  const bool scalar = is_scalar(params.dtype, params.exact, device);
  const int first_shape = scalar ? PixelScalarMath<float>::kFirstShape : 0;
  group.plan = plan_wgrad(gemms, params.problems, first_shape, budget_of(params, device));
  if (group.plan.shape < 0) return cudaErrorNotSupported;
  note_useful_macs(useful);
  return with_math<PixelTensorMath, PixelScalarMath>(params.dtype, scalar, [&](auto math) {
    return run_conv_wgrad<typename decltype(math)::Type>(group, stream);
  });
}

}  // namespace inception_ext::kernels
