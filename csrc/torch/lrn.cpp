// Local response normalisation, on CUDA.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include "kernels/lrn.h"

#include <limits>

#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"

namespace inception_ext {
namespace {

kernels::LrnWindow checked_window(const char* op, int64_t size, double alpha, double beta,
                                  double k) {
  constexpr int64_t largest = std::numeric_limits<int32_t>::max();
  if (size < 1 || size > largest) {
    fail(op, "size", "expected 1 to ", largest, ", got ", size);
  }
  return {.size = static_cast<int32_t>(size),
          .alpha = static_cast<float>(alpha),
          .beta = static_cast<float>(beta),
          .k = static_cast<float>(k)};
}

void lrn(Tensor x, int64_t size, double alpha, double beta, double k, Tensor y) {
  static constexpr const char* op = "lrn";
  check_cuda_activation({op, "x", x});
  check_cuda_output(op, x, y, {x.size(0), x.size(1), x.size(2), x.size(3)});
  const kernels::LrnWindow window = checked_window(op, size, alpha, beta, k);
  const Tensor input = by_pixels(x);
  const Pixels from(input), to(y);
  const kernels::LrnForwardParams params{.x = from.data,
                                         .y = to.data,
                                         .x_stride = from.stride,
                                         .y_stride = to.stride,
                                         .pixels = from.count,
                                         .channels = from.channels,
                                         .window = window,
                                         .dtype = kernel_dtype(x.scalar_type())};
  launch_kernels(op, {{"x", input, Use::kRead}, {"y", y, Use::kWrite}},
                 [&](cudaStream_t stream) { return kernels::lrn_forward(params, stream); });
}

Tensor lrn_backward(Tensor grad, Tensor x, int64_t size, double alpha, double beta, double k) {
  static constexpr const char* op = "lrn_backward";
  check_cuda_activation({op, "x", x});
  Argument{op, "grad", grad}
      .is_dense_of(/*cuda=*/true)
      .has_shape({x.size(0), x.size(1), x.size(2), x.size(3)})
      .has_dtype({x.scalar_type()});
  const kernels::LrnWindow window = checked_window(op, size, alpha, beta, k);
  const Tensor gradient = by_pixels(grad), input = by_pixels(x);
  Tensor dx = empty_nhwc(x, x.size(0), x.size(1), x.size(2), x.size(3));
  const Pixels grad_y(gradient), from(input), grad_x(dx);
  const kernels::LrnBackwardParams params{.grad_y = grad_y.data,
                                          .x = from.data,
                                          .grad_x = grad_x.data,
                                          .grad_y_stride = grad_y.stride,
                                          .x_stride = from.stride,
                                          .grad_x_stride = grad_x.stride,
                                          .pixels = from.count,
                                          .channels = from.channels,
                                          .window = window,
                                          .dtype = kernel_dtype(x.scalar_type())};
  launch_kernels(
      op, {{"grad", gradient, Use::kRead}, {"x", input, Use::kRead}, {"dx", dx, Use::kWrite}},
      [&](cudaStream_t stream) { return kernels::lrn_backward(params, stream); });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("lrn", TORCH_BOX(&lrn));
  m.impl("lrn_backward", TORCH_BOX(&lrn_backward));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
