// conv_wgrad on the CUDA kernels: lists of tensors to ConvWgradParams.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include "kernels/conv_wgrad.h"

#include <optional>
#include <string>
#include <vector>

#include "torch/conv_lists.h"
#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"
#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {
namespace {

constexpr const char* kOp = "conv_wgrad";

// mean, rstd, gamma and beta: rows of [4, C]; all nullptr for [0].
struct Vectors {
  const float* mean = nullptr;
  const float* rstd = nullptr;
  const float* gamma = nullptr;
  const float* beta = nullptr;
};
Vectors vectors_of(const Tensor& batch_norm, int64_t channels, size_t i) {
  const std::string name = item("batch_norms", i);
  const Argument argument{kOp, name.c_str(), batch_norm};
  argument.is_dense_of(/*cuda=*/true).has_dtype({ScalarType::Float});
  if (batch_norm.dim() == 1 && batch_norm.size(0) == 0) return {};
  argument.has_shape({4, channels});
  if (!batch_norm.is_contiguous()) fail(kOp, name.c_str(), "expected a contiguous tensor");
  const float* first = static_cast<const float*>(batch_norm.data_ptr());
  return {first, first + channels, first + 2 * channels, first + 3 * channels};
}

// Filters of problem i that are written to dw [k, C, R, S].
kernels::WgradSegment segment_of(const Tensor& dw, const Tensor& first, const Tensor& x, size_t i) {
  const std::string name = item("outputs of problem ", i);
  const Argument argument{kOp, name.c_str(), dw};
  argument.is_dense_of(/*cuda=*/true).has_dim(4);
  if (x.scalar_type() == ScalarType::Float) {
    argument.has_dtype({ScalarType::Float});
  } else {
    argument.has_dtype({x.scalar_type(), ScalarType::Float});
  }
  argument.has_shape({dw.size(0), x.size(1), first.size(2), first.size(3)});
  return {.dw = dw.data_ptr(),
          .stride_k = dw.stride(0),
          .stride_r = dw.stride(2),
          .stride_s = dw.stride(3),
          .stride_c = dw.stride(1),
          .filters = static_cast<int32_t>(dw.size(0)),
          .is_float32 = dw.scalar_type() == ScalarType::Float};
}

// Everything that problem i is made of.
kernels::WgradProblem make_problem(const Tensor& grad, const Tensor& x, const Tensor& batch_norm,
                                   Pair stride, Pair padding, bool pool, const Tensor* outputs,
                                   int64_t segments, size_t i) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const std::string grad_name = item("grads", i), outputs_name = item("outputs of problem ", i);
  std::vector<kernels::WgradSegment> parts;
  int64_t filters = 0;
  for (int64_t s = 0; s < segments; ++s) {
    parts.push_back(segment_of(outputs[s], outputs[0], x, i));
    filters += parts.back().filters;
  }
  const int64_t r = outputs[0].size(2), s = outputs[0].size(3);
  if (r < 1 || s < 1 || filters < 1) {
    fail(kOp, outputs_name.c_str(), "expected at least one filter with one tap, got shape ",
         shape_text(outputs[0]));
  }
  const int64_t p = window_positions(kOp, outputs_name, h, r, stride.h, padding.h);
  const int64_t q = window_positions(kOp, outputs_name, w, s, stride.w, padding.w);
  check_cuda_activation({kOp, grad_name.c_str(), grad});
  Argument{kOp, grad_name.c_str(), grad}.has_dtype({x.scalar_type()}).has_shape({n, filters, p, q});
  if (pool) check_pooled(kOp, i, {r, s}, stride, padding);
  const Vectors vectors = vectors_of(batch_norm, c, i);
  if (pool && vectors.mean) {
    fail(kOp, item("pools", i).c_str(), "expected false where batch_norms has an entry");
  }
  using kernels::WgradPrologue;
  kernels::WgradProblem problem{.dy = grad.data_ptr(),
                                .x = x.data_ptr(),
                                .dy_stride = Pixels(grad).stride,
                                .x_stride = Pixels(x).stride,
                                .mean = vectors.mean,
                                .rstd = vectors.rstd,
                                .gamma = vectors.gamma,
                                .beta = vectors.beta,
                                .batch = static_cast<int32_t>(n),
                                .input_h = static_cast<int32_t>(h),
                                .input_w = static_cast<int32_t>(w),
                                .channels = static_cast<int32_t>(c),
                                .output_h = static_cast<int32_t>(p),
                                .output_w = static_cast<int32_t>(q),
                                .filters = static_cast<int32_t>(filters),
                                .kernel_h = static_cast<int32_t>(r),
                                .kernel_w = static_cast<int32_t>(s),
                                .stride_h = static_cast<int32_t>(stride.h),
                                .stride_w = static_cast<int32_t>(stride.w),
                                .padding_h = static_cast<int32_t>(padding.h),
                                .padding_w = static_cast<int32_t>(padding.w),
                                .prologue = pool           ? WgradPrologue::kMaxPool
                                            : vectors.mean ? WgradPrologue::kBatchNormRelu
                                                           : WgradPrologue::kNone,
                                .segments = static_cast<int32_t>(segments),
                                .segment = {}};
  for (size_t part = 0; part < parts.size(); ++part) problem.segment[part] = parts[part];
  return problem;
}

void conv_wgrad(Tensors grads, Tensors x, Tensors batch_norms, Integers strides, Integers paddings,
                std::vector<bool> pools, Integers segments, bool exact,
                std::optional<Tensor> workspace, Tensors outputs) {
  const size_t count = problem_count(kOp, x);
  check_length(kOp, "grads", grads.size(), count);
  check_length(kOp, "batch_norms", batch_norms.size(), count);
  check_length(kOp, "strides", strides.size(), 2 * count);
  check_length(kOp, "paddings", paddings.size(), 2 * count);
  check_length(kOp, "pools", pools.size(), count);
  check_length(kOp, "segments", segments.size(), count);
  check_cuda_activation({kOp, "x[0]", x[0]});

  kernels::ConvWgradParams params{.problem = {},
                                  .problems = static_cast<int32_t>(count),
                                  .dtype = kernel_dtype(x[0].scalar_type()),
                                  .exact = exact,
                                  .counters = nullptr,
                                  .partials = nullptr};
  size_t used = 0;
  for (size_t i = 0; i < count; ++i) {
    check_images(kOp, "x", i, x[i], x[0].scalar_type());
    check_images(kOp, "grads", i, grads[i], x[0].scalar_type());
    const Tensor* parts = take_outputs(kOp, segments, i, outputs, used);
    grads[i] = by_pixels(grads[i]);
    bool pool = pools[i];
    x[i] = pooled_where_wide(kOp, by_pixels(x[i]), pool);
    params.problem[i] =
        make_problem(grads[i], x[i], batch_norms[i], pair_of(kOp, "strides", strides, i, 1),
                     pair_of(kOp, "paddings", paddings, i, 0), pool, parts, segments[i], i);
  }
  check_length(kOp, "outputs", outputs.size(), used);

  std::vector<Operand> operands;
  for (size_t i = 0; i < count; ++i) {
    operands.push_back({"grad", grads[i], Use::kRead});
    operands.push_back({"x", x[i], Use::kRead});
    operands.push_back({"batch_norm", batch_norms[i], Use::kRead});
  }
  for (const Tensor& dw : outputs) operands.push_back({"dw", dw, Use::kWrite});
  const SplitMemory memory = split_memory(kOp, workspace);
  const Tensor partials = memory.partials
                              ? *memory.partials
                              : empty_vector(x[0], kernels::kConvPartialBytes, ScalarType::Byte);
  params.partials = static_cast<float*>(partials.data_ptr());
  operands.push_back({"partials", partials, Use::kScratch});
  if (memory.counters) {
    params.counters = static_cast<int32_t*>(memory.counters->data_ptr());
    operands.push_back({"counters", *memory.counters, Use::kUpdate});
  }
  launch_kernels(kOp, operands,
                 [&](cudaStream_t stream) { return kernels::conv_wgrad(params, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("conv_wgrad", TORCH_BOX(&conv_wgrad));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
