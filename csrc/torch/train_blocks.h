// Convolution + batch norm + ReLU on the CUDA kernels of training: params from tensors.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/batch_norm.h"
#include "kernels/conv_train.h"
#include "kernels/conv_wgrad.h"
#include "kernels/pack_weights.h"
#include "torch/batch_norm_vectors.h"
#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {

// N, C, H, W, checked against what the kernels count in.
struct ImageSize {
  ImageSize(const char* op, const Tensor& x) : n(x.size(0)), h(x.size(2)), w(x.size(3)) {
    constexpr int64_t kLargest = 1 << 30;
    constexpr int64_t kSide = kernels::kMaxConvSide / 2;
    if (pixels() > kLargest || h > kSide || w > kSide) {
      fail(op, "x", "expected at most 2^30 pixels, ", kSide, " a side, got shape ", shape_text(x));
    }
  }
  ImageSize(int64_t n, int64_t h, int64_t w) : n(n), h(h), w(w) {}
  int64_t pixels() const { return n * h * w; }

  int64_t n, h, w;
};

// A square filter over an image.
struct Window {
  int64_t kernel, stride, padding;

  int64_t output(int64_t input) const { return (input + 2 * padding - kernel) / stride + 1; }
  ImageSize output(const ImageSize& size) const { return {size.n, output(size.h), output(size.w)}; }
};

// Stride 1, with padding that keeps height and width; kernel 1, 3 or 5.
inline Window same_window(int64_t kernel) { return {kernel, 1, kernel / 2}; }

// The convolution of x, images of `size`, to y; `weight` packed.
inline kernels::ConvTrainProblem train_problem(const ImageSize& size, const Window& window,
                                               const Pixels& x, const void* weight,
                                               const Pixels& y) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  const ImageSize output = window.output(size);
  kernels::ConvTrainProblem problem{};
  problem.conv = {.x = x.data,
                  .weight = weight,
                  .bias = nullptr,
                  .x_stride = x.stride,
                  .batch = narrow(size.n),
                  .input_h = narrow(size.h),
                  .input_w = narrow(size.w),
                  .channels = narrow(x.channels),
                  .output_h = narrow(output.h),
                  .output_w = narrow(output.w),
                  .filters = narrow(y.channels),
                  .kernel_h = narrow(window.kernel),
                  .kernel_w = narrow(window.kernel),
                  .stride_h = narrow(window.stride),
                  .stride_w = narrow(window.stride),
                  .padding_h = narrow(window.padding),
                  .padding_w = narrow(window.padding),
                  .max_pool = false,
                  .relu = false,
                  .segments = 1,
                  .segment = {{y.data, y.stride, narrow(y.channels)}, {}, {}}};
  return problem;
}

// One batch norm: its parameters, and its part of vectors that several share.
struct BatchNormVectors {
  const float* gamma;
  const float* beta;
  float* mean;
  float* rstd;
};

inline void normalize_on_load(kernels::ConvTrainProblem& problem, const BatchNormVectors& bn) {
  problem.prologue = kernels::ConvPrologue::kBatchNormRelu;
  problem.mean = bn.mean;
  problem.rstd = bn.rstd;
  problem.gamma = bn.gamma;
  problem.beta = bn.beta;
}

inline void normalize_on_load(kernels::WgradProblem& problem, const BatchNormVectors& bn) {
  problem.prologue = kernels::WgradPrologue::kBatchNormRelu;
  problem.mean = bn.mean;
  problem.rstd = bn.rstd;
  problem.gamma = bn.gamma;
  problem.beta = bn.beta;
}

// The gradient of a convolution's weight: x, images of `size`, and the gradient of its output.
inline kernels::WgradProblem wgrad_problem(const ImageSize& size, const Window& window,
                                           const Pixels& x, const Pixels& dy) {
  const kernels::ConvProblem conv = train_problem(size, window, x, nullptr, dy).conv;
  kernels::WgradProblem problem{};
  problem.dy = dy.data;
  problem.x = x.data;
  problem.dy_stride = dy.stride;
  problem.x_stride = x.stride;
  problem.batch = conv.batch;
  problem.input_h = conv.input_h;
  problem.input_w = conv.input_w;
  problem.channels = conv.channels;
  problem.output_h = conv.output_h;
  problem.output_w = conv.output_w;
  problem.filters = conv.filters;
  problem.kernel_h = conv.kernel_h;
  problem.kernel_w = conv.kernel_w;
  problem.stride_h = conv.stride_h;
  problem.stride_w = conv.stride_w;
  problem.padding_h = conv.padding_h;
  problem.padding_w = conv.padding_w;
  return problem;
}

// dw [K, C, R, S] takes the next K filters of the problem.
inline void add_segment(kernels::WgradProblem& problem, const Tensor& dw) {
  problem.segment[problem.segments++] = {.dw = dw.data_ptr(),
                                         .stride_k = dw.stride(0),
                                         .stride_r = dw.stride(2),
                                         .stride_s = dw.stride(3),
                                         .stride_c = dw.stride(1),
                                         .filters = static_cast<int32_t>(dw.size(0)),
                                         .is_float32 = dw.scalar_type() == ScalarType::Float};
}

// Room for a weight's gradient, in the layout of the weight, which is the one that autograd keeps.
inline Tensor empty_like_weight(const Tensor& weight) {
  const bool is_nhwc = !weight.is_contiguous() && pixel_stride(weight) == weight.size(1);
  return torch::stable::empty(weight.sizes(), weight.scalar_type(), std::nullopt, weight.device(),
                              std::nullopt,
                              is_nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// What turns running statistics into the mean and rstd of evaluation mode: see batch_norm_finalize.
inline kernels::BatchNormFinalizeItem running_item(const RunningStatistic& mean,
                                                   const RunningStatistic& var, int64_t channels) {
  kernels::BatchNormFinalizeItem item{};
  item.tile_mean = mean.data();
  item.tile_m2 = var.data();
  item.tile_stride = channels;
  item.pixels = item.rows_per_tile = item.tiles = 1;
  item.channels = static_cast<int32_t>(channels);
  return item;
}

// Statistics of `raw` that conv_train left in tiles of `rows` pixels, each `stride` channels wide.
inline kernels::BatchNormFinalizeItem tiles_item(const Pixels& raw, kernels::DType dtype,
                                                 const float* tile_mean, const float* tile_m2,
                                                 int64_t stride, int32_t rows,
                                                 const RunningStatistic& mean,
                                                 const RunningStatistic& var) {
  kernels::BatchNormFinalizeItem item{};
  item.tile_mean = tile_mean;
  item.x = raw.data;
  item.x_stride = raw.stride;
  item.dtype = dtype;
  item.tile_m2 = tile_m2;
  item.tile_stride = stride;
  item.pixels = raw.count;
  item.rows_per_tile = rows;
  item.tiles = static_cast<int32_t>((raw.count + rows - 1) / rows);
  item.channels = static_cast<int32_t>(raw.channels);
  item.running_mean = mean.data();
  item.running_var = var.data();
  return item;
}

// The running statistics of a batch norm, where it has some.
inline void add_running(std::vector<Operand>& operands, const RunningStatistic& mean,
                        const RunningStatistic& var, bool training) {
  const Use use = training ? Use::kUpdate : Use::kRead;
  if (mean.tensor()) operands.push_back({"running_mean", *mean.tensor(), use});
  if (var.tensor()) operands.push_back({"running_var", *var.tensor(), use});
}

// Rows of tile statistics to make room for.
inline int64_t most_tiles(int64_t pixels) {
  return (pixels + kernels::kLeastConvTrainRows - 1) / kernels::kLeastConvTrainRows;
}

inline kernels::BatchNormReluItem apply_item(const Pixels& raw, const Pixels& y,
                                             const BatchNormVectors& bn) {
  return {.x = raw.data,
          .y = y.data,
          .x_stride = raw.stride,
          .y_stride = y.stride,
          .channels = static_cast<int32_t>(raw.channels),
          .mean = bn.mean,
          .rstd = bn.rstd,
          .gamma = bn.gamma,
          .beta = bn.beta};
}

// dgamma, dbeta [C], or [0]: not needed.
inline kernels::BatchNormReluBackwardItem backward_item(const Pixels& raw, const Pixels& dy,
                                                        const Pixels& dx,
                                                        const BatchNormVectors& bn, float* partials,
                                                        const Tensor& dgamma, const Tensor& dbeta) {
  return {.x = raw.data,
          .dy = dy.data,
          .argmax = nullptr,
          .dx = dx.data,
          .x_stride = raw.stride,
          .dy_stride = dy.stride,
          .dx_stride = dx.stride,
          .channels = static_cast<int32_t>(raw.channels),
          .mean = bn.mean,
          .rstd = bn.rstd,
          .gamma = bn.gamma,
          .beta = bn.beta,
          .partials = partials,
          .dgamma = dgamma.numel() ? static_cast<float*>(dgamma.data_ptr()) : nullptr,
          .dbeta = dbeta.numel() ? static_cast<float*>(dbeta.data_ptr()) : nullptr};
}

// A filter without values for pack_weights: sets the counters of conv_wgrad to 0, and it leaves
// them so.
inline kernels::PackedFilter zeros_of(const Tensor& counters, int64_t element_size) {
  constexpr int32_t kRows = 32;
  const int64_t columns = kernels::kConvCounterBytes / element_size / kRows;
  return {.weight = nullptr,
          .packed = counters.data_ptr(),
          .stride = {},
          .packed_stride = columns,
          .filters = 0,
          .channels = kRows,
          .kernel_h = 1,
          .kernel_w = 1,
          .packed_columns = static_cast<int32_t>(columns)};
}

// A row of a packed weight matrix.
inline int64_t packed_columns(int64_t elements) { return (elements + 7) / 8 * 8; }

// The convolution weights [K, C, R, S] as pack_weights reads them.
inline kernels::PackedFilter packed_filter(const Tensor& weight, void* packed,
                                           int64_t packed_stride, int64_t columns) {
  return {.weight = weight.data_ptr(),
          .packed = packed,
          .stride = {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)},
          .packed_stride = packed_stride,
          .filters = static_cast<int32_t>(weight.size(0)),
          .channels = static_cast<int32_t>(weight.size(1)),
          .kernel_h = static_cast<int32_t>(weight.size(2)),
          .kernel_w = static_cast<int32_t>(weight.size(3)),
          .packed_columns = static_cast<int32_t>(columns)};
}

// Whether a weight can be read as it is: rows of R * S * C elements that need no zeros behind them.
inline bool is_packed(const Tensor& weight, ScalarType dtype) {
  const int64_t c = weight.size(1), r = weight.size(2), s = weight.size(3);
  const auto stride_is = [&](int d, int64_t stride) {
    return weight.size(d) == 1 || weight.stride(d) == stride;
  };
  return weight.scalar_type() == dtype && c * r * s % 8 == 0 && stride_is(0, r * s * c) &&
         stride_is(1, 1) && stride_is(2, s * c) && stride_is(3, c) &&
         reinterpret_cast<uintptr_t>(weight.data_ptr()) % 16 == 0;
}

// Weights [K, C, R, S] as conv_train reads them: packed and cast where they have to be.
class FilterMatrices {
 public:
  FilterMatrices(const std::vector<Tensor>& weights, const Tensor& x) : weights_(weights) {
    const ScalarType dtype = x.scalar_type();
    if (std::all_of(weights.begin(), weights.end(),
                    [&](const Tensor& weight) { return is_packed(weight, dtype); })) {
      return;
    }
    params_.dtype = kernel_dtype(dtype);
    params_.weight_dtype = kernel_dtype(weights[0].scalar_type());
    for (const Tensor& weight : weights) {
      const int64_t columns = packed_columns(weight.size(1) * weight.size(2) * weight.size(3));
      const int64_t shape[] = {weight.size(0), columns};
      packed_.push_back(
          torch::stable::empty({shape, 2}, dtype, std::nullopt, x.device(), std::nullopt));
      params_.filter[params_.filters++] =
          packed_filter(weight, packed_.back().data_ptr(), columns, columns);
    }
  }

  const Tensor& operator[](int conv) const {
    return packed_.empty() ? weights_[conv] : packed_[conv];
  }

  cudaError_t pack(cudaStream_t stream) const {
    return packed_.empty() ? cudaSuccess : kernels::pack_fprop_weights(params_, stream);
  }

  void add_to(std::vector<Operand>& operands) const {
    for (const Tensor& weight : weights_) operands.push_back({"weight", weight, Use::kRead});
    for (const Tensor& packed : packed_) operands.push_back({"packed", packed, Use::kWrite});
  }

 private:
  const std::vector<Tensor>& weights_;
  std::vector<Tensor> packed_;  // empty: none is needed
  kernels::PackWeightsParams params_{};
};

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline char* at_element(const Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.data_ptr()) +
         element * static_cast<int64_t>(tensor.element_size());
}

}  // namespace inception_ext
