// Local response normalisation, on CUDA.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include "kernels/lrn.h"

#include <limits>

#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"

namespace inception_ext {
namespace {

void lrn(Tensor x, int64_t size, double alpha, double beta, double k, Tensor y) {
  static constexpr const char* op = "lrn";
  constexpr int64_t largest = std::numeric_limits<int32_t>::max();
  check_cuda_activation({op, "x", x});
  check_cuda_output(op, x, y, {x.size(0), x.size(1), x.size(2), x.size(3)});
  if (size < 1 || size > largest) {
    fail(op, "size", "expected 1 to ", largest, ", got ", size);
  }
  const Tensor input = by_pixels(x);
  const Pixels from(input), to(y);
  const kernels::LrnParams params{.x = from.data,
                                  .y = to.data,
                                  .x_stride = from.stride,
                                  .y_stride = to.stride,
                                  .pixels = from.count,
                                  .channels = from.channels,
                                  .size = static_cast<int32_t>(size),
                                  .alpha = static_cast<float>(alpha),
                                  .beta = static_cast<float>(beta),
                                  .k = static_cast<float>(k),
                                  .dtype = kernel_dtype(x.scalar_type())};
  launch_kernels(op, {{"x", input, Use::kRead}, {"y", y, Use::kWrite}},
                 [&](cudaStream_t stream) { return kernels::lrn_forward(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("lrn", TORCH_BOX(&lrn));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
