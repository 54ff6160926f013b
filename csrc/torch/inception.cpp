// The Inception module on the CPU: one op forward, one op backward.
//
//   x -> 1x1 --------------------------------- BN ReLU -> out[branch1]
//     -> 1x1 -> BN ReLU -> 3x3 --------------- BN ReLU -> out[branch2]
//     -> 1x1 -> BN ReLU -> 3x3 or 5x5 -------- BN ReLU -> out[branch3]
//     -> max pool 3x3 -> 1x1 ----------------- BN ReLU -> out[branch4]
//
// The three 1x1 convolutions that read x run as one; every branch lands in its channels of out.

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/batch_norm.h"
#include "torch/batch_norm.h"
#include "torch/convolution.h"
#include "torch/cpu_kernels.h"
#include "torch/inception_layout.h"
#include "torch/library.h"
#include "torch/max_pool.h"
#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {
namespace {

Tensor merged_weight(const std::vector<Tensor>& conv_weights) {
  std::vector<Tensor> parts;
  for (Conv conv : kMerged) parts.push_back(conv_weights[conv]);
  return concatenate(parts);
}

// One forward pass: holds what its steps share.
class Forward {
 public:
  Forward(const Tensor& x, const Layout& layout, std::vector<Parameter> weights,
          std::vector<Parameter> biases, std::vector<RunningStatistic> running_means,
          std::vector<RunningStatistic> running_vars, bool training, double momentum, double eps)
      : layout_(layout),
        dtype_(x.scalar_type()),
        weights_(std::move(weights)),
        biases_(std::move(biases)),
        running_means_(std::move(running_means)),
        running_vars_(std::move(running_vars)),
        training_(training),
        momentum_(momentum),
        eps_(eps),
        mean_(empty_vector(x, layout.statistics_size, ScalarType::Float)),
        rstd_(empty_vector(x, layout.statistics_size, ScalarType::Float)) {}

  // Mean and rstd of the convolutions `convs`, whose raw outputs lie side by side in `raw`.
  void statistics(const Pixels& raw, std::initializer_list<Conv> convs) {
    const int64_t first = layout_.statistics[*convs.begin()];
    std::vector<float> m2;
    if (training_) {
      m2.resize(raw.channels);
      batch_norm_statistics_pixels(raw, dtype_, mean() + first, m2.data());
    }
    for (Conv conv : convs) {
      const int64_t offset = layout_.statistics[conv], channels = layout_.channels[conv];
      if (training_) {
        cpu::batch_norm_finalize({.mean = mean() + offset,
                                  .m2 = m2.data() + (offset - first),
                                  .count = raw.count,
                                  .channels = channels,
                                  .eps = eps_,
                                  .momentum = momentum_,
                                  .rstd = rstd() + offset,
                                  .running_mean = running_means_[conv].data(),
                                  .running_var = running_vars_[conv].data()});
        running_means_[conv].write_back();
        running_vars_[conv].write_back();
      } else {
        std::copy_n(running_means_[conv].data(), channels, mean() + offset);
        cpu::batch_norm_rstd({.running_var = running_vars_[conv].data(),
                              .channels = channels,
                              .eps = eps_,
                              .rstd = rstd() + offset});
      }
    }
  }

  void apply(Conv conv, const Pixels& raw, const Pixels& y) {
    const int64_t offset = layout_.statistics[conv];
    batch_norm_relu_apply_pixels(raw, y, dtype_, {mean() + offset, rstd() + offset},
                                 {weights_[conv], biases_[conv]});
  }

  const Tensor& mean_tensor() const { return mean_; }
  const Tensor& rstd_tensor() const { return rstd_; }

 private:
  float* mean() { return static_cast<float*>(mean_.data_ptr()); }
  float* rstd() { return static_cast<float*>(rstd_.data_ptr()); }

  const Layout& layout_;
  ScalarType dtype_;
  std::vector<Parameter> weights_, biases_;
  std::vector<RunningStatistic> running_means_, running_vars_;
  bool training_;
  double momentum_, eps_;
  Tensor mean_, rstd_;  // [statistics_size]
};

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor>;

ForwardResult inception_forward(Tensor x, std::vector<Tensor> conv_weights,
                                std::vector<Tensor> weights, std::vector<Tensor> biases,
                                std::vector<Tensor> running_means, std::vector<Tensor> running_vars,
                                bool training, double momentum, double eps, bool save,
                                bool /*exact*/, std::string /*group_name*/, int64_t group_size) {
  static constexpr const char* op = "inception_forward";
  const NoGrad no_grad;
  const Layout layout(op, x, conv_weights, /*cuda=*/false);
  Forward forward(x, layout, parameters(op, "weights", weights, layout),
                  parameters(op, "biases", biases, layout),
                  running_statistics(op, "running_means", running_means, layout.channels, training,
                                     /*cuda=*/false),
                  running_statistics(op, "running_vars", running_vars, layout.channels, training,
                                     /*cuda=*/false),
                  training, momentum, eps);

  check_alone(op, group_size);

  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  const ScalarType dtype = x.scalar_type();
  const Tensor input = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  Tensor out = empty_nhwc(x, n, layout.output_channels, h, w);
  const Pixels out_pixels(out);
  const auto out_slice = [&](Conv conv) {
    return out_pixels.slice(layout.output[conv], layout.channels[conv]);
  };
  // A raw convolution output as pixels; the tensor is kept by the caller.
  const auto as_pixels = [](Tensor& raw) {
    raw = by_pixels(raw);
    return Pixels(raw);
  };

  Tensor raw_1x1 = convolution_same(input, merged_weight(conv_weights));
  const Pixels merged = as_pixels(raw_1x1);
  forward.statistics(merged, {kBranch1, kReduce3x3, kReduce5x5});
  const auto merged_slice = [&](Conv conv) {
    return merged.slice(layout.statistics[conv], layout.channels[conv]);
  };
  forward.apply(kBranch1, merged_slice(kBranch1), out_slice(kBranch1));

  // reduce 1x1 -> BN ReLU -> convolution -> BN ReLU -> out
  const auto branch = [&](Conv reduce, Conv conv, Tensor& reduced, Tensor& raw) {
    reduced = empty_nhwc(x, n, layout.channels[reduce], h, w);
    forward.apply(reduce, merged_slice(reduce), Pixels(reduced));
    raw = convolution_same(reduced, conv_weights[conv]);
    const Pixels pixels = as_pixels(raw);
    forward.statistics(pixels, {conv});
    forward.apply(conv, pixels, out_slice(conv));
  };
  Tensor reduced_3x3, raw_3x3, reduced_5x5, raw_5x5;
  branch(kReduce3x3, kConv3x3, reduced_3x3, raw_3x3);
  branch(kReduce5x5, kConv5x5, reduced_5x5, raw_5x5);

  Tensor pooled = empty_nhwc(x, n, x.size(1), h, w);
  Tensor argmax = save ? empty_nhwc(x, n, x.size(1), h, w, ScalarType::Byte)
                       : empty_vector(x, 0, ScalarType::Byte);
  max_pool_pixels(same_size_pool(input), Pixels(input), Pixels(pooled),
                  save ? static_cast<uint8_t*>(argmax.data_ptr()) : nullptr, dtype);
  Tensor raw_pool = convolution_same(pooled, conv_weights[kPoolProjection]);
  const Pixels pool_pixels = as_pixels(raw_pool);
  forward.statistics(pool_pixels, {kPoolProjection});
  forward.apply(kPoolProjection, pool_pixels, out_slice(kPoolProjection));

  if (!save) {
    const auto none = [&] { return empty_vector(x, 0, dtype); };
    const auto no_statistics = [&] { return empty_vector(x, 0, ScalarType::Float); };
    return {out,    none(), none(), none(),          none(),         none(),
            none(), none(), argmax, no_statistics(), no_statistics()};
  }
  return {out,
          raw_1x1,
          raw_3x3,
          raw_5x5,
          raw_pool,
          reduced_3x3,
          reduced_5x5,
          pooled,
          argmax,
          forward.mean_tensor(),
          forward.rstd_tensor()};
}

using BackwardResult =
    std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

BackwardResult inception_backward(Tensor grad, Tensor x, std::vector<Tensor> conv_weights,
                                  std::vector<Tensor> weights, std::vector<Tensor> biases,
                                  Tensor raw_1x1, Tensor raw_3x3, Tensor raw_5x5, Tensor raw_pool,
                                  Tensor reduced_3x3, Tensor reduced_5x5, Tensor pooled,
                                  Tensor argmax, Tensor mean, Tensor rstd, bool training,
                                  std::vector<bool> needs, bool /*exact*/, bool affine,
                                  std::string /*group_name*/, int64_t group_size) {
  static constexpr const char* op = "inception_backward";
  const NoGrad no_grad;
  const Layout layout(op, x, conv_weights, /*cuda=*/false);
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  const ScalarType dtype = x.scalar_type();
  Argument{op, "grad", grad}
      .is_dense_of(/*cuda=*/false)
      .has_shape({n, layout.output_channels, h, w})
      .has_dtype({dtype});
  const auto check_saved = [&](const char* name, const Tensor& saved, int64_t channels,
                               ScalarType expected) {
    Argument{op, name, saved}.has_shape({n, channels, h, w}).has_dtype({expected});
  };
  check_saved("raw_1x1", raw_1x1, layout.merged_channels, dtype);
  check_saved("raw_3x3", raw_3x3, layout.channels[kConv3x3], dtype);
  check_saved("raw_5x5", raw_5x5, layout.channels[kConv5x5], dtype);
  check_saved("raw_pool", raw_pool, layout.channels[kPoolProjection], dtype);
  check_saved("reduced_3x3", reduced_3x3, layout.channels[kReduce3x3], dtype);
  check_saved("reduced_5x5", reduced_5x5, layout.channels[kReduce5x5], dtype);
  check_saved("pooled", pooled, x.size(1), dtype);
  check_saved("argmax", argmax, x.size(1), ScalarType::Byte);
  const SavedStatistics statistics(op, mean, rstd, layout.statistics_size);
  check_alone(op, group_size);
  if (needs.size() != 1 + kConvs) fail(op, "needs", "expected 7 values, got ", needs.size());
  const bool needs_x = needs[0];
  const auto needs_weight = [&](Conv conv) { return needs[1 + conv]; };
  const std::vector<Parameter> gammas = parameters(op, "weights", weights, layout);
  const std::vector<Parameter> betas = parameters(op, "biases", biases, layout);

  std::vector<Tensor> conv_weight_grads(kConvs), weight_grads(kConvs), bias_grads(kConvs);
  // Gradient through ReLU and batch norm of `conv`, from slice `dy` into slice `dx`.
  const auto batch_norm = [&](Conv conv, const Pixels& dy, const Pixels& raw, const Pixels& dx) {
    const bool needs_sums = training || affine;
    const int64_t size = needs_sums ? layout.channels[conv] : 0;
    Tensor weight_grad = empty_vector(x, size, ScalarType::Float);
    Tensor bias_grad = empty_vector(x, size, ScalarType::Float);
    batch_norm_relu_backward_pixels(
        dy, raw, dx, dtype, statistics.from(layout.statistics[conv]), {gammas[conv], betas[conv]},
        training, needs_sums ? static_cast<float*>(bias_grad.data_ptr()) : nullptr,
        needs_sums ? static_cast<float*>(weight_grad.data_ptr()) : nullptr);
    weight_grads[conv] = vector_gradient(weight_grad, weights[conv], affine);
    bias_grads[conv] = vector_gradient(bias_grad, biases[conv], affine);
  };

  const Tensor gradient = by_pixels(grad);
  const Pixels grad_pixels(gradient);
  const auto grad_slice = [&](Conv conv) {
    return grad_pixels.slice(layout.output[conv], layout.channels[conv]);
  };
  // From out back through the last convolution of a branch: the gradient of its input.
  const auto branch = [&](Conv conv, const Tensor& raw_saved, const Tensor& conv_input,
                          bool needs_input) {
    const Tensor raw = by_pixels(raw_saved);
    Tensor draw = empty_nhwc(x, n, layout.channels[conv], h, w);
    batch_norm(conv, grad_slice(conv), Pixels(raw), Pixels(draw));
    ConvolutionGradients gradients = convolution_same_backward(draw, conv_input, conv_weights[conv],
                                                               needs_input, needs_weight(conv));
    if (needs_weight(conv)) {
      conv_weight_grads[conv] = in_layout_of(conv_weights[conv], gradients.weight);
    }
    return gradients.input;
  };
  const bool needs_merged =
      needs_x || needs_weight(kBranch1) || needs_weight(kReduce3x3) || needs_weight(kReduce5x5);
  const Tensor grad_3x3 = branch(kConv3x3, raw_3x3, reduced_3x3, /*needs_input=*/true);
  const Tensor grad_5x5 = branch(kConv5x5, raw_5x5, reduced_5x5, /*needs_input=*/true);
  const Tensor grad_pooled = branch(kPoolProjection, raw_pool, pooled, needs_x);

  const Tensor merged_raw = by_pixels(raw_1x1);
  Tensor merged_grad = empty_nhwc(x, n, layout.merged_channels, h, w);
  const Pixels raw_pixels(merged_raw), merged_pixels(merged_grad);
  const auto reduce = [&](Conv conv, const Pixels& dy) {
    const int64_t offset = layout.statistics[conv], size = layout.channels[conv];
    batch_norm(conv, dy, raw_pixels.slice(offset, size), merged_pixels.slice(offset, size));
  };
  const Tensor reduced_grad_3x3 = by_pixels(grad_3x3), reduced_grad_5x5 = by_pixels(grad_5x5);
  reduce(kBranch1, grad_slice(kBranch1));
  reduce(kReduce3x3, Pixels(reduced_grad_3x3));
  reduce(kReduce5x5, Pixels(reduced_grad_5x5));

  Tensor dx = empty_vector(x, 0, dtype);
  if (needs_merged) {
    const Tensor input = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
    const bool any_weight =
        needs_weight(kBranch1) || needs_weight(kReduce3x3) || needs_weight(kReduce5x5);
    ConvolutionGradients gradients = convolution_same_backward(
        merged_grad, input, merged_weight(conv_weights), needs_x, any_weight);
    if (any_weight) {
      for (Conv conv : kMerged) {
        // [K, C, 1, 1]: rows of the merged gradient, copied so that each parameter owns its own.
        Tensor rows = gradients.weight;
        rows = torch::stable::narrow(rows, 0, layout.statistics[conv], layout.channels[conv]);
        conv_weight_grads[conv] = torch::stable::clone(rows);
      }
    }
    if (needs_x) {
      dx = torch::stable::contiguous(gradients.input, MemoryFormat::ChannelsLast);
      const Tensor pool_grad = by_pixels(grad_pooled);
      const Tensor indices = torch::stable::contiguous(argmax, MemoryFormat::ChannelsLast);
      max_pool_backward_pixels(same_size_pool(x), Pixels(pool_grad),
                               static_cast<const uint8_t*>(indices.data_ptr()), Pixels(dx),
                               /*accumulate=*/true, dtype);
    }
  }
  for (int conv = 0; conv < kConvs; ++conv) {
    if (!needs_weight(static_cast<Conv>(conv))) conv_weight_grads[conv] = empty_vector(x, 0, dtype);
  }
  return {dx, conv_weight_grads, weight_grads, bias_grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CPU, m) {
  m.impl("inception_forward", TORCH_BOX(&inception_forward));
  m.impl("inception_backward", TORCH_BOX(&inception_backward));
}

}  // namespace inception_ext
