// Every op's schema on one screen. The implementations register themselves in their own files.
// Tensor(a!) marks what an op writes to. All images are [N, C, H, W], channels_last inside.
//
// Batch norms: an empty list of running statistics, or None, is for training without. `affine`:
// whether weights and biases need gradients, which are [0] each otherwise. group_name, group_size:
// the process group whose processes share their statistics in training (CUDA only); 1: none does.
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

  // Average pool to y [N, C, output_size, output_size], CUDA only: windows of kernel_size, `stride`
  // apart, or adaptive ones where kernel_size is 0
  m.def("aux_pool_forward(Tensor x, int output_size, int kernel_size, int stride) -> Tensor");
  // -> gradient of x; input_size = [H, W] of x
  m.def("aux_pool_backward(Tensor grad, int[2] input_size, int kernel_size, int stride) -> Tensor");

  // -> y, mean [C], rstd [C]
  m.def(
      "batch_norm_relu_forward(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, bool training, float momentum, float eps, str group_name='', "
      "int group_size=1) -> (Tensor, Tensor, Tensor)");
  // -> gradients of x, weight, bias
  m.def(
      "batch_norm_relu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor rstd, bool training, bool affine=True, str group_name='', int group_size=1) "
      "-> (Tensor, Tensor, Tensor)");

  // Six convolutions in module order: branch1, branch2.0, branch2.1, branch3.0, branch3.1,
  // branch4.1. exact: CUDA multiplies float32 as such and not as TF32. -> out, then what the
  // backward needs (each [0] unless save): raw_1x1, raw_3x3, raw_5x5, raw_pool, reduced_3x3,
  // reduced_5x5, pooled (these three [0] on CUDA, whose kernels recompute them), argmax, mean, rstd
  m.def(
      "inception_forward(Tensor x, Tensor[] conv_weights, Tensor[] weights, Tensor[] biases, "
      "Tensor(a!)[] running_means, Tensor(b!)[] running_vars, bool training, float momentum, "
      "float eps, bool save, bool exact=True, str group_name='', int group_size=1) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // needs: x, then the six conv_weights -> gradients of x, conv_weights, weights, biases
  m.def(
      "inception_backward(Tensor grad, Tensor x, Tensor[] conv_weights, Tensor[] weights, "
      "Tensor[] biases, Tensor raw_1x1, Tensor raw_3x3, Tensor raw_5x5, Tensor raw_pool, "
      "Tensor reduced_3x3, Tensor reduced_5x5, Tensor pooled, Tensor argmax, Tensor mean, "
      "Tensor rstd, bool training, bool[] needs, bool exact=True, bool affine=True, "
      "str group_name='', int group_size=1) -> (Tensor, Tensor[], Tensor[], Tensor[])");

  // Weight gradients of up to 8 convolutions in one launch. Of problem i: grads[i] [N, K, P, Q] T;
  // x[i] [N, C, H, W] T, on load max pooled (3x3, stride 1, padding 1) where pools[i], or batch
  // normalised and rectified where batch_norms[i] is float32 [4, C] (mean, rstd, weight, bias) and
  // not [0]; strides, paddings (h, w); segments[i]: how many of `outputs` in turn share its K
  // filters, each [k, C, R, S], T or float32, in any strides. exact, workspace: as conv_group has
  // them
  m.def(
      "conv_wgrad(Tensor[] grads, Tensor[] x, Tensor[] batch_norms, int[] strides, "
      "int[] paddings, bool[] pools, int[] segments, bool exact, Tensor(a!)? workspace, "
      "Tensor(b!)[] outputs) -> ()");
  // One or two convolutions (square, `strides`, `paddings`), each with batch norm and ReLU behind
  // it, and a max pool where pool = [kernel, stride, padding, ceil mode]; CUDA only. -> y, then
  // what the backward needs (each [0] unless save): raw1, raw2 ([0] for one convolution), argmax
  // ([0] without pool), mean, rstd
  m.def(
      "conv_chain_forward(Tensor x, Tensor[] conv_weights, Tensor[] weights, Tensor[] biases, "
      "Tensor(a!)[] running_means, Tensor(b!)[] running_vars, int[] strides, int[] paddings, "
      "int[] pool, bool training, float momentum, float eps, bool save, bool exact=True, "
      "str group_name='', int group_size=1) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // needs: x (stride 1 only), then the conv_weights -> gradients of x, conv_weights, weights,
  // biases
  m.def(
      "conv_chain_backward(Tensor grad, Tensor x, Tensor[] conv_weights, Tensor[] weights, "
      "Tensor[] biases, Tensor raw1, Tensor raw2, Tensor argmax, Tensor mean, Tensor rstd, "
      "int[] strides, int[] paddings, int[] pool, bool training, bool[] needs, bool exact=True, "
      "bool affine=True, str group_name='', int group_size=1) "
      "-> (Tensor, Tensor[], Tensor[], Tensor[])");

  // Convolution 3x3, stride 1, padding 1, float32, on the CPU: weight [K, C, 3, 3] -> channels_last
  m.def("conv3x3_forward(Tensor x, Tensor weight) -> Tensor");
  // needs: x, weight -> their gradients, [0] where not needed
  m.def("conv3x3_backward(Tensor grad, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor)");

  // What the processes of a group exchange; implemented in Python (_process_group.py), and called
  // by the ops above. 0: there is no such group
  m.def("process_group_size(str group_name) -> int");
  // x [n] of every process, in the order of ranks -> all [size, n]
  m.def("gather_over_group(Tensor x, str group_name, Tensor(a!) all) -> ()");
  // parts, [n] altogether, one behind the other and added up over all processes -> sums [n]
  m.def("sum_over_group(Tensor[] parts, str group_name, Tensor(a!) sums) -> ()");

  // Inference: all write into tensors of the caller, who can plan their memory. T is float16,
  // bfloat16 or float32; x and the outputs are channels_last, or channel slices of such. exact:
  // float32 is multiplied as such and not as TF32.
  m.def(
      "max_pool_out(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
      "Tensor(a!) y) -> ()");
  // Up to 8 convolutions + bias + ReLU in one launch. Of problem i: x[i] [N, C, H, W] T, first max
  // pooled (3x3, stride 1, padding 1) where pools[i]; weights[i] [K, ceil8(R * S * C)] T, each row
  // a filter in (r, s, c) order, behind it zeros; biases[i] float32 [K]; kernel_sizes, strides,
  // paddings (h, w); segments[i]: how many of `outputs` in turn share its K channels.
  // workspace: uint8 [conv_group_workspace_bytes()], zero at first and zero again afterwards, or
  // None (no split-K)
  m.def(
      "conv_group(Tensor[] x, Tensor[] weights, Tensor[] biases, int[] kernel_sizes, "
      "int[] strides, int[] paddings, bool[] pools, bool[] relus, int[] segments, bool exact, "
      "Tensor(a!)? workspace, Tensor(b!)[] outputs) -> ()");
  m.def("conv_group_workspace_bytes() -> int");
  // max_pool(relu(conv(x * scale[c] + shift[c], weight, stride 2, padding 3) + bias), 3, 2, ceil):
  // x [N, 3, H, W] uint8 or float in any strides, weight packed [64, 152] T, y [N, 64, P, Q] T
  m.def(
      "stem_conv_pool(Tensor x, Tensor weight, Tensor bias, float[] scale, float[] shift, "
      "bool exact, Tensor(a!) y) -> ()");
  // max_pool(relu(conv3x3(relu(conv1x1(x)))), 3, 2, ceil): x [N, 64, H, W], weights packed
  // [64, 64] and [192, 576], y [N, 192, P, Q]
  m.def(
      "stem_conv_conv_pool(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
      "bool exact, Tensor(a!) y) -> ()");
  // Whether both fit into the shared memory of weight's device, computed in its dtype
  m.def("stem_fits(Tensor weight) -> bool");
  // x [N, C, H, W] -> y [N, C, 1, 1]
  m.def("global_avg_pool(Tensor x, Tensor(a!) y) -> ()");
  // Local response normalisation, as torch.nn.LocalResponseNorm
  m.def("lrn(Tensor x, int size, float alpha, float beta, float k, Tensor(a!) y) -> ()");
  // -> gradient of x
  m.def(
      "lrn_backward(Tensor grad, Tensor x, int size, float alpha, float beta, float k) -> Tensor");

  // A chain of steps of a frozen network, at most `images` images at a time: see frozen.cpp
  m.def(
      "frozen_forward(Tensor x, Tensor[] weights, Tensor[] biases, int[] plan, int images) "
      "-> Tensor");

  // y = x * scale[c] + shift[c], from uint8 or float, any strides, to channels_last
  m.def("image_to_nhwc(Tensor x, float[] scale, float[] shift, ScalarType dtype) -> Tensor");
  // Channels of x copied into channels [offset, offset + C) of y
  m.def("copy_channels(Tensor(a!) y, Tensor x, int offset) -> ()");
}
