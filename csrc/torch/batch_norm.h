// Batch normalisation + ReLU on the CPU, in terms of pixel slices: shared by the batch_norm_relu
// and the inception ops.
#pragma once

#include <vector>

#include "torch/checks.h"
#include "torch/nhwc.h"

namespace inception_ext {

// A per-channel parameter [C] read as float32.
class Parameter {
 public:
  Parameter(const char* op, const char* name, const Tensor& tensor, int64_t channels);
  const float* data() const { return static_cast<const float*>(values_.data_ptr()); }

 private:
  Tensor values_;
};

// Running statistics [C], in training updated in float32 and written back in their own dtype.
class RunningStatistic {
 public:
  RunningStatistic(const char* op, const char* name, const Tensor& tensor, int64_t channels,
                   bool training);
  float* data() const { return static_cast<float*>(values_.data_ptr()); }
  void write_back();

 private:
  Tensor tensor_;
  Tensor values_;
};

// One batch norm's parameters.
struct BatchNorm {
  const Parameter& weight;
  const Parameter& bias;
};

// Mean and rstd of one or more batch norms over one raw convolution output, [C] each.
struct Statistics {
  float* mean;
  float* rstd;
};

// The mean and rstd [C] that forward returned, as backward gets them.
class SavedStatistics {
 public:
  SavedStatistics(const char* op, const Tensor& mean, const Tensor& rstd, int64_t channels);
  // Those of the channels from `first` on.
  Statistics from(int64_t first) const;

 private:
  Tensor mean_;
  Tensor rstd_;
};

// mean and sum of squared deviations of x's pixels; both [C].
void batch_norm_statistics_pixels(const Pixels& x, ScalarType dtype, float* mean, float* m2);

// y = relu(batch norm of x); x and y are slices of equal size.
void batch_norm_relu_apply_pixels(const Pixels& x, const Pixels& y, ScalarType dtype,
                                  const Statistics& statistics, const BatchNorm& bn);

// sum_dy and sum_dy_xhat, [C] each, are the gradients of bias and weight; dx of x.
void batch_norm_relu_backward_pixels(const Pixels& grad, const Pixels& x, const Pixels& dx,
                                     ScalarType dtype, const Statistics& statistics,
                                     const BatchNorm& bn, bool training, float* sum_dy,
                                     float* sum_dy_xhat);

}  // namespace inception_ext
