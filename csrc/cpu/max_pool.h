// Max pooling over NHWC tensors, forward and backward.
//
// Window (oh, ow) covers input rows oh * stride_h - padding_h + kh, kh < kernel_h, and columns
// likewise; positions outside the input do not take part. Values compare as torch compares them:
// the first maximum in row-major order wins, and a NaN wins over everything before it, so the last
// NaN of a window is its maximum.
//
// Every activation is a channel slice of an NHWC tensor that may be wider: a pointer to the
// slice's first element, and the number of elements from one pixel to the next (stride >= C); rows
// and images follow one another without a gap. No element outside the slice is read or written.
// Pointers need only the alignment of their element. Results do not depend on the number of
// threads.
//
// Preconditions, not checked: valid pointers; output and input do not overlap; the output size is
// that of torch's rules, so that every window holds at least one input element
// (padding <= kernel / 2, no window starts past the input); kernel_h * kernel_w <= 255. An empty
// output (N, C, out_h or out_w = 0) is left alone.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace inception_ext::cpu {

struct MaxPoolShape {
  int64_t n;      // images
  int64_t h;      // input rows
  int64_t w;      // input columns
  int64_t c;      // channels
  int64_t out_h;  // output rows
  int64_t out_w;  // output columns
  int64_t kernel_h;
  int64_t kernel_w;
  int64_t stride_h;
  int64_t stride_w;
  int64_t padding_h;
  int64_t padding_w;
};

struct MaxPoolForwardParams {
  MaxPoolShape shape;
  const void* x;     // [N, H, W, C], dtype
  int64_t x_stride;  // elements from pixel to pixel
  void* y;           // [N, OH, OW, C], dtype
  int64_t y_stride;
  uint8_t* argmax;  // [N, OH, OW, C] dense: kh * kernel_w + kw of the maximum; may be nullptr
  DType dtype;      // kFloat32 or kBFloat16
  ParallelFor parallel;
};

void max_pool_forward(const MaxPoolForwardParams& params);

struct MaxPoolBackwardParams {
  MaxPoolShape shape;
  const void* dy;  // [N, OH, OW, C], dtype
  int64_t dy_stride;
  const uint8_t* argmax;  // [N, OH, OW, C] dense, as written by max_pool_forward
  void* dx;               // [N, H, W, C], dtype
  int64_t dx_stride;
  bool accumulate;  // dx += gradient, else dx = gradient
  DType dtype;      // kFloat32 or kBFloat16
  ParallelFor parallel;
};

// Gathers: each dx element sums, in float32 and in row-major order of the windows, the dy of the
// windows whose maximum it is. With `accumulate` the old dx is added to that sum, and the result
// rounded once. Writes every element of the dx slice, those under no window included; an empty
// output (out_h or out_w = 0) is a gradient of zero.
void max_pool_backward(const MaxPoolBackwardParams& params);

}  // namespace inception_ext::cpu
