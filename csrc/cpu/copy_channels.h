// Copies between channel slices, and the conversion of images to the layout of the network.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace inception_ext::cpu {

struct CopyChannelsParams {
  const void* x;     // [P, C], dtype
  int64_t x_stride;  // elements from pixel to pixel, >= C
  void* y;           // [P, C], dtype; does not overlap x
  int64_t y_stride;  // >= C
  DType dtype;       // any
  int64_t pixels;    // P
  int64_t channels;  // C
  ParallelFor parallel;
};

void copy_channels(const CopyChannelsParams& params);

// The same with y = max(x, 0), where NaN stays NaN; dtype kFloat32 or kBFloat16. y may be x.
void relu_channels(const CopyChannelsParams& params);

struct ImageToNhwcParams {
  const void* x;  // [N, C, H, W] at n * x_stride_n + c * x_stride_c + h * x_stride_h + w * ..._w
  DType x_dtype;  // kUInt8, kFloat32 or kBFloat16
  int64_t x_stride_n;
  int64_t x_stride_c;
  int64_t x_stride_h;
  int64_t x_stride_w;
  void* y;           // [N, H, W, C]
  DType y_dtype;     // kFloat32 or kBFloat16
  int64_t y_stride;  // elements from pixel to pixel, >= C
  int64_t n;
  int64_t c;
  int64_t h;
  int64_t w;
  const float* scale;  // [C], may be nullptr: 1
  const float* shift;  // [C], may be nullptr: 0
  ParallelFor parallel;
};

// y = x * scale[c] + shift[c] in float32, rounded once to y_dtype. Product and sum round
// separately on every Isa, so that the result equals that of the same two operations in torch.
void image_to_nhwc(const ImageToNhwcParams& params);

}  // namespace inception_ext::cpu
