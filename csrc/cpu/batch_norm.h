// Batch normalisation + ReLU over NHWC tensors seen as P = N * H * W pixels of C channels.
//
//   statistics       mean = sum x / P, m2 = sum (x - mean)^2
//   finalize         rstd = 1 / sqrt(m2 / P + eps), running statistics
//   apply            y = relu((x - mean) * (gamma * rstd) + beta)
//   backward_reduce  sum_dy = sum dy', sum_dy_xhat = sum dy' * xhat
//   backward_apply   dx = gamma * rstd * (dy' - sum_dy / P - xhat * sum_dy_xhat / P)
//
// with xhat = (x - mean) * rstd and dy' = (y <= 0 ? 0 : dy), y recomputed from x.
//
// Every activation is a channel slice of a tensor that may be wider: a pointer to the slice's
// first element, and the number of elements from one pixel to the next (stride >= C). No element
// outside the slice is read or written. Pointers need only the alignment of their element.
// Activations are float32 or bfloat16, all of one call of one dtype; parameters, statistics and
// all arithmetic are float32 or wider.
//
// Results do not depend on the number of threads, bit for bit. They may differ in rounding from
// one Isa to another.
//
// Preconditions, not checked: valid non-null pointers except where a comment says otherwise;
// an output overlaps an input only where a comment allows it. C = 0 does nothing.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace inception_ext::cpu {

// Floats of workspace that statistics and backward_reduce need; any alignment of a float.
int64_t batch_norm_workspace(int64_t pixels, int64_t channels);

struct BatchNormStatisticsParams {
  const void* x;     // [P, C], dtype
  int64_t x_stride;  // elements from pixel to pixel
  DType dtype;
  int64_t pixels;    // P
  int64_t channels;  // C
  float* mean;       // [C]
  float* m2;         // [C], sum of squared deviations from the unrounded mean
  float* workspace;  // [batch_norm_workspace(P, C)]
  ParallelFor parallel;
};

// P = 0 writes zeros. A channel with a NaN or an infinity gets a NaN in m2.
void batch_norm_statistics(const BatchNormStatisticsParams& params);

struct BatchNormFinalizeParams {
  const float* mean;  // [C]
  const float* m2;    // [C]
  int64_t count;      // values per channel behind mean and m2
  int64_t channels;   // C
  double eps;
  double momentum;      // weight of the new value
  float* rstd;          // [C]
  float* running_mean;  // [C], updated; may be nullptr
  float* running_var;   // [C], updated with the unbiased variance; may be nullptr
};

// count = 0 leaves the running statistics as they are. count = 1 gives a NaN in running_var, as
// torch does.
void batch_norm_finalize(const BatchNormFinalizeParams& params);

struct BatchNormRstdParams {
  const float* running_var;  // [C]
  int64_t channels;          // C
  double eps;
  float* rstd;  // [C]
};

// rstd of evaluation mode.
void batch_norm_rstd(const BatchNormRstdParams& params);

struct BatchNormReluApplyParams {
  const void* x;  // [P, C], dtype
  int64_t x_stride;
  void* y;  // [P, C], dtype; may be x itself, with the same stride
  int64_t y_stride;
  DType dtype;
  int64_t pixels;      // P
  int64_t channels;    // C
  const float* mean;   // [C]
  const float* rstd;   // [C]
  const float* gamma;  // [C], may be nullptr: 1
  const float* beta;   // [C], may be nullptr: 0
  ParallelFor parallel;
};

// The ReLU keeps NaN.
void batch_norm_relu_apply(const BatchNormReluApplyParams& params);

// Of both halves of the backward.
struct BatchNormReluBackwardParams {
  const void* x;  // [P, C], dtype
  int64_t x_stride;
  const void* dy;  // [P, C], dtype
  int64_t dy_stride;
  void* dx;  // [P, C], dtype, of apply; may be x or dy itself, with the same stride
  int64_t dx_stride;
  DType dtype;
  int64_t pixels;         // P
  int64_t channels;       // C
  const float* mean;      // [C]
  const float* rstd;      // [C]
  const float* gamma;     // [C], may be nullptr: 1
  const float* beta;      // [C], may be nullptr: 0
  bool batch_statistics;  // false: mean and rstd are constants (evaluation mode)
  float* sum_dy;          // [C], the gradient of beta; apply reads it if batch_statistics
  float* sum_dy_xhat;     // [C], the gradient of gamma; likewise
  float* workspace;       // [batch_norm_workspace(P, C)], of reduce
  ParallelFor parallel;
};

// Writes sum_dy and sum_dy_xhat; P = 0 writes zeros.
void batch_norm_relu_backward_reduce(const BatchNormReluBackwardParams& params);

// Writes dx.
void batch_norm_relu_backward_apply(const BatchNormReluBackwardParams& params);

}  // namespace inception_ext::cpu
