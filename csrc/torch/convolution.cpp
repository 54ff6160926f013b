#include "torch/convolution.h"

#include <vector>

#include "torch/nhwc.h"
#include "torch/winograd.h"

namespace inception_ext {
namespace {

using torch::headeronly::HeaderOnlyArrayRef;
using torch::stable::detail::from;
using torch::stable::detail::to;

StableIValue both(int64_t value) { return from(std::vector<int64_t>{value, value}); }

void call(const char* op, StableIValue* stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION));
}

}  // namespace

Tensor convolution_same(const Tensor& x, const Tensor& weight) {
  if (winograd_pays(weight, x.size(0), x.size(2), x.size(3))) {
    return winograd_convolution(x, weight);
  }
  const int64_t padding = weight.size(2) / 2;
  std::array<StableIValue, 9> stack{from(x),     from(weight),  from(std::nullopt),
                                    both(1),     both(padding), both(1),
                                    from(false), both(0),       from(int64_t{1})};
  call("aten::convolution", stack.data());
  return to<Tensor>(stack[0]);
}

ConvolutionGradients convolution_same_backward(const Tensor& grad, const Tensor& x,
                                               const Tensor& weight, bool needs_input,
                                               bool needs_weight) {
  if (needs_input && winograd_pays(weight, x.size(0), x.size(2), x.size(3))) {
    ConvolutionGradients gradients{winograd_dgrad(grad, weight), Tensor()};
    if (needs_weight) {
      gradients.weight = convolution_same_backward(grad, x, weight, false, true).weight;
    }
    return gradients;
  }
  const int64_t padding = weight.size(2) / 2;
  const bool mask[] = {needs_input, needs_weight, false};
  std::array<StableIValue, 11> stack{from(grad),
                                     from(x),
                                     from(weight),
                                     from(std::nullopt),
                                     both(1),
                                     both(padding),
                                     both(1),
                                     from(false),
                                     both(0),
                                     from(int64_t{1}),
                                     from(HeaderOnlyArrayRef<bool>(mask, 3))};
  call("aten::convolution_backward", stack.data());
  ConvolutionGradients gradients{to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  Tensor bias = to<Tensor>(stack[2]);  // takes the handle, so that it is freed
  return gradients;
}

Tensor in_layout_of(const Tensor& weight, const Tensor& gradient) {
  const bool is_nhwc = !weight.is_contiguous() && pixel_stride(weight) == weight.size(1);
  return torch::stable::contiguous(gradient,
                                   is_nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor concatenate(const std::vector<Tensor>& tensors) {
  std::array<StableIValue, 2> stack{from(tensors), from(int64_t{0})};
  call("aten::cat", stack.data());
  return to<Tensor>(stack[0]);
}

}  // namespace inception_ext
