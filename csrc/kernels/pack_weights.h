// Packs convolution weights into the matrices that conv_group reads, rounding to dtype.
//
//   fprop  row k holds W[k][c][r][s] in (r, s, c) order
//   dgrad  row c holds W[k][c][R-1-r][S-1-s] in (r, s, k) order: the filters of the convolution
//          that maps the gradient of the output to that of the input, for stride 1
//
// Filters may share a matrix: several below one another (fprop), 1x1 filters side by side (dgrad).
// Both start at most one kernel on `stream`. cudaErrorInvalidValue: a size, dtype or null pointer
// they do not take.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace inception_ext::kernels {

constexpr int kMaxPackedFilters = 7;

struct PackedFilter {
  const void* weight;      // [K, C, R, S], float32 or dtype
  void* packed;            // [rows, columns], dtype: the first element of this filter's part
  int64_t stride[4];       // of weight: k, c, r, s
  int64_t packed_stride;   // elements from one row to the next
  int32_t filters;         // K
  int32_t channels;        // C
  int32_t kernel_h;        // R
  int32_t kernel_w;        // S
  int32_t packed_columns;  // of a row to write: the filter's, then zeros
};

struct PackWeightsParams {
  PackedFilter filter[kMaxPackedFilters];
  int32_t filters;     // packed in this launch
  DType dtype;         // of packed
  DType weight_dtype;  // kFloat32 or dtype
};

cudaError_t pack_fprop_weights(const PackWeightsParams& params, cudaStream_t stream);
cudaError_t pack_dgrad_weights(const PackWeightsParams& params, cudaStream_t stream);

}  // namespace inception_ext::kernels
