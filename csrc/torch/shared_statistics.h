// Batch norms over the batches of a group of processes: what a stage, the batch norms that are
// finished together, exchanges forward and backward. Of a process alone everything is one launch.
#pragma once

#include <vector>

#include "kernels/batch_norm.h"
#include "torch/cuda_launch.h"
#include "torch/nhwc.h"
#include "torch/process_group.h"
#include "torch/stable.h"

namespace inception_ext {

// Forward. Every process finishes its own statistics, all gather those of all, and everyone merges
// them in the same order.
class SharedStatistics {
 public:
  // Of batch norms of `channels` together. The group must outlive this.
  SharedStatistics(const ProcessGroup& group, const Tensor& like, int64_t channels)
      : group_(group),
        channels_(channels),
        own_(floats(like, group.is_alone() ? 0 : row())),
        all_(floats(like, group.is_alone() ? 0 : group.size() * row())) {}

  // As batch_norm_finalize, of params with the tiles of this process.
  cudaError_t finalize(const kernels::BatchNormFinalizeParams& params, cudaStream_t stream) const {
    if (group_.is_alone()) return kernels::batch_norm_finalize(params, stream);
    kernels::BatchNormFinalizeParams own = params, all = params;
    float *one = static_cast<float*>(own_.data_ptr()), *rows = static_cast<float*>(all_.data_ptr());
    int64_t offset = 0;
    for (int i = 0; i < params.items; ++i) {
      auto& part = own.item[i];
      part.mean = one + offset;
      part.m2 = one + channels_ + offset;
      part.count = i == 0 ? reinterpret_cast<int32_t*>(one + 2 * channels_) : nullptr;
      part.rstd = part.running_mean = part.running_var = nullptr;
      auto& whole = all.item[i];
      whole.tile_mean = rows + offset;
      whole.x = nullptr;
      whole.tile_m2 = rows + channels_ + offset;
      whole.tile_pixels = reinterpret_cast<const int32_t*>(rows + 2 * channels_);
      whole.tile_pixels_stride = whole.tile_stride = row();
      whole.tiles = static_cast<int32_t>(group_.size());
      offset += params.item[i].channels;
    }
    const cudaError_t error = kernels::batch_norm_finalize(own, stream);
    if (error != cudaSuccess) return error;
    group_.gather(own_, all_);
    return kernels::batch_norm_finalize(all, stream);
  }

  void add_to(std::vector<Operand>& operands) const {
    operands.push_back({"own_statistics", own_, Use::kWrite});
    operands.push_back({"all_statistics", all_, Use::kRead});
  }

 private:
  // A mean and an m2 of each channel, then as an int32 how many values are behind them.
  int64_t row() const { return 2 * channels_ + 1; }
  static Tensor floats(const Tensor& like, int64_t count) {
    return empty_vector(like, count, ScalarType::Float);
  }

  const ProcessGroup& group_;
  int64_t channels_;
  Tensor own_, all_;
};

// Backward. Every process finishes its own sums, which are its dgamma and dbeta, and reads those of
// all processes for dx.
class SharedSums {
 public:
  // Of batch norms of `channels` together, over `pixels` of this process.
  SharedSums(const ProcessGroup& group, const Tensor& like, int64_t channels, int64_t pixels)
      : group_(group),
        pixels_(empty_vector(like, group.is_alone() ? 0 : 1, ScalarType::Float)),
        sums_(empty_vector(like, group.is_alone() ? 0 : 2 * channels + 1, ScalarType::Float)) {
    if (!group.is_alone()) torch::stable::fill_(pixels_, static_cast<double>(pixels));
  }

  // As batch_norm_relu_backward_apply; `own`: dbeta, then dgamma, of each item in turn.
  cudaError_t apply(const kernels::BatchNormReluBackwardParams& params, std::vector<Tensor> own,
                    cudaStream_t stream) const {
    if (group_.is_alone()) return kernels::batch_norm_relu_backward_apply(params, stream);
    kernels::BatchNormReluBackwardParams finish = params, all = params;
    float* sums = static_cast<float*>(sums_.data_ptr());
    for (int i = 0; i < params.items; ++i) {
      finish.item[i].dx = nullptr;
      all.item[i].partials = sums;
      all.item[i].dgamma = all.item[i].dbeta = nullptr;
      sums += 2 * params.item[i].channels;
    }
    all.chunks = 1;
    all.total = sums;
    const cudaError_t error = kernels::batch_norm_relu_backward_apply(finish, stream);
    if (error != cudaSuccess) return error;
    own.push_back(pixels_);
    group_.add_up(own, sums_);
    return kernels::batch_norm_relu_backward_apply(all, stream);
  }

  void add_to(std::vector<Operand>& operands) const {
    operands.push_back({"all_sums", sums_, Use::kRead});
  }

 private:
  const ProcessGroup& group_;
  Tensor pixels_, sums_;
};

}  // namespace inception_ext
