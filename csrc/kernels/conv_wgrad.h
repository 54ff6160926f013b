// Weight gradients of up to eight convolutions in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace inception_ext::kernels {

// What a convolution reads in the place of x.
enum class WgradPrologue : int32_t {
  kNone = 0,
  // relu((x - mean) * (gamma * rstd) + beta), rounded to dtype; padding is zero
  kBatchNormRelu = 1,
  // The 3x3 max pool of x (stride 1, padding 1); only for 1x1, stride 1
  kMaxPool = 2,
};

// Gradients of filters that lie in one tensor, from the filter on where the segment before it ends.
struct WgradSegment {
  void* dw;          // [filters, R, S, C], dtype or float32
  int64_t stride_k;  // elements from one filter to the next, and so on
  int64_t stride_r;
  int64_t stride_s;
  int64_t stride_c;
  int32_t filters;
  bool is_float32;  // else dtype
};

// dw[k, r, s, c] = sum over (n, p, q) of dy[n, p, q, k] * x[n, p * stride_h - padding_h + r,
//                                                          q * stride_w - padding_w + s, c]
struct WgradProblem {
  const void* dy;      // [N, P, Q, K], dtype
  const void* x;       // [N, H, W, C], dtype
  int64_t dy_stride;   // elements from one pixel to the next; rows and images follow without a gap
  int64_t x_stride;    // likewise
  const float* mean;   // [C], of kBatchNormRelu
  const float* rstd;   // [C]
  const float* gamma;  // [C]
  const float* beta;   // [C]
  int32_t batch;       // N
  int32_t input_h;     // H
  int32_t input_w;     // W
  int32_t channels;    // C
  int32_t output_h;    // P
  int32_t output_w;    // Q
  int32_t filters;     // K
  int32_t kernel_h;    // R
  int32_t kernel_w;    // S
  int32_t stride_h;
  int32_t stride_w;
  int32_t padding_h;
  int32_t padding_w;
  WgradPrologue prologue;
  int32_t segments;  // that hold the K filters
  WgradSegment segment[kMaxConvSegments];
};

struct ConvWgradParams {
  WgradProblem problem[kMaxConvProblems];
  int32_t problems;
  DType dtype;
  bool exact;         // float32 products in fp32; else on tensor cores, rounded to TF32
  int32_t* counters;  // kConvCounterBytes of zeros, left so; may be nullptr: one block sums a tile
  float* partials;    // kConvPartialBytes, for sums that are split and for long ones
};

// Problems that do not depend on one another; N = 0 gives zeros. cudaErrorInvalidValue: sizes that
// do not belong together; cudaErrorNotSupported: a max pool prologue over images wider than shared
// memory holds. What max_pooled_width (conv_group.h) allows, fits here as well.
cudaError_t conv_wgrad(const ConvWgradParams& params, cudaStream_t stream);

}  // namespace inception_ext::kernels
