// Every op's schema on one screen. The implementations register themselves in their own files.
// Tensor(a!) marks what an op writes to. All images are [N, C, H, W], channels_last inside.
#include "torch/library.h"

STABLE_TORCH_LIBRARY(INCEPTION_EXT_OPS, m) {
  // -> y, argmax: uint8 window index [N, C, OH, OW], or [0] without_argmax
  m.def(
      "max_pool_forward(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, "
      "bool ceil_mode, bool with_argmax) -> (Tensor, Tensor)");
  // -> gradient of x; input_size = [H, W] of x
  m.def(
      "max_pool_backward(Tensor grad, Tensor argmax, int[2] input_size, int[2] kernel_size, "
      "int[2] stride, int[2] padding) -> Tensor");

  // -> y, mean [C], rstd [C]
  m.def(
      "batch_norm_relu_forward(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, bool training, float momentum, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  // -> gradients of x, weight, bias
  m.def(
      "batch_norm_relu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor rstd, bool training) -> (Tensor, Tensor, Tensor)");

  // Six convolutions in module order: branch1, branch2.0, branch2.1, branch3.0, branch3.1,
  // branch4.1. -> out, then what the backward needs (each [0] unless save):
  // raw_1x1, raw_3x3, raw_5x5, raw_pool, reduced_3x3, reduced_5x5, pooled, argmax, mean, rstd
  m.def(
      "inception_forward(Tensor x, Tensor[] conv_weights, Tensor[] weights, Tensor[] biases, "
      "Tensor(a!)[] running_means, Tensor(b!)[] running_vars, bool training, float momentum, "
      "float eps, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  // needs: x, then the six conv_weights -> gradients of x, conv_weights, weights, biases
  m.def(
      "inception_backward(Tensor grad, Tensor x, Tensor[] conv_weights, Tensor[] weights, "
      "Tensor[] biases, Tensor raw_1x1, Tensor raw_3x3, Tensor raw_5x5, Tensor raw_pool, "
      "Tensor reduced_3x3, Tensor reduced_5x5, Tensor pooled, Tensor argmax, Tensor mean, "
      "Tensor rstd, bool training, bool[] needs) -> (Tensor, Tensor[], Tensor[], Tensor[])");

  // y = x * scale[c] + shift[c], from uint8 or float, any strides, to channels_last
  m.def("image_to_nhwc(Tensor x, float[] scale, float[] shift, ScalarType dtype) -> Tensor");
  // Channels of x copied into channels [offset, offset + C) of y
  m.def("copy_channels(Tensor(a!) y, Tensor x, int offset) -> ()");
}
