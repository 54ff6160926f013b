// Batch normalisation + ReLU on the CPU, in terms of pixel slices: shared by the batch_norm_relu
// and the inception ops.
#pragma once

#include "torch/batch_norm_vectors.h"
#include "torch/nhwc.h"

namespace inception_ext {

// One batch norm's parameters.
struct BatchNorm {
  const Parameter& weight;
  const Parameter& bias;
};

// mean and sum of squared deviations of x's pixels; both [C].
void batch_norm_statistics_pixels(const Pixels& x, ScalarType dtype, float* mean, float* m2);

// y = relu(batch norm of x); x and y are slices of equal size.
void batch_norm_relu_apply_pixels(const Pixels& x, const Pixels& y, ScalarType dtype,
                                  const Statistics& statistics, const BatchNorm& bn);

// sum_dy and sum_dy_xhat, [C] each, are the gradients of bias and weight, and nullptr where neither
// these nor, in training, dx need them; dx of x.
void batch_norm_relu_backward_pixels(const Pixels& grad, const Pixels& x, const Pixels& dx,
                                     ScalarType dtype, const Statistics& statistics,
                                     const BatchNorm& bn, bool training, float* sum_dy,
                                     float* sum_dy_xhat);

}  // namespace inception_ext
