// Batch normalisation + ReLU over NHWC tensors seen as P = N * H * W pixels of C channels.
//
//   tile statistics  mean and m2 = sum (x - mean)^2 of every run of rows_per_tile pixels
//   finalize         mean, rstd = 1 / sqrt(m2 / P + eps), running statistics
//   apply            y = relu((x - mean) * (gamma * rstd) + beta)
//   backward_reduce  partial sums of dy' and dy' * xhat
//   backward_apply   dx = gamma * rstd * (dy' - sum_dy / P - xhat * sum_dy_xhat / P)
//
// with xhat = (x - mean) * rstd and dy' = (y <= 0 ? 0 : dy), y recomputed from x.
//
// Every launcher starts at most one kernel on `stream` of the current device, allocates nothing and
// waits for nothing; P = 0 and C = 0 are allowed. cudaErrorInvalidValue: a size, dtype or null
// pointer it does not take. Activations are channel slices: a pointer, and the elements from one
// pixel to the next (at least C). Statistics, gamma, beta and their gradients are float32, and so
// is all arithmetic. Sums have a fixed order: the same input gives the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

// Parts into which tile statistics and backward_reduce cut the pixels. `channels`: those of all
// items of a launch. 0 for no pixels.
int32_t batch_norm_chunks(int64_t pixels, int64_t channels);

struct BatchNormTileStatisticsParams {
  const void* x;     // [P, C], dtype
  int64_t x_stride;  // elements from one pixel to the next
  int64_t pixels;    // P
  int32_t channels;  // C
  int32_t tiles;     // batch_norm_chunks(P, C)
  float* tile_mean;  // [tiles, C], of ceil(P / tiles) pixels each, the last of what is left; less
                     // the tile's first pixel, so that float32 holds what tells large means apart
  float* tile_m2;    // [tiles, C]
  DType dtype;
};

cudaError_t batch_norm_tile_statistics(const BatchNormTileStatisticsParams& params,
                                       cudaStream_t stream);

constexpr int kMaxBatchNormFinalizeItems = 6;

struct BatchNormFinalizeItem {
  const float* tile_mean;      // [tiles, C], less the tile's first pixel of x
  const void* x;               // [P, C], dtype; nullptr: tile_mean is the mean itself
  int64_t x_stride;            // elements from one pixel to the next
  DType dtype;                 // of x
  const float* tile_m2;        // [tiles, C], sum of squared deviations from the tile's mean
  const int32_t* tile_pixels;  // [tiles], not with x; nullptr: rows_per_tile, the last what is left
  int64_t tile_pixels_stride;  // elements from one tile to the next, of tile_pixels
  int64_t tile_stride;         // and of tile_mean and tile_m2
  int64_t pixels;              // P; not used with tile_pixels
  int32_t rows_per_tile;       // not used with tile_pixels
  int32_t tiles;
  int32_t channels;     // C
  float* mean;          // [C]
  float* m2;            // [C], may be nullptr
  float* rstd;          // [C], may be nullptr
  int32_t* count;       // [1], gets P; may be nullptr
  float* running_mean;  // [C], updated; may be nullptr
  float* running_var;   // [C], updated with the unbiased variance; may be nullptr
  float momentum;       // weight of the new value
  float eps;
};

struct BatchNormFinalizeParams {
  BatchNormFinalizeItem item[kMaxBatchNormFinalizeItems];
  int32_t items;
};

// No pixels: mean 0, rstd 1 / sqrt(eps), and running statistics stay as they are. One pixel gives a
// NaN in running_var, as torch does. One tile of one pixel with a running mean and variance in the
// place of its mean and m2 gives the statistics of evaluation mode.
cudaError_t batch_norm_finalize(const BatchNormFinalizeParams& params, cudaStream_t stream);

constexpr int kMaxBatchNormItems = 4;

struct BatchNormReluItem {
  const void* x;  // [P, C], dtype
  void* y;        // [P, C], dtype; may be x itself, with the same stride
  int64_t x_stride;
  int64_t y_stride;
  int32_t channels;    // C
  const float* mean;   // [C]
  const float* rstd;   // [C]
  const float* gamma;  // [C]
  const float* beta;   // [C]
};

struct BatchNormReluApplyParams {
  BatchNormReluItem item[kMaxBatchNormItems];
  int32_t items;
  int64_t pixels;  // P
  DType dtype;
};

// The ReLU keeps NaN.
cudaError_t batch_norm_relu_apply(const BatchNormReluApplyParams& params, cudaStream_t stream);

// The same, followed by a max pool that reads what would have been y [N, H, W, C], rounded to
// dtype, without its ever being written.
struct BatchNormReluMaxPoolParams {
  MaxPoolForwardParams pool;  // of the raw x; with an argmax
  const float* mean;          // [C]
  const float* rstd;          // [C]
  const float* gamma;         // [C]
  const float* beta;          // [C]
};

cudaError_t batch_norm_relu_max_pool(const BatchNormReluMaxPoolParams& params, cudaStream_t stream);

struct BatchNormReluBackwardItem {
  const void* x;   // [P, C], dtype
  const void* dy;  // [P, C], dtype; with argmax [N * OH * OW, C], the gradient of the pool's output
  const uint8_t* argmax;  // [N, OH, OW, C] dense, of the max pool behind y; nullptr: none
  void* dx;               // [P, C], dtype; may be nullptr, or x or dy [P, C] with the same stride
  int64_t x_stride;
  int64_t dy_stride;
  int64_t dx_stride;
  int32_t channels;    // C
  const float* mean;   // [C]
  const float* rstd;   // [C]
  const float* gamma;  // [C]
  const float* beta;   // [C]
  float* partials;     // [chunks, 2, C], sums of dy' and of dy' * xhat
  float* dgamma;       // [C], may be nullptr
  float* dbeta;        // [C], may be nullptr
};

// Reduce and apply take the same params; reduce leaves dx, dgamma and dbeta alone.
struct BatchNormReluBackwardParams {
  BatchNormReluBackwardItem item[kMaxBatchNormItems];
  int32_t items;
  int32_t chunks;         // batch_norm_chunks(P, all channels), or how many rows partials has
  int64_t pixels;         // P
  int64_t count;          // values per channel behind the statistics
  const float* total;     // [1], in the place of count where only the device knows; may be nullptr
  bool batch_statistics;  // false: mean and rstd are constants
  DType dtype;
  // The max pool behind y, where items have an argmax (then all have).
  int32_t input_h;   // H
  int32_t input_w;   // W
  int32_t output_h;  // OH
  int32_t output_w;  // OW
  PoolWindow window;
};

cudaError_t batch_norm_relu_backward_reduce(const BatchNormReluBackwardParams& params,
                                            cudaStream_t stream);

// chunks = 0, where no reduce has run: with constant statistics and without dgamma and dbeta.
cudaError_t batch_norm_relu_backward_apply(const BatchNormReluBackwardParams& params,
                                           cudaStream_t stream);

}  // namespace inception_ext::kernels
