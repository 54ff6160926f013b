// Average pools, on CUDA: the global one, and those of the auxiliary heads.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include "kernels/avg_pool.h"

#include <limits>
#include <vector>

#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"

namespace inception_ext {
namespace {

// Windows of a kernel size and a stride; kernel 0: adaptive ones.
struct AvgPoolWindow {
  void check(const char* op) const {
    constexpr int64_t largest = std::numeric_limits<int32_t>::max();
    if (kernel < 0 || kernel > largest) {
      fail(op, "kernel_size", "expected 1 to ", largest, ", or 0 for an adaptive pool, got ",
           kernel);
    }
    if (stride < 1 || stride > largest) {
      fail(op, "stride", "expected 1 to ", largest, ", got ", stride);
    }
  }

  // From `input` to `output` pixels; `argument` is to blame where that cannot be.
  kernels::AvgPoolAxis over(const char* op, const char* argument, int64_t input,
                            int64_t output) const {
    constexpr int64_t largest = 1 << 29;
    if (input < 1 || output < 1 || input > largest / output) {
      fail(op, argument,
           "expected at least one pixel, and input times output pixels of an axis to ",
           "be at most ", largest, ", got ", input, " and ", output);
    }
    if (kernel > 0 && (output - 1) * stride + kernel > input) {
      fail(op, argument, "expected at least ", (output - 1) * stride + kernel, " pixels for ",
           output, " windows of ", kernel, " with stride ", stride, ", got ", input);
    }
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    const bool adaptive = kernel == 0;
    return {.input = narrow(input),
            .output = narrow(output),
            .step = narrow(adaptive ? input : stride),
            .parts = narrow(adaptive ? output : 1),
            .length = narrow(adaptive ? input : kernel)};
  }

  int64_t kernel, stride;
};

using Launcher = cudaError_t (*)(const kernels::AvgPoolParams&, cudaStream_t);

// Runs one of the kernels, over windows from h.input x w.input to h.output x w.output pixels.
void run(const char* op, Launcher kernel, const kernels::AvgPoolAxis& h,
         const kernels::AvgPoolAxis& w, const char* from_name, const Tensor& from,
         const char* to_name, const Tensor& to) {
  const Tensor input = by_pixels(from);
  const Pixels source(input), target(to);
  const kernels::AvgPoolParams params{.from = source.data,
                                      .to = target.data,
                                      .from_stride = source.stride,
                                      .to_stride = target.stride,
                                      .batch = from.size(0),
                                      .channels = from.size(1),
                                      .h = h,
                                      .w = w,
                                      .dtype = kernel_dtype(from.scalar_type())};
  launch_kernels(op, {{from_name, input, Use::kRead}, {to_name, to, Use::kWrite}},
                 [&](cudaStream_t stream) { return kernel(params, stream); });
}

void global_avg_pool(Tensor x, Tensor y) {
  static constexpr const char* op = "global_avg_pool";
  check_cuda_activation({op, "x", x});
  check_cuda_output(op, x, y, {x.size(0), x.size(1), 1, 1});
  const AvgPoolWindow adaptive{0, 1};
  const kernels::AvgPoolAxis h = adaptive.over(op, "x", x.size(2), 1);
  const kernels::AvgPoolAxis w = adaptive.over(op, "x", x.size(3), 1);
  run(op, kernels::avg_pool_forward, h, w, "x", x, "y", y);
}

Tensor aux_pool_forward(Tensor x, int64_t output_size, int64_t kernel_size, int64_t stride) {
  static constexpr const char* op = "aux_pool_forward";
  check_cuda_activation({op, "x", x});
  const AvgPoolWindow window{kernel_size, stride};
  window.check(op);
  if (output_size < 1) fail(op, "output_size", "expected at least 1, got ", output_size);
  const kernels::AvgPoolAxis h = window.over(op, "x", x.size(2), output_size);
  const kernels::AvgPoolAxis w = window.over(op, "x", x.size(3), output_size);
  Tensor y = empty_nhwc(x, x.size(0), x.size(1), output_size, output_size);
  run(op, kernels::avg_pool_forward, h, w, "x", x, "y", y);
  return y;
}

Tensor aux_pool_backward(Tensor grad, std::vector<int64_t> input_size, int64_t kernel_size,
                         int64_t stride) {
  static constexpr const char* op = "aux_pool_backward";
  check_cuda_activation({op, "grad", grad});
  const AvgPoolWindow window{kernel_size, stride};
  window.check(op);
  if (input_size.size() != 2) {
    fail(op, "input_size", "expected 2 values, got ", input_size.size());
  }
  const auto axis = [&](int i) {
    return window.over(op, "input_size", input_size[i], grad.size(2 + i));
  };
  const kernels::AvgPoolAxis h = axis(0), w = axis(1);
  Tensor dx = empty_nhwc(grad, grad.size(0), grad.size(1), input_size[0], input_size[1]);
  run(op, kernels::avg_pool_backward, h, w, "grad", grad, "dx", dx);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("global_avg_pool", TORCH_BOX(&global_avg_pool));
  m.impl("aux_pool_forward", TORCH_BOX(&aux_pool_forward));
  m.impl("aux_pool_backward", TORCH_BOX(&aux_pool_backward));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
