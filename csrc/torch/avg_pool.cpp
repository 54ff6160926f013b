// Global average pool, on CUDA.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include "kernels/avg_pool.h"

#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"

namespace inception_ext {
namespace {

void global_avg_pool(Tensor x, Tensor y) {
  static constexpr const char* op = "global_avg_pool";
  check_cuda_activation({op, "x", x});
  check_cuda_output(op, x, y, {x.size(0), x.size(1), 1, 1});
  if (x.size(2) * x.size(3) == 0) {
    fail(op, "x", "expected at least one pixel, got shape ", shape_text(x));
  }
  const Tensor input = by_pixels(x);
  const Pixels from(input), to(y);
  const kernels::GlobalAvgPoolParams params{.x = from.data,
                                            .y = to.data,
                                            .x_stride = from.stride,
                                            .y_stride = to.stride,
                                            .batch = x.size(0),
                                            .pixels = x.size(2) * x.size(3),
                                            .channels = x.size(1),
                                            .dtype = kernel_dtype(x.scalar_type())};
  launch_kernels(op, {{"x", input, Use::kRead}, {"y", y, Use::kWrite}},
                 [&](cudaStream_t stream) { return kernels::global_avg_pool(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("global_avg_pool", TORCH_BOX(&global_avg_pool));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
