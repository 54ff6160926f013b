// conv_group on the CUDA kernels: lists of tensors to ConvGroupParams.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include "kernels/conv_group.h"

#include <optional>
#include <string>
#include <vector>

#include "torch/conv_lists.h"
#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"
#include "torch/max_pool.h"
#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {
namespace {

constexpr const char* kOp = "conv_group";

// Everything that problem i is made of.
kernels::ConvProblem make_problem(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                  Pair kernel, Pair stride, Pair padding, bool pool, bool relu,
                                  const Tensor* outputs, int64_t segments, size_t i) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t row = (kernel.h * kernel.w * c + 7) / 8 * 8;
  const int64_t p =
      window_positions(kOp, item("kernel_sizes", i), h, kernel.h, stride.h, padding.h);
  const int64_t q =
      window_positions(kOp, item("kernel_sizes", i), w, kernel.w, stride.w, padding.w);
  const std::string weight_name = item("weights", i), bias_name = item("biases", i);
  const Argument weight_argument{kOp, weight_name.c_str(), weight};
  weight_argument.is_dense_of(true).has_dim(2).has_dtype({x.scalar_type()});
  weight_argument.has_shape({weight.size(0), row});
  if (weight.size(0) < 1) {
    fail(kOp, weight_name.c_str(), "expected at least one filter, got shape ", shape_text(weight));
  }
  if (!weight.is_contiguous() || reinterpret_cast<uintptr_t>(weight.data_ptr()) % 16 != 0) {
    fail(kOp, weight_name.c_str(), "expected a contiguous tensor at a multiple of 16 bytes");
  }
  Argument{kOp, bias_name.c_str(), bias}
      .is_dense_of(true)
      .has_shape({weight.size(0)})
      .has_dtype({ScalarType::Float});
  if (!bias.is_contiguous()) fail(kOp, bias_name.c_str(), "expected a contiguous tensor");
  if (pool) check_pooled(kOp, i, kernel, stride, padding);
  kernels::ConvProblem problem{.x = x.data_ptr(),
                               .weight = weight.data_ptr(),
                               .bias = static_cast<const float*>(bias.data_ptr()),
                               .x_stride = Pixels(x).stride,
                               .batch = static_cast<int32_t>(n),
                               .input_h = static_cast<int32_t>(h),
                               .input_w = static_cast<int32_t>(w),
                               .channels = static_cast<int32_t>(c),
                               .output_h = static_cast<int32_t>(p),
                               .output_w = static_cast<int32_t>(q),
                               .filters = static_cast<int32_t>(weight.size(0)),
                               .kernel_h = static_cast<int32_t>(kernel.h),
                               .kernel_w = static_cast<int32_t>(kernel.w),
                               .stride_h = static_cast<int32_t>(stride.h),
                               .stride_w = static_cast<int32_t>(stride.w),
                               .padding_h = static_cast<int32_t>(padding.h),
                               .padding_w = static_cast<int32_t>(padding.w),
                               .max_pool = pool,
                               .relu = relu,
                               .segments = static_cast<int32_t>(segments),
                               .segment = {}};
  int64_t filters = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const Tensor& y = outputs[s];
    const std::string name = item("outputs of problem ", i);
    Argument{kOp, name.c_str(), y}.is_dense_of(true).has_dim(4).has_dtype({x.scalar_type()});
    Argument{kOp, name.c_str(), y}.has_shape({n, y.size(1), p, q});
    if (y.numel() && !pixel_stride(y)) {
      fail(kOp, name.c_str(), "expected a channels_last tensor, got other strides");
    }
    problem.segment[s] = {y.data_ptr(), Pixels(y).stride, static_cast<int32_t>(y.size(1))};
    filters += y.size(1);
  }
  if (filters != weight.size(0)) {
    fail(kOp, item("outputs of problem ", i).c_str(), "expected ", weight.size(0),
         " channels together, got ", filters);
  }
  return problem;
}

void conv_group(Tensors x, Tensors weights, Tensors biases, Integers kernel_sizes, Integers strides,
                Integers paddings, std::vector<bool> pools, std::vector<bool> relus,
                Integers segments, bool exact, std::optional<Tensor> workspace, Tensors outputs) {
  const size_t count = problem_count(kOp, x);
  check_length(kOp, "weights", weights.size(), count);
  check_length(kOp, "biases", biases.size(), count);
  check_length(kOp, "kernel_sizes", kernel_sizes.size(), 2 * count);
  check_length(kOp, "strides", strides.size(), 2 * count);
  check_length(kOp, "paddings", paddings.size(), 2 * count);
  check_length(kOp, "pools", pools.size(), count);
  check_length(kOp, "relus", relus.size(), count);
  check_length(kOp, "segments", segments.size(), count);
  Argument{kOp, "x[0]", x[0]}.has_dtype(
      {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});

  kernels::ConvGroupParams params{.problem = {},
                                  .problems = static_cast<int32_t>(count),
                                  .dtype = kernel_dtype(x[0].scalar_type()),
                                  .exact = exact,
                                  .counters = nullptr,
                                  .partials = nullptr};
  Tensors inputs;
  size_t used = 0;
  for (size_t i = 0; i < count; ++i) {
    check_images(kOp, "x", i, x[i], x[0].scalar_type());
    const Tensor* parts = take_outputs(kOp, segments, i, outputs, used);
    bool pool = pools[i];
    inputs.push_back(pooled_where_wide(kOp, by_pixels(x[i]), pool));
    params.problem[i] = make_problem(
        inputs[i], weights[i], biases[i], pair_of(kOp, "kernel_sizes", kernel_sizes, i, 1),
        pair_of(kOp, "strides", strides, i, 1), pair_of(kOp, "paddings", paddings, i, 0), pool,
        relus[i], parts, segments[i], i);
  }
  check_length(kOp, "outputs", outputs.size(), used);

  std::vector<Operand> operands;
  for (size_t i = 0; i < count; ++i) {
    operands.push_back({"x", inputs[i], Use::kRead});
    operands.push_back({"weight", weights[i], Use::kRead});
    operands.push_back({"bias", biases[i], Use::kRead});
  }
  for (const Tensor& y : outputs) operands.push_back({"y", y, Use::kWrite});
  const SplitMemory memory = split_memory(kOp, workspace);
  if (memory.counters) {
    params.counters = static_cast<int32_t*>(memory.counters->data_ptr());
    params.partials = static_cast<float*>(memory.partials->data_ptr());
    operands.push_back({"counters", *memory.counters, Use::kUpdate});
    operands.push_back({"partials", *memory.partials, Use::kScratch});
  }
  launch_kernels(kOp, operands,
                 [&](cudaStream_t stream) { return kernels::conv_group(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("conv_group", TORCH_BOX(&conv_group));
}

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CompositeExplicitAutograd, m) {
  m.impl("conv_group_workspace_bytes", TORCH_BOX(&conv_group_workspace_bytes));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
