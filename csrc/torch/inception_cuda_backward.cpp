// The Inception module's backward on the CUDA kernels, in at most nine launches:
//
//   1  weights packed for the data gradients
//   2  sums of the batch norms of all four branches       3  their gradients, raw
//   4  through the 3x3 and 5x5 filters, and those of the pool projection
//   5  gradients of the 3x3 and 5x5 filters
//   6  sums of the two reducing batch norms               7  their gradients, raw
//   8  dx: through the three 1x1 filters as one, plus the gathered gradient of the max pool
//   9  gradients of the 1x1 filters
//
// What nobody needs is left out. Where a group of processes shares its statistics, 3 and 7 are two
// launches each, and between them the processes add up one vector.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "torch/cuda_launch.h"
#include "torch/inception_layout.h"
#include "torch/library.h"
#include "torch/process_group.h"
#include "torch/shared_statistics.h"
#include "torch/train_blocks.h"

namespace inception_ext {
namespace {

constexpr const char* kOp = "inception_backward";

using Result = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

class Backward {
 public:
  Backward(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& conv_weights,
           const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
           const std::array<Tensor, kConvs>& raw_tensors, const Tensor& argmax, const Tensor& mean,
           const Tensor& rstd, bool training, const std::vector<bool>& needs, bool exact,
           bool affine, const ProcessGroup& group)
      : layout_(kOp, x, conv_weights, /*cuda=*/true),
        size_(kOp, x),
        dtype_(x.scalar_type()),
        training_(training),
        exact_(exact),
        affine_(affine),
        x_(by_pixels(x)),
        grad_(by_pixels(grad)),
        argmax_(torch::stable::contiguous(argmax, MemoryFormat::ChannelsLast)),
        conv_weights_(conv_weights),
        gammas_(parameters(kOp, "weights", weights, layout_)),
        betas_(parameters(kOp, "biases", biases, layout_)),
        statistics_(kOp, mean, rstd, layout_.statistics_size),
        needs_(needs),
        first_(group, x, layout_.output_channels, size_.pixels()),
        second_(group, x, layout_.channels[kReduce3x3] + layout_.channels[kReduce5x5],
                size_.pixels()) {
    check(grad, raw_tensors);
    for (int conv = 0; conv < kConvs; ++conv) raw_[conv] = by_pixels(raw_tensors[conv]);
    merged_grad_ = activation(layout_.merged_channels);
    for (Conv conv : {kConv3x3, kConv5x5, kPoolProjection}) {
      raw_grad_[conv] = activation(layout_.channels[conv]);
    }
    for (Conv conv : {kReduce3x3, kReduce5x5}) {
      reduced_grad_[conv] = activation(layout_.channels[conv]);
    }
    pooled_grad_ = needs_x() ? activation(x.size(1)) : empty_vector(x, 0, dtype_);
    dx_ = needs_x() ? activation(x.size(1)) : empty_vector(x, 0, dtype_);
    for (int conv = 0; conv < kConvs; ++conv) {
      dweight_[conv] = floats(needs_sums() ? layout_.channels[conv] : 0);
      dbias_[conv] = floats(needs_sums() ? layout_.channels[conv] : 0);
      conv_weight_grad_[conv] =
          needs_weight(conv) ? empty_like_weight(conv_weights[conv]) : empty_vector(x, 0, dtype_);
    }
    if (needs_sums()) {
      chunks_ = kernels::batch_norm_chunks(size_.pixels(), layout_.output_channels);
    }
    partials_ = floats(int64_t{chunks_} * 2 * layout_.statistics_size);
    counters_ = empty_vector(x, kernels::kConvCounterBytes, ScalarType::Byte);
    sums_ = empty_vector(x, kernels::kConvPartialBytes, ScalarType::Byte);
    plan_packing();
  }

  Result run(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
    launch_kernels(kOp, operands(), [&](cudaStream_t stream) { return launch(stream); });
    std::vector<Tensor> weight_grads, bias_grads;
    for (int conv = 0; conv < kConvs; ++conv) {
      weight_grads.push_back(vector_gradient(dweight_[conv], weights[conv], affine_));
      bias_grads.push_back(vector_gradient(dbias_[conv], biases[conv], affine_));
    }
    return {dx_,
            {conv_weight_grad_.begin(), conv_weight_grad_.end()},
            std::move(weight_grads),
            std::move(bias_grads)};
  }

 private:
  static bool is_merged(int conv) {
    return conv == kBranch1 || conv == kReduce3x3 || conv == kReduce5x5;
  }
  static Conv reduce_of(Conv conv) { return conv == kConv3x3 ? kReduce3x3 : kReduce5x5; }
  bool needs_x() const { return needs_[0]; }
  bool needs_weight(int conv) const { return needs_[1 + conv]; }
  // Whether anything depends on the sums of the batch norms.
  bool needs_sums() const { return training_ || affine_; }

  Tensor activation(int64_t channels) const {
    return empty_nhwc(x_, size_.n, channels, size_.h, size_.w);
  }
  Tensor floats(int64_t count) const { return empty_vector(x_, count, ScalarType::Float); }
  void check(const Tensor& grad, const std::array<Tensor, kConvs>& raw_tensors) const {
    Argument{kOp, "grad", grad}
        .is_dense_of(/*cuda=*/true)
        .has_shape({size_.n, layout_.output_channels, size_.h, size_.w})
        .has_dtype({dtype_});
    const auto check_saved = [&](const char* name, const Tensor& saved, int64_t channels,
                                 ScalarType expected) {
      Argument{kOp, name, saved}
          .is_dense_of(/*cuda=*/true)
          .has_shape({size_.n, channels, size_.h, size_.w})
          .has_dtype({expected});
    };
    check_saved("raw_1x1", raw_tensors[kBranch1], layout_.merged_channels, dtype_);
    check_saved("raw_3x3", raw_tensors[kConv3x3], layout_.channels[kConv3x3], dtype_);
    check_saved("raw_5x5", raw_tensors[kConv5x5], layout_.channels[kConv5x5], dtype_);
    check_saved("raw_pool", raw_tensors[kPoolProjection], layout_.channels[kPoolProjection],
                dtype_);
    check_saved("argmax", argmax_, x_.size(1), ScalarType::Byte);
    if (needs_.size() != 1 + kConvs) fail(kOp, "needs", "expected 7 values, got ", needs_.size());
  }

  // A convolution's raw output.
  Pixels raw(int conv) const {
    if (!is_merged(conv)) return Pixels(raw_[conv]);
    return Pixels(raw_[kBranch1]).slice(layout_.statistics[conv], layout_.channels[conv]);
  }
  // The gradient of it.
  Pixels raw_grad(int conv) const {
    if (!is_merged(conv)) return Pixels(raw_grad_[conv]);
    return Pixels(merged_grad_).slice(layout_.statistics[conv], layout_.channels[conv]);
  }
  // The gradient of the ReLU behind it.
  Pixels grad_behind(int conv) const {
    if (conv == kReduce3x3 || conv == kReduce5x5) return Pixels(reduced_grad_[conv]);
    return Pixels(grad_).slice(layout_.output[conv], layout_.channels[conv]);
  }

  // Filters for the data gradients: [r3, 9 * K3], [r5, 9 or 25 * K5], [C, Kpool], [C, merged].
  void plan_packing() {
    packing_.dtype = kernel_dtype(dtype_);
    packing_.weight_dtype = kernel_dtype(conv_weights_[0].scalar_type());
    const auto matrix = [&](int64_t rows, int64_t columns) {
      const int64_t shape[] = {rows, packed_columns(columns)};
      return torch::stable::empty({shape, 2}, dtype_, std::nullopt, x_.device());
    };
    for (Conv conv : {kConv3x3, kConv5x5, kPoolProjection}) {
      if (conv == kPoolProjection && !needs_x()) continue;
      const Tensor& weight = conv_weights_[conv];
      packed_[conv] = matrix(weight.size(1), weight.size(0) * weight.size(2) * weight.size(3));
      const int64_t columns = packed_[conv].size(1);
      packing_.filter[packing_.filters++] =
          packed_filter(weight, packed_[conv].data_ptr(), columns, columns);
    }
    packing_.filter[packing_.filters++] =
        zeros_of(counters_, static_cast<int64_t>(x_.element_size()));
    if (!needs_x()) return;
    packed_[kBranch1] = matrix(x_.size(1), layout_.merged_channels);
    const int64_t stride = packed_[kBranch1].size(1);
    for (Conv conv : kMerged) {
      const int64_t offset = layout_.statistics[conv];
      const int64_t columns =
          conv == kMerged.back() ? stride - offset : layout_.channels[conv];  // and the zeros
      packing_.filter[packing_.filters++] = packed_filter(
          conv_weights_[conv], at_element(packed_[kBranch1], offset), stride, columns);
    }
  }

  cudaError_t launch(cudaStream_t stream) const {
    cudaError_t error = kernels::pack_dgrad_weights(packing_, stream);
    for (const auto& convs : {std::vector<Conv>{kBranch1, kConv3x3, kConv5x5, kPoolProjection},
                              std::vector<Conv>{kReduce3x3, kReduce5x5}}) {
      const bool is_second = convs.front() == kReduce3x3;
      const auto norms = batch_norms(convs);
      if (error == cudaSuccess && needs_sums()) {
        error = kernels::batch_norm_relu_backward_reduce(norms, stream);
      }
      if (error == cudaSuccess) {
        error = (is_second ? second_ : first_).apply(norms, sums_of(convs), stream);
      }
      const auto dgrad = is_second ? dgrad_to_x() : dgrad_to_reduced();
      if (error == cudaSuccess && dgrad.problems > 0) error = kernels::conv_train(dgrad, stream);
      const auto wgrad = is_second ? wgrad_of_1x1() : wgrad_of_reduced();
      if (error == cudaSuccess && wgrad.problems > 0) error = kernels::conv_wgrad(wgrad, stream);
    }
    return error;
  }

  BatchNormVectors norm(int conv) const {
    const Statistics statistics = statistics_.from(layout_.statistics[conv]);
    return {gammas_[conv].data(), betas_[conv].data(), statistics.mean, statistics.rstd};
  }
  Window window(int conv) const { return same_window(conv_weights_[conv].size(2)); }

  kernels::BatchNormReluBackwardParams batch_norms(const std::vector<Conv>& convs) const {
    kernels::BatchNormReluBackwardParams params{};
    params.chunks = chunks_;
    params.pixels = params.count = size_.pixels();
    params.batch_statistics = training_;
    params.dtype = kernel_dtype(dtype_);
    for (Conv conv : convs) {
      params.item[params.items++] =
          backward_item(raw(conv), grad_behind(conv), raw_grad(conv), norm(conv),
                        data_of<float>(partials_) + int64_t{chunks_} * 2 * layout_.statistics[conv],
                        dweight_[conv], dbias_[conv]);
    }
    return params;
  }

  std::vector<Tensor> sums_of(const std::vector<Conv>& convs) const {
    std::vector<Tensor> sums;
    for (Conv conv : convs) sums.insert(sums.end(), {dbias_[conv], dweight_[conv]});
    return sums;
  }

  kernels::ConvTrainParams conv_params() const {
    return {.problem = {}, .problems = 0, .dtype = kernel_dtype(dtype_), .exact = exact_};
  }

  kernels::ConvTrainParams dgrad_to_reduced() const {
    kernels::ConvTrainParams params = conv_params();
    for (Conv conv : {kConv3x3, kConv5x5}) {
      params.problem[params.problems++] =
          train_problem(size_, window(conv), raw_grad(conv), packed_[conv].data_ptr(),
                        Pixels(reduced_grad_[reduce_of(conv)]));
    }
    if (needs_x()) {
      params.problem[params.problems++] =
          train_problem(size_, window(kPoolProjection), raw_grad(kPoolProjection),
                        packed_[kPoolProjection].data_ptr(), Pixels(pooled_grad_));
    }
    return params;
  }

  kernels::ConvTrainParams dgrad_to_x() const {
    kernels::ConvTrainParams params = conv_params();
    if (!needs_x()) return params;
    const Pixels pooled(pooled_grad_);
    auto& problem = params.problem[params.problems++];
    problem = train_problem(size_, window(kBranch1), Pixels(merged_grad_),
                            packed_[kBranch1].data_ptr(), Pixels(dx_));
    problem.pool_grad = pooled.data;
    problem.pool_argmax = data_of<uint8_t>(argmax_);
    problem.pool_stride = pooled.stride;
    return params;
  }

  kernels::ConvWgradParams wgrad_params() const {
    return {.problem = {},
            .problems = 0,
            .dtype = kernel_dtype(dtype_),
            .exact = exact_,
            .counters = data_of<int32_t>(counters_),
            .partials = data_of<float>(sums_)};
  }

  kernels::ConvWgradParams wgrad_of_reduced() const {
    kernels::ConvWgradParams params = wgrad_params();
    for (Conv conv : {kConv3x3, kConv5x5}) {
      if (!needs_weight(conv)) continue;
      auto& problem = params.problem[params.problems++];
      problem = wgrad_problem(size_, window(conv), raw(reduce_of(conv)), raw_grad(conv));
      normalize_on_load(problem, norm(reduce_of(conv)));
      add_segment(problem, conv_weight_grad_[conv]);
    }
    return params;
  }

  kernels::ConvWgradParams wgrad_of_1x1() const {
    kernels::ConvWgradParams params = wgrad_params();
    const bool whole =
        needs_weight(kBranch1) && needs_weight(kReduce3x3) && needs_weight(kReduce5x5);
    if (whole) {
      auto& problem = params.problem[params.problems++];
      problem = wgrad_problem(size_, window(kBranch1), Pixels(x_), Pixels(merged_grad_));
      for (Conv conv : kMerged) add_segment(problem, conv_weight_grad_[conv]);
    }
    for (Conv conv : {kBranch1, kReduce3x3, kReduce5x5, kPoolProjection}) {
      if (!needs_weight(conv) || (whole && conv != kPoolProjection)) continue;
      auto& problem = params.problem[params.problems++];
      problem = wgrad_problem(size_, window(conv), Pixels(x_), raw_grad(conv));
      if (conv == kPoolProjection) problem.prologue = kernels::WgradPrologue::kMaxPool;
      add_segment(problem, conv_weight_grad_[conv]);
    }
    return params;
  }

  std::vector<Operand> operands() const {
    std::vector<Operand> all{{"x", x_, Use::kRead},
                             {"grad", grad_, Use::kRead},
                             {"argmax", argmax_, Use::kRead},
                             {"mean", statistics_.mean(), Use::kRead},
                             {"rstd", statistics_.rstd(), Use::kRead},
                             {"merged_grad", merged_grad_, Use::kScratch},
                             {"pooled_grad", pooled_grad_, Use::kScratch},
                             {"dx", dx_, Use::kWrite},
                             {"partials", partials_, Use::kScratch},
                             {"counters", counters_, Use::kScratch},
                             {"sums", sums_, Use::kScratch}};
    for (int conv = 0; conv < kConvs; ++conv) {
      if (conv != kReduce3x3 && conv != kReduce5x5) all.push_back({"raw", raw_[conv], Use::kRead});
      all.push_back({"conv_weight", conv_weights_[conv], Use::kRead});
      all.push_back({"gamma", gammas_[conv].tensor(), Use::kRead});
      all.push_back({"beta", betas_[conv].tensor(), Use::kRead});
      all.push_back({"dgamma", dweight_[conv], Use::kWrite});
      all.push_back({"dbeta", dbias_[conv], Use::kWrite});
      all.push_back({"dw", conv_weight_grad_[conv], Use::kWrite});
    }
    for (Conv conv : {kConv3x3, kConv5x5, kPoolProjection}) {
      all.push_back({"raw_grad", raw_grad_[conv], Use::kScratch});
    }
    for (Conv conv : {kReduce3x3, kReduce5x5}) {
      all.push_back({"reduced_grad", reduced_grad_[conv], Use::kScratch});
    }
    for (Conv conv : {kConv3x3, kConv5x5}) all.push_back({"packed", packed_[conv], Use::kScratch});
    if (needs_x()) {
      all.push_back({"packed", packed_[kPoolProjection], Use::kScratch});
      all.push_back({"packed", packed_[kBranch1], Use::kScratch});
    }
    first_.add_to(all);
    second_.add_to(all);
    return all;
  }

  const Layout layout_;
  const ImageSize size_;
  const ScalarType dtype_;
  const bool training_, exact_, affine_;
  const Tensor x_, grad_, argmax_;
  const std::vector<Tensor>& conv_weights_;
  const std::vector<Parameter> gammas_, betas_;
  const SavedStatistics statistics_;
  const std::vector<bool>& needs_;
  const SharedSums first_, second_;      // of the two stages
  std::array<Tensor, kConvs> raw_;       // [kBranch1]: of all that is merged
  std::array<Tensor, kConvs> raw_grad_;  // of what is not merged
  std::array<Tensor, kConvs> reduced_grad_;
  std::array<Tensor, kConvs> dweight_, dbias_, conv_weight_grad_;
  std::array<Tensor, kConvs> packed_;  // [kBranch1]: of all that is merged
  Tensor merged_grad_, pooled_grad_, dx_;
  Tensor partials_, counters_, sums_;
  int32_t chunks_ = 0;
  kernels::PackWeightsParams packing_{};
};

Result inception_backward(Tensor grad, Tensor x, std::vector<Tensor> conv_weights,
                          std::vector<Tensor> weights, std::vector<Tensor> biases, Tensor raw_1x1,
                          Tensor raw_3x3, Tensor raw_5x5, Tensor raw_pool, Tensor /*reduced_3x3*/,
                          Tensor /*reduced_5x5*/, Tensor /*pooled*/, Tensor argmax, Tensor mean,
                          Tensor rstd, bool training, std::vector<bool> needs, bool exact,
                          bool affine, std::string group_name, int64_t group_size) {
  const ProcessGroup group(kOp, group_name, group_size, training);
  // In the order of Conv; the merged convolution stands for its three.
  const std::array<Tensor, kConvs> raw{raw_1x1, raw_1x1, raw_3x3, raw_1x1, raw_5x5, raw_pool};
  return Backward(grad, x, conv_weights, weights, biases, raw, argmax, mean, rstd, training, needs,
                  exact, affine, group)
      .run(weights, biases);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("inception_backward", TORCH_BOX(&inception_backward));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
