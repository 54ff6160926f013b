// Convolutions of training in one launch: raw outputs, forward (with statistics for the batch norm
// behind it) and as data gradient.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

// What a convolution reads in the place of x.
enum class ConvPrologue : int32_t {
  kNone = 0,
  kBatchNormRelu =
      1,         // relu((x - mean) * (gamma * rstd) + beta), rounded to dtype; padding is zero
  kMaxPool = 2,  // the 3x3 max pool of x (stride 1, padding 1); only for 1x1, stride 1
};

// Further filters of the same convolution, from filter `first` on: 1x1 weights that lie in several
// tensors run as one.
struct ConvFilters {
  const void* weight;  // as ConvProblem has it
  int32_t first;
};

struct ConvTrainProblem {
  ConvProblem conv;  // bias, relu and max_pool are not used
  ConvFilters more[kMaxConvSegments - 1];
  int32_t more_filters;  // entries of `more`

  ConvPrologue prologue;
  const float* mean;   // [C], of kBatchNormRelu
  const float* rstd;   // [C]
  const float* gamma;  // [C]
  const float* beta;   // [C]
  uint8_t* argmax;     // [N, H, W, C] dense, written by kMaxPool: kh * 3 + kw; may be nullptr

  // Statistics of the rounded outputs; may be nullptr. See conv_train_rows for the tiles.
  float* tile_mean;  // [tiles, K], less the tile's first output
  float* tile_m2;    // [tiles, K], sum of squared deviations from the tile's mean

  // Added to the outputs: the gradient of a 3x3 max pool (stride 1, padding 1) that has the
  // outputs' size. May be nullptr.
  const void* pool_grad;       // [N, P, Q, K], dtype
  const uint8_t* pool_argmax;  // [N, P, Q, K] dense
  int64_t pool_stride;         // elements from one pixel of pool_grad to the next
};

struct ConvTrainParams {
  ConvTrainProblem problem[kMaxConvProblems / 2];
  int32_t problems;
  DType dtype;
  bool exact;  // float32 products in fp32; else on tensor cores, rounded to TF32
};

// cudaErrorInvalidValue: sizes that do not belong together; cudaErrorNotSupported: images wider
// than the max pool prologue takes (max_pooled_width in conv_group.h).
cudaError_t conv_train(const ConvTrainParams& params, cudaStream_t stream);

// Pixels behind one row of tile_mean and tile_m2, in what conv_train does with these params; the
// last row has what is left.
cudaError_t conv_train_rows(const ConvTrainParams& params, int32_t* rows);

// The fewest rows that conv_train_rows gives: what to plan memory with.
constexpr int32_t kLeastConvTrainRows = 64;

}  // namespace inception_ext::kernels
