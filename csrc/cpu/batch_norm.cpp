// What of batch normalisation touches C values only, and the way to the table of the ISA.
#include "batch_norm.h"

#include <cmath>

#include "batch_norm_plan.h"
#include "kernels.h"

namespace inception_ext::cpu {

int64_t batch_norm_workspace(int64_t pixels, int64_t channels) {
  if (pixels <= 0 || channels <= 0) return 0;
  return chunk_count(pixels, channels) * kStatisticsScratch * padded_channels(channels);
}

void batch_norm_statistics(const BatchNormStatisticsParams& params) {
  kernels().batch_norm_statistics(params);
}

void batch_norm_finalize(const BatchNormFinalizeParams& params) {
  const double count = static_cast<double>(params.count);
  for (int64_t c = 0; c < params.channels; ++c) {
    const double m2 = params.m2[c];
    const double variance = params.count > 0 ? m2 / count : 0.0;
    params.rstd[c] = static_cast<float>(1.0 / std::sqrt(variance + params.eps));
  }
  if (params.count <= 0) return;
  const auto update = [&params](float* running, int64_t c, double value) {
    running[c] = static_cast<float>((1.0 - params.momentum) * running[c] + params.momentum * value);
  };
  for (int64_t c = 0; c < params.channels; ++c) {
    if (params.running_mean != nullptr) update(params.running_mean, c, params.mean[c]);
    if (params.running_var != nullptr) update(params.running_var, c, params.m2[c] / (count - 1.0));
  }
}

void batch_norm_rstd(const BatchNormRstdParams& params) {
  for (int64_t c = 0; c < params.channels; ++c) {
    params.rstd[c] = static_cast<float>(1.0 / std::sqrt(params.running_var[c] + params.eps));
  }
}

void batch_norm_relu_apply(const BatchNormReluApplyParams& params) {
  kernels().batch_norm_relu_apply(params);
}

void batch_norm_relu_backward_reduce(const BatchNormReluBackwardParams& params) {
  kernels().batch_norm_relu_backward_reduce(params);
}

void batch_norm_relu_backward_apply(const BatchNormReluBackwardParams& params) {
  kernels().batch_norm_relu_backward_apply(params);
}

}  // namespace inception_ext::cpu
