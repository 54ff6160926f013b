// A 3x3 convolution of its own, in float32 on the CPU: by Winograd where that is faster.
#include <tuple>
#include <vector>

#include "torch/checks.h"
#include "torch/convolution.h"
#include "torch/library.h"
#include "torch/nhwc.h"
#include "torch/no_grad.h"
#include "torch/stable.h"

namespace inception_ext {
namespace {

void check(const char* op, const Tensor& x, const Tensor& weight) {
  Argument{op, "x", x}.is_dense_of(/*cuda=*/false).has_dim(4).has_dtype({ScalarType::Float});
  const Argument argument{op, "weight", weight};
  argument.is_dense_of(/*cuda=*/false).has_dim(4).has_dtype({ScalarType::Float});
  argument.has_shape({weight.size(0), x.size(1), 3, 3});
  if (weight.size(0) < 1) fail(op, "weight", "expected at least one output channel, got 0");
  if (x.size(1) < 1 || x.size(2) < 1 || x.size(3) < 1) {
    fail(op, "x", "expected at least one channel, row and column, got ", shape_text(x));
  }
}

Tensor conv3x3_forward(Tensor x, Tensor weight) {
  const NoGrad no_grad;
  check("conv3x3_forward", x, weight);
  const Tensor input = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  return torch::stable::contiguous(convolution_same(input, weight), MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor> conv3x3_backward(Tensor grad, Tensor x, Tensor weight,
                                            std::vector<bool> needs) {
  static constexpr const char* op = "conv3x3_backward";
  const NoGrad no_grad;
  check(op, x, weight);
  Argument{op, "grad", grad}
      .is_dense_of(/*cuda=*/false)
      .has_shape({x.size(0), weight.size(0), x.size(2), x.size(3)})
      .has_dtype({ScalarType::Float});
  if (needs.size() != 2) fail(op, "needs", "expected 2 values, got ", needs.size());
  Tensor dx = empty_vector(x, 0, ScalarType::Float), dw = dx;
  if (needs[0] || needs[1]) {
    const ConvolutionGradients gradients = convolution_same_backward(
        torch::stable::contiguous(grad, MemoryFormat::ChannelsLast),
        torch::stable::contiguous(x, MemoryFormat::ChannelsLast), weight, needs[0], needs[1]);
    if (needs[0]) dx = torch::stable::contiguous(gradients.input, MemoryFormat::ChannelsLast);
    if (needs[1]) dw = in_layout_of(weight, gradients.weight);
  }
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CPU, m) {
  m.impl("conv3x3_forward", TORCH_BOX(&conv3x3_forward));
  m.impl("conv3x3_backward", TORCH_BOX(&conv3x3_backward));
}

}  // namespace inception_ext
