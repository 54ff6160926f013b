// Max pooling as other ops use it; on the CPU in terms of pixel slices.
#pragma once

#include "cpu/max_pool.h"
#include "torch/nhwc.h"

namespace inception_ext {

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
