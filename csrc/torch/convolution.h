// Convolutions of the CPU path: oneDNN's, called through torch's dispatcher, or Winograd's.
#pragma once

#include <array>
#include <tuple>

#include "torch/stable.h"

namespace inception_ext {

using torch::stable::Tensor;

// x [N, C, H, W], weight [K, C, R, R] -> [N, K, H, W]: stride 1, padding that keeps H and W.
Tensor convolution_same(const Tensor& x, const Tensor& weight);

struct ConvolutionGradients {
  Tensor input;   // undefined unless asked for
  Tensor weight;  // undefined unless asked for
};

// Gradients of convolution_same.
ConvolutionGradients convolution_same_backward(const Tensor& grad, const Tensor& x,
                                               const Tensor& weight, bool needs_input,
                                               bool needs_weight);

// A convolution's gradient in the layout of its weight, which is the one that autograd keeps.
Tensor in_layout_of(const Tensor& weight, const Tensor& gradient);

// Concatenation along dimension 0 ([K, C, 1, 1] weights of several 1x1 convolutions).
Tensor concatenate(const std::vector<Tensor>& tensors);

}  // namespace inception_ext
