// What the launchers of implicit GEMMs know about a convolution: plain C++.
#pragma once

#include <cstdint>

#include "launch.h"
#include "params.h"
#include "tile_plan.h"

namespace inception_ext::kernels {

inline int32_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether products run on the scalar units (device/tensor_math.cuh): sm_75 has tensor cores for
// fp16 alone.
inline bool is_scalar(DType dtype, bool exact, const DeviceLimits& device) {
  if (dtype == DType::kFloat16) return false;
  return device.capability < 80 || (exact && dtype == DType::kFloat32);
}

// Sizes that belong together, and that the kernels count in 32 bits.
inline bool is_valid(const ConvProblem& p) {
  constexpr int64_t kMaxExtent = 1 << 30;
  const int64_t m = int64_t{p.batch} * p.output_h * p.output_w;
  const int64_t k = int64_t{p.kernel_h} * p.kernel_w * p.channels;
  int64_t channels = 0;
  if (p.segments < 1 || p.segments > kMaxConvSegments) return false;
  for (int i = 0; i < p.segments; ++i) channels += p.segment[i].channels;
  const bool sizes = p.batch >= 0 && p.input_h > 0 && p.input_w > 0 && p.channels > 0 &&
                     p.output_h > 0 && p.output_w > 0 && p.filters > 0 && channels == p.filters &&
                     m <= kMaxExtent && k <= kMaxExtent && p.filters <= kMaxExtent &&
                     int64_t{p.batch} * p.input_h * p.input_w <= kMaxExtent;
  return sizes && p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0 &&
         p.padding_h >= 0 && p.padding_w >= 0 && p.input_h + 2 * p.padding_h <= kMaxConvSide &&
         p.input_w + 2 * p.padding_w <= kMaxConvSide && p.kernel_h <= kMaxConvSide &&
         p.kernel_w <= kMaxConvSide;
}

// What a max pool prologue can stand before.
inline bool is_plain(const ConvProblem& p) {
  return p.kernel_h == 1 && p.kernel_w == 1 && p.stride_h == 1 && p.stride_w == 1 &&
         p.padding_h == 0 && p.padding_w == 0;
}

inline Gemm gemm_of(const ConvProblem& p, bool max_pool) {
  return {p.batch * p.output_h * p.output_w, p.filters, p.kernel_h * p.kernel_w * p.channels,
          max_pool ? p.input_w : 0};
}

inline int64_t useful_macs(const Gemm& gemm) { return int64_t{gemm.m} * gemm.n * gemm.k; }

}  // namespace inception_ext::kernels
