// conv_group on the CUDA kernels: lists of tensors to ConvGroupParams.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include "kernels/conv_group.h"

#include <optional>
#include <string>
#include <vector>

#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"
#include "torch/max_pool.h"
#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {
namespace {

using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "conv_group";

std::string item(const char* list, size_t i) {
  std::string text(list);
  text.append("[").append(std::to_string(i)).append("]");
  return text;
}

void check_length(const char* name, size_t got, size_t expected) {
  if (got != expected) fail(kOp, name, "expected ", expected, " entries, got ", got);
}

// Height and width of problem i.
struct Pair {
  int64_t h, w;
};
Pair pair_of(const char* name, const Integers& values, size_t i, int64_t least) {
  constexpr int64_t kLargest = kernels::kMaxConvSide / 4;
  const Pair pair{values[2 * i], values[2 * i + 1]};
  for (int64_t value : {pair.h, pair.w}) {
    if (value < least || value > kLargest) {
      fail(kOp, item(name, i).c_str(), "expected ", least, " to ", kLargest, ", got ", value);
    }
  }
  return pair;
}

int64_t output_size(int64_t input, int64_t kernel, int64_t stride, int64_t padding, size_t i) {
  const int64_t span = input + 2 * padding - kernel;
  if (span < 0) {
    fail(kOp, item("kernel_sizes", i).c_str(), "expected at most ", input + 2 * padding,
         " for an input of ", input, " with padding ", padding, ", got ", kernel);
  }
  return span / stride + 1;
}

void check_x(const Tensor& x, const Tensor& first, size_t i) {
  const std::string name = item("x", i);
  Argument{kOp, name.c_str(), x}
      .is_dense_of(/*cuda=*/true)
      .has_dim(4)
      .has_dtype({first.scalar_type()});
  constexpr int64_t kLargest = kernels::kMaxConvSide / 2;
  for (int d = 1; d < 4; ++d) {
    if (x.size(d) < 1 || (d > 1 && x.size(d) > kLargest)) {
      fail(kOp, name.c_str(),
           "expected channels, height and width of at least 1, images of at most ", kLargest,
           " pixels a side, got shape ", shape_text(x));
    }
  }
  constexpr int64_t kLargestPixels = 1 << 30;
  if (x.size(0) * x.size(2) * x.size(3) > kLargestPixels || x.size(1) > kLargestPixels) {
    fail(kOp, name.c_str(), "expected at most 2^30 pixels and channels, got shape ", shape_text(x));
  }
}

// The widest images that the max pool prologue takes; a kernel of its own pools wider ones.
int32_t max_pooled_width(const Tensor& x) {
  const OnDeviceOf guard(x);
  int32_t width = 0;
  const cudaError_t error = kernels::max_pooled_width(kernel_dtype(x.scalar_type()), &width);
  if (error != cudaSuccess) fail(kOp, "device", "cudaError_t ", static_cast<int>(error));
  return width;
}

// Everything that problem i is made of.
kernels::ConvProblem make_problem(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                  Pair kernel, Pair stride, Pair padding, bool pool, bool relu,
                                  const Tensor* outputs, int64_t segments, size_t i) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t row = (kernel.h * kernel.w * c + 7) / 8 * 8;
  const int64_t p = output_size(h, kernel.h, stride.h, padding.h, i);
  const int64_t q = output_size(w, kernel.w, stride.w, padding.w, i);
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
  const bool plain = kernel.h == 1 && kernel.w == 1 && stride.h == 1 && stride.w == 1 &&
                     padding.h == 0 && padding.w == 0;
  if (pool && !plain) {
    fail(kOp, item("pools", i).c_str(), "expected false unless kernel 1x1, stride 1, padding 0");
  }
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

int64_t conv_group_workspace_bytes() {
  return kernels::kConvCounterBytes + kernels::kConvPartialBytes;
}

void conv_group(Tensors x, Tensors weights, Tensors biases, Integers kernel_sizes, Integers strides,
                Integers paddings, std::vector<bool> pools, std::vector<bool> relus,
                Integers segments, bool exact, std::optional<Tensor> workspace, Tensors outputs) {
  const size_t count = x.size();
  if (count < 1 || count > kernels::kMaxConvProblems) {
    fail(kOp, "x", "expected 1 to ", kernels::kMaxConvProblems, " tensors, got ", count);
  }
  check_length("weights", weights.size(), count);
  check_length("biases", biases.size(), count);
  check_length("kernel_sizes", kernel_sizes.size(), 2 * count);
  check_length("strides", strides.size(), 2 * count);
  check_length("paddings", paddings.size(), 2 * count);
  check_length("pools", pools.size(), count);
  check_length("relus", relus.size(), count);
  check_length("segments", segments.size(), count);
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
    check_x(x[i], x[0], i);
    if (segments[i] < 1 || segments[i] > kernels::kMaxConvSegments) {
      fail(kOp, item("segments", i).c_str(), "expected 1 to ", kernels::kMaxConvSegments, ", got ",
           segments[i]);
    }
    const auto last = used + static_cast<size_t>(segments[i]);
    if (last > outputs.size()) {
      fail(kOp, "outputs", "expected as many tensors as all segments, got ", outputs.size());
    }
    inputs.push_back(by_pixels(x[i]));
    bool pool = pools[i];
    if (pool && x[i].numel() > 0 && x[i].size(3) > max_pooled_width(x[i])) {
      inputs[i] = same_size_max_pool_cuda(kOp, inputs[i]);
      pool = false;
    }
    params.problem[i] =
        make_problem(inputs[i], weights[i], biases[i], pair_of("kernel_sizes", kernel_sizes, i, 1),
                     pair_of("strides", strides, i, 1), pair_of("paddings", paddings, i, 0), pool,
                     relus[i], &outputs[used], segments[i], i);
    used = last;
  }
  check_length("outputs", outputs.size(), used);

  std::vector<Operand> operands;
  for (size_t i = 0; i < count; ++i) {
    operands.push_back({"x", inputs[i], Use::kRead});
    operands.push_back({"weight", weights[i], Use::kRead});
    operands.push_back({"bias", biases[i], Use::kRead});
  }
  for (const Tensor& y : outputs) operands.push_back({"y", y, Use::kWrite});
  Tensor counters, partials;
  if (workspace) {
    Argument{kOp, "workspace", *workspace}
        .is_dense_of(true)
        .has_shape({conv_group_workspace_bytes()})
        .has_dtype({ScalarType::Byte});
    if (!workspace->is_contiguous()) fail(kOp, "workspace", "expected a contiguous tensor");
    counters = torch::stable::narrow(*workspace, 0, 0, kernels::kConvCounterBytes);
    partials = torch::stable::narrow(*workspace, 0, kernels::kConvCounterBytes,
                                     kernels::kConvPartialBytes);
    params.counters = static_cast<int32_t*>(counters.data_ptr());
    params.partials = static_cast<float*>(partials.data_ptr());
    operands.push_back({"counters", counters, Use::kUpdate});
    operands.push_back({"partials", partials, Use::kScratch});
  }
  launch_kernels(kOp, operands,
                 [&](cudaStream_t stream) { return kernels::conv_group(params, stream); });
}

}  // namespace

#ifdef INCEPTION_EXT_EMULATE
STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CUDA, m) {
#endif
  m.impl("conv_group", TORCH_BOX(&conv_group));
}

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CompositeExplicitAutograd, m) {
  m.impl("conv_group_workspace_bytes", TORCH_BOX(&conv_group_workspace_bytes));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
