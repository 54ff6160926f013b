// Max pooling as other ops use it; on the CPU in terms of pixel slices.
#pragma once

#include <vector>

#include "cpu/max_pool.h"
#include "torch/nhwc.h"

namespace inception_ext {

struct MaxPoolWindow {
  // Throws where torch would, or where the kernels have none.
  void check(const char* op, bool cuda) const;
  // Of a pool over [n, c, h, w]; throws where the output would be empty.
  cpu::MaxPoolShape over(const char* op, int64_t n, int64_t c, int64_t h, int64_t w) const;

  std::vector<int64_t> kernel, stride, padding;  // height, width
  bool ceil_mode;
};

// The 3x3, stride 1, padding 1 window of the pool-projection branch over [N, C, H, W].
cpu::MaxPoolShape same_size_pool(const Tensor& x);

// y = max pool of x; argmax may be nullptr.
void max_pool_pixels(const cpu::MaxPoolShape& shape, const Pixels& x, const Pixels& y,
                     uint8_t* argmax, ScalarType dtype);

// dx = gradient, or dx += gradient.
void max_pool_backward_pixels(const cpu::MaxPoolShape& shape, const Pixels& grad,
                              const uint8_t* argmax, const Pixels& dx, bool accumulate,
                              ScalarType dtype);

// The same forward, by the CUDA kernel.
Tensor same_size_max_pool_cuda(const char* op, const Tensor& x);

}  // namespace inception_ext
