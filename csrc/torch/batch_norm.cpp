#include "torch/batch_norm.h"

#include <optional>
#include <string>
#include <tuple>

#include "cpu/batch_norm.h"
#include "torch/cpu_kernels.h"
#include "torch/library.h"
#include "torch/stable.h"

namespace inception_ext {
namespace {

std::vector<float> workspace(const Pixels& x) {
  return std::vector<float>(cpu::batch_norm_workspace(x.count, x.channels));
}

}  // namespace

void batch_norm_statistics_pixels(const Pixels& x, ScalarType dtype, float* mean, float* m2) {
  std::vector<float> space = workspace(x);
  cpu::batch_norm_statistics({.x = x.data,
                              .x_stride = x.stride,
                              .dtype = cpu_dtype(dtype),
                              .pixels = x.count,
                              .channels = x.channels,
                              .mean = mean,
                              .m2 = m2,
                              .workspace = space.data(),
                              .parallel = torch_threads});
}

void batch_norm_relu_apply_pixels(const Pixels& x, const Pixels& y, ScalarType dtype,
                                  const Statistics& statistics, const BatchNorm& bn) {
  cpu::batch_norm_relu_apply({.x = x.data,
                              .x_stride = x.stride,
                              .y = y.data,
                              .y_stride = y.stride,
                              .dtype = cpu_dtype(dtype),
                              .pixels = x.count,
                              .channels = x.channels,
                              .mean = statistics.mean,
                              .rstd = statistics.rstd,
                              .gamma = bn.weight.data(),
                              .beta = bn.bias.data(),
                              .parallel = torch_threads});
}

void batch_norm_relu_backward_pixels(const Pixels& grad, const Pixels& x, const Pixels& dx,
                                     ScalarType dtype, const Statistics& statistics,
                                     const BatchNorm& bn, bool training, float* sum_dy,
                                     float* sum_dy_xhat) {
  std::vector<float> space = workspace(x);
  const cpu::BatchNormReluBackwardParams params{.x = x.data,
                                                .x_stride = x.stride,
                                                .dy = grad.data,
                                                .dy_stride = grad.stride,
                                                .dx = dx.data,
                                                .dx_stride = dx.stride,
                                                .dtype = cpu_dtype(dtype),
                                                .pixels = x.count,
                                                .channels = x.channels,
                                                .mean = statistics.mean,
                                                .rstd = statistics.rstd,
                                                .gamma = bn.weight.data(),
                                                .beta = bn.bias.data(),
                                                .batch_statistics = training,
                                                .sum_dy = sum_dy,
                                                .sum_dy_xhat = sum_dy_xhat,
                                                .workspace = space.data(),
                                                .parallel = torch_threads};
  if (sum_dy) cpu::batch_norm_relu_backward_reduce(params);
  cpu::batch_norm_relu_backward_apply(params);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_forward(Tensor x, Tensor weight, Tensor bias,
                                                           std::optional<Tensor> running_mean,
                                                           std::optional<Tensor> running_var,
                                                           bool training, double momentum,
                                                           double eps, std::string /*group_name*/,
                                                           int64_t group_size) {
  static constexpr const char* op = "batch_norm_relu_forward";
  const NoGrad no_grad;
  check_cpu_activation({op, "x", x});
  const int64_t channels = x.size(1);
  const Parameter gamma(op, "weight", weight, channels);
  const Parameter beta(op, "bias", bias, channels);
  RunningStatistic mean_running(op, "running_mean", running_mean, channels, training);
  RunningStatistic var_running(op, "running_var", running_var, channels, training);
  check_alone(op, group_size);

  Tensor y = empty_nhwc(x, x.size(0), channels, x.size(2), x.size(3));
  Tensor mean = empty_vector(x, channels, ScalarType::Float);
  Tensor rstd = empty_vector(x, channels, ScalarType::Float);
  const Statistics statistics{static_cast<float*>(mean.data_ptr()),
                              static_cast<float*>(rstd.data_ptr())};
  const Tensor input = by_pixels(x);
  const Pixels pixels(input);
  if (training) {
    std::vector<float> m2(channels);
    batch_norm_statistics_pixels(pixels, x.scalar_type(), statistics.mean, m2.data());
    cpu::batch_norm_finalize({.mean = statistics.mean,
                              .m2 = m2.data(),
                              .count = pixels.count,
                              .channels = channels,
                              .eps = eps,
                              .momentum = momentum,
                              .rstd = statistics.rstd,
                              .running_mean = mean_running.data(),
                              .running_var = var_running.data()});
    mean_running.write_back();
    var_running.write_back();
  } else {
    std::copy_n(mean_running.data(), channels, statistics.mean);
    cpu::batch_norm_rstd({.running_var = var_running.data(),
                          .channels = channels,
                          .eps = eps,
                          .rstd = statistics.rstd});
  }
  batch_norm_relu_apply_pixels(pixels, Pixels(y), x.scalar_type(), statistics, {gamma, beta});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(Tensor grad, Tensor x, Tensor weight,
                                                            Tensor bias, Tensor mean, Tensor rstd,
                                                            bool training, bool affine,
                                                            std::string /*group_name*/,
                                                            int64_t group_size) {
  static constexpr const char* op = "batch_norm_relu_backward";
  const NoGrad no_grad;
  check_cpu_activation({op, "x", x});
  const int64_t channels = x.size(1);
  Argument{op, "grad", grad}
      .is_dense_of(/*cuda=*/false)
      .has_shape({x.size(0), channels, x.size(2), x.size(3)})
      .has_dtype({x.scalar_type()});
  const SavedStatistics saved(op, mean, rstd, channels);
  const Parameter gamma(op, "weight", weight, channels);
  const Parameter beta(op, "bias", bias, channels);
  check_alone(op, group_size);

  Tensor dx = empty_nhwc(x, x.size(0), channels, x.size(2), x.size(3));
  const bool needs_sums = training || affine;
  Tensor dweight = empty_vector(x, needs_sums ? channels : 0, ScalarType::Float);
  Tensor dbias = empty_vector(x, needs_sums ? channels : 0, ScalarType::Float);
  const Tensor input = by_pixels(x);
  const Tensor gradient = by_pixels(grad);
  batch_norm_relu_backward_pixels(Pixels(gradient), Pixels(input), Pixels(dx), x.scalar_type(),
                                  saved.from(0), {gamma, beta}, training,
                                  needs_sums ? static_cast<float*>(dbias.data_ptr()) : nullptr,
                                  needs_sums ? static_cast<float*>(dweight.data_ptr()) : nullptr);
  return {dx, vector_gradient(dweight, weight, affine), vector_gradient(dbias, bias, affine)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CPU, m) {
  m.impl("batch_norm_relu_forward", TORCH_BOX(&batch_norm_relu_forward));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward));
}

}  // namespace inception_ext
