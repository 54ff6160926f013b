// 3x3 convolutions of stride 1 and padding 1 in training by Winograd's F(4x4, 3x3): a quarter of
// the multiplications. The transforms are ours (cpu/winograd.h), the products aten::bmm's.
#pragma once

#include "torch/stable.h"

namespace inception_ext {

using torch::stable::Tensor;

// Whether it is faster for a batch [n, C, h, w] and a weight [K, C, R, S] of this dtype.
bool winograd_pays(const Tensor& weight, int64_t n, int64_t h, int64_t w);

// x [N, C, H, W], weight [K, C, 3, 3] -> [N, K, H, W], float32.
Tensor winograd_convolution(const Tensor& x, const Tensor& weight);

// grad [N, K, H, W], weight [K, C, 3, 3] -> [N, C, H, W], float32: the gradient of its input.
Tensor winograd_dgrad(const Tensor& grad, const Tensor& weight);

}  // namespace inception_ext
