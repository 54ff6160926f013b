// Convolution + batch norm + ReLU, once or twice, and a max pool: the stem in training. A launch
// for each convolution (which leaves statistics), one that turns these into mean and rstd, and one
// at the end that applies the last batch norm, with ReLU and pool. A second convolution reads the
// first one's raw output, with batch norm and ReLU on load. A group of processes that shares its
// statistics has one launch more behind each convolution.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include <string>
#include <tuple>
#include <vector>

#include "torch/conv_chain.h"
#include "torch/cuda_launch.h"
#include "torch/library.h"
#include "torch/process_group.h"
#include "torch/shared_statistics.h"

namespace inception_ext {
namespace {

constexpr const char* kOp = "conv_chain_forward";

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result conv_chain_forward(Tensor x, std::vector<Tensor> conv_weights, std::vector<Tensor> weights,
                          std::vector<Tensor> biases, std::vector<Tensor> running_means,
                          std::vector<Tensor> running_vars, std::vector<int64_t> strides,
                          std::vector<int64_t> paddings, std::vector<int64_t> pool, bool training,
                          double momentum, double eps, bool save, bool exact,
                          std::string group_name, int64_t group_size) {
  const Chain chain(kOp, x, conv_weights, strides, paddings, pool);
  const ScalarType dtype = x.scalar_type();
  const Tensor input = by_pixels(x);
  const auto gammas = chain_parameters(kOp, "weights", weights, chain);
  const auto betas = chain_parameters(kOp, "biases", biases, chain);
  auto means = running_statistics(kOp, "running_means", running_means, chain.channels, training,
                                  /*cuda=*/true);
  auto vars = running_statistics(kOp, "running_vars", running_vars, chain.channels, training,
                                 /*cuda=*/true);
  const ProcessGroup group(kOp, group_name, group_size, training);
  const FilterMatrices filters(conv_weights, x);

  const auto image = [&](const ImageSize& size, int64_t channels, ScalarType type) {
    return empty_nhwc(x, size.n, channels, size.h, size.w, type);
  };
  const auto floats = [&](int64_t count) { return empty_vector(x, count, ScalarType::Float); };
  const auto norm_of = [&](int i, const Tensor& mean, const Tensor& rstd) {
    return BatchNormVectors{gammas[i].data(), betas[i].data(),
                            data_of<float>(mean) + chain.offset[i],
                            data_of<float>(rstd) + chain.offset[i]};
  };
  Tensor mean = floats(chain.statistics_size), rstd = floats(chain.statistics_size);
  std::vector<Tensor> raw, tile_mean, tile_m2;
  std::vector<SharedStatistics> shared;
  std::vector<kernels::ConvTrainParams> convolutions;
  for (int i = 0; i < chain.length; ++i) {
    raw.push_back(image(chain.output_of(i), chain.channels[i], dtype));
    shared.emplace_back(group, x, chain.channels[i]);
    const int64_t tiles = training ? most_tiles(chain.output_of(i).pixels()) : 0;
    tile_mean.push_back(floats(tiles * chain.channels[i]));
    tile_m2.push_back(floats(tiles * chain.channels[i]));
    kernels::ConvTrainParams params{
        .problem = {}, .problems = 1, .dtype = kernel_dtype(dtype), .exact = exact};
    params.problem[0] =
        train_problem(chain.input_of(i), chain.window[i], Pixels(i == 0 ? input : raw[i - 1]),
                      filters[i].data_ptr(), Pixels(raw[i]));
    if (training) {
      params.problem[0].tile_mean = data_of<float>(tile_mean[i]);
      params.problem[0].tile_m2 = data_of<float>(tile_m2[i]);
    }
    if (i > 0) normalize_on_load(params.problem[0], norm_of(i - 1, mean, rstd));
    convolutions.push_back(params);
  }
  const int last = chain.length - 1;
  Tensor y = image(chain.output, chain.channels[last], dtype);
  // The kernel writes it whether somebody reads it or not.
  Tensor argmax = chain.pooled ? image(chain.output, chain.channels[last], ScalarType::Byte)
                               : empty_vector(x, 0, ScalarType::Byte);

  const auto finalize = [&](int i, int32_t rows, cudaStream_t stream) {
    kernels::BatchNormFinalizeParams params{};
    auto& item = params.item[params.items++];
    const int64_t channels = chain.channels[i];
    item = training ? tiles_item(Pixels(raw[i]), kernel_dtype(dtype), data_of<float>(tile_mean[i]),
                                 data_of<float>(tile_m2[i]), channels, rows, means[i], vars[i])
                    : running_item(means[i], vars[i], channels);
    item.mean = norm_of(i, mean, rstd).mean;
    item.rstd = norm_of(i, mean, rstd).rstd;
    item.momentum = static_cast<float>(momentum);
    item.eps = static_cast<float>(eps);
    return shared[i].finalize(params, stream);
  };
  const auto apply = [&](cudaStream_t stream) {
    const BatchNormVectors norm = norm_of(last, mean, rstd);
    const Pixels from(raw[last]), to(y);
    const ImageSize& size = chain.output_of(last);
    if (!chain.pooled) {
      kernels::BatchNormReluApplyParams params{
          .item = {}, .items = 1, .pixels = size.pixels(), .dtype = kernel_dtype(dtype)};
      params.item[0] = apply_item(from, to, norm);
      return kernels::batch_norm_relu_apply(params, stream);
    }
    kernels::BatchNormReluMaxPoolParams params{};
    params.pool = {.x = from.data,
                   .y = to.data,
                   .argmax = data_of<uint8_t>(argmax),
                   .x_stride = pixel_strides(from, size.h, size.w),
                   .y_stride = pixel_strides(to, chain.output.h, chain.output.w),
                   .batch = size.n,
                   .channels = from.channels,
                   .input_h = size.h,
                   .input_w = size.w,
                   .output_h = chain.output.h,
                   .output_w = chain.output.w,
                   .window = chain.pool_window,
                   .dtype = kernel_dtype(dtype)};
    params.mean = norm.mean;
    params.rstd = norm.rstd;
    params.gamma = norm.gamma;
    params.beta = norm.beta;
    return kernels::batch_norm_relu_max_pool(params, stream);
  };

  std::vector<Operand> operands{{"x", input, Use::kRead},
                                {"y", y, Use::kWrite},
                                {"argmax", argmax, Use::kWrite},
                                {"mean", mean, Use::kWrite},
                                {"rstd", rstd, Use::kWrite}};
  filters.add_to(operands);
  for (int i = 0; i < chain.length; ++i) {
    operands.push_back({"raw", raw[i], Use::kWrite});
    operands.push_back({"tile_mean", tile_mean[i], Use::kScratch});
    operands.push_back({"tile_m2", tile_m2[i], Use::kScratch});
    operands.push_back({"gamma", gammas[i].tensor(), Use::kRead});
    operands.push_back({"beta", betas[i].tensor(), Use::kRead});
    add_running(operands, means[i], vars[i], training);
    shared[i].add_to(operands);
  }
  launch_kernels(kOp, operands, [&](cudaStream_t stream) {
    cudaError_t error = filters.pack(stream);
    for (int i = 0; i < chain.length; ++i) {
      int32_t rows = 0;
      if (error == cudaSuccess) error = kernels::conv_train_rows(convolutions[i], &rows);
      if (error == cudaSuccess) error = kernels::conv_train(convolutions[i], stream);
      if (error == cudaSuccess) error = finalize(i, rows, stream);
    }
    return error == cudaSuccess ? apply(stream) : error;
  });
  for (int i = 0; training && i < chain.length; ++i) {
    means[i].write_back();
    vars[i].write_back();
  }
  const auto none = [&] { return empty_vector(x, 0, dtype); };
  if (!save) {
    return {y, none(), none(), empty_vector(x, 0, ScalarType::Byte), floats(0), floats(0)};
  }
  return {y, raw[0], chain.length > 1 ? raw[1] : none(), argmax, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("conv_chain_forward", TORCH_BOX(&conv_chain_forward));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
