// Batch normalisation + ReLU, on CUDA.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include <optional>
#include <string>
#include <tuple>

#include "kernels/batch_norm.h"
#include "torch/batch_norm_vectors.h"
#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"
#include "torch/no_grad.h"
#include "torch/process_group.h"
#include "torch/shared_statistics.h"
#include "torch/train_blocks.h"

namespace inception_ext {
namespace {

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

Tensor empty_floats(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::empty({size.begin(), size.size()}, ScalarType::Float, std::nullopt,
                              like.device());
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_forward(Tensor x, Tensor weight, Tensor bias,
                                                           std::optional<Tensor> running_mean,
                                                           std::optional<Tensor> running_var,
                                                           bool training, double momentum,
                                                           double eps, std::string group_name,
                                                           int64_t group_size) {
  static constexpr const char* op = "batch_norm_relu_forward";
  const NoGrad no_grad;
  check_cuda_activation({op, "x", x});
  const int64_t channels = x.size(1);
  const Parameter gamma(op, "weight", weight, channels, /*cuda=*/true);
  const Parameter beta(op, "bias", bias, channels, /*cuda=*/true);
  RunningStatistic mean_running(op, "running_mean", running_mean, channels, training,
                                /*cuda=*/true);
  RunningStatistic var_running(op, "running_var", running_var, channels, training, /*cuda=*/true);
  const ProcessGroup group(op, group_name, group_size, training);

  const Tensor y = empty_nhwc(x, x.size(0), channels, x.size(2), x.size(3));
  const Tensor mean = empty_floats(x, {channels}), rstd = empty_floats(x, {channels});
  const Tensor input = by_pixels(x);
  const Pixels from(input), to(y);
  const kernels::DType dtype = kernel_dtype(x.scalar_type());
  const auto c = static_cast<int32_t>(channels);

  const int32_t tiles = training ? kernels::batch_norm_chunks(from.count, channels) : 1;
  const Tensor tile_mean = training ? empty_floats(x, {tiles, channels}) : *mean_running.tensor();
  const Tensor tile_m2 = training ? empty_floats(x, {tiles, channels}) : *var_running.tensor();
  const kernels::BatchNormTileStatisticsParams statistics{.x = from.data,
                                                          .x_stride = from.stride,
                                                          .pixels = from.count,
                                                          .channels = c,
                                                          .tiles = tiles,
                                                          .tile_mean = floats(tile_mean),
                                                          .tile_m2 = floats(tile_m2),
                                                          .dtype = dtype};
  // In evaluation the running statistics stand for those of one tile of one pixel.
  const int64_t pixels = training ? from.count : 1;
  kernels::BatchNormFinalizeParams finalize{.items = 1};
  finalize.item[0] = {
      .tile_mean = floats(tile_mean),
      .x = training ? from.data : nullptr,
      .x_stride = from.stride,
      .dtype = dtype,
      .tile_m2 = floats(tile_m2),
      .tile_stride = channels,
      .pixels = pixels,
      .rows_per_tile = static_cast<int32_t>(tiles ? (pixels + tiles - 1) / tiles : 1),
      .tiles = tiles,
      .channels = c,
      .mean = floats(mean),
      .rstd = floats(rstd),
      .running_mean = training ? mean_running.data() : nullptr,
      .running_var = training ? var_running.data() : nullptr,
      .momentum = static_cast<float>(momentum),
      .eps = static_cast<float>(eps)};
  kernels::BatchNormReluApplyParams apply{.items = 1, .pixels = from.count, .dtype = dtype};
  apply.item[0] = {.x = from.data,
                   .y = to.data,
                   .x_stride = from.stride,
                   .y_stride = to.stride,
                   .channels = c,
                   .mean = floats(mean),
                   .rstd = floats(rstd),
                   .gamma = gamma.data(),
                   .beta = beta.data()};

  const SharedStatistics shared(group, x, channels);
  std::vector<Operand> operands = {{"x", input, Use::kRead},
                                   {"weight", gamma.tensor(), Use::kRead},
                                   {"bias", beta.tensor(), Use::kRead},
                                   {"y", y, Use::kWrite},
                                   {"mean", mean, Use::kWrite},
                                   {"rstd", rstd, Use::kWrite}};
  add_running(operands, mean_running, var_running, training);
  shared.add_to(operands);
  if (training) {
    operands.push_back({"tile_mean", tile_mean, Use::kScratch});
    operands.push_back({"tile_m2", tile_m2, Use::kScratch});
  }
  launch_kernels(op, operands, [&](cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    if (training) error = kernels::batch_norm_tile_statistics(statistics, stream);
    if (error == cudaSuccess) error = shared.finalize(finalize, stream);
    if (error == cudaSuccess) error = kernels::batch_norm_relu_apply(apply, stream);
    return error;
  });
  if (training) {
    mean_running.write_back();
    var_running.write_back();
  }
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(Tensor grad, Tensor x, Tensor weight,
                                                            Tensor bias, Tensor mean, Tensor rstd,
                                                            bool training, bool affine,
                                                            std::string group_name,
                                                            int64_t group_size) {
  static constexpr const char* op = "batch_norm_relu_backward";
  const NoGrad no_grad;
  check_cuda_activation({op, "x", x});
  const int64_t channels = x.size(1);
  Argument{op, "grad", grad}
      .is_dense_of(/*cuda=*/true)
      .has_shape({x.size(0), channels, x.size(2), x.size(3)})
      .has_dtype({x.scalar_type()});
  const SavedStatistics saved(op, mean, rstd, channels);
  const Parameter gamma(op, "weight", weight, channels, /*cuda=*/true);
  const Parameter beta(op, "bias", bias, channels, /*cuda=*/true);
  const ProcessGroup group(op, group_name, group_size, training);

  const Tensor dx = empty_nhwc(x, x.size(0), channels, x.size(2), x.size(3));
  const bool needs_sums = training || affine;
  const int64_t sums = needs_sums ? channels : 0;
  const Tensor dweight = empty_floats(x, {sums}), dbias = empty_floats(x, {sums});
  const Tensor input = by_pixels(x), gradient = by_pixels(grad);
  const Pixels from(input), dy(gradient), to(dx);
  const int32_t chunks = needs_sums ? kernels::batch_norm_chunks(from.count, channels) : 0;
  const Tensor partials = empty_floats(x, {chunks, 2, channels});
  kernels::BatchNormReluBackwardParams params{.items = 1,
                                              .chunks = chunks,
                                              .pixels = from.count,
                                              .count = from.count,
                                              .batch_statistics = training,
                                              .dtype = kernel_dtype(x.scalar_type())};
  params.item[0] = {.x = from.data,
                    .dy = dy.data,
                    .dx = to.data,
                    .x_stride = from.stride,
                    .dy_stride = dy.stride,
                    .dx_stride = to.stride,
                    .channels = static_cast<int32_t>(channels),
                    .mean = floats(saved.mean()),
                    .rstd = floats(saved.rstd()),
                    .gamma = gamma.data(),
                    .beta = beta.data(),
                    .partials = floats(partials),
                    .dgamma = needs_sums ? floats(dweight) : nullptr,
                    .dbeta = needs_sums ? floats(dbias) : nullptr};
  const SharedSums shared(group, x, channels, from.count);
  std::vector<Operand> operands = {{"x", input, Use::kRead},
                                   {"grad", gradient, Use::kRead},
                                   {"weight", gamma.tensor(), Use::kRead},
                                   {"bias", beta.tensor(), Use::kRead},
                                   {"mean", saved.mean(), Use::kRead},
                                   {"rstd", saved.rstd(), Use::kRead},
                                   {"partials", partials, Use::kScratch},
                                   {"dx", dx, Use::kWrite},
                                   {"dweight", dweight, Use::kWrite},
                                   {"dbias", dbias, Use::kWrite}};
  shared.add_to(operands);
  launch_kernels(op, operands, [&](cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    if (needs_sums) error = kernels::batch_norm_relu_backward_reduce(params, stream);
    return error == cudaSuccess ? shared.apply(params, {dbias, dweight}, stream) : error;
  });
  return {dx, vector_gradient(dweight, weight, affine), vector_gradient(dbias, bias, affine)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("batch_norm_relu_forward", TORCH_BOX(&batch_norm_relu_forward));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
