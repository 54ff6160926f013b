// FilterLoader for filters that lie in several tensors.
#pragma once

#include <cstdint>

#include "../conv_train.h"
#include "conv_loader.cuh"

namespace inception_ext::kernels {

template <typename T, int kTileRows>
class MergedFilterLoader {
 public:
  // As FilterLoader.
  __device__ __forceinline__ MergedFilterLoader(const ConvTrainProblem& problem, int32_t first_k,
                                                int32_t filters)
      : row_elements_((problem.conv.kernel_h * problem.conv.kernel_w * problem.conv.channels + 7) /
                      8 * 8),
        filters_(filters) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t k = first_k + threadIdx.x / kRowChunks + i * kLoadRows;
      const void* weight = problem.conv.weight;
      int32_t first = 0;
      for (int j = 0; j < problem.more_filters; ++j) {
        if (k < problem.more[j].first) break;
        weight = problem.more[j].weight;
        first = problem.more[j].first;
      }
      from_[i] = static_cast<const T*>(weight) + int64_t{k - first} * row_elements_;
    }
  }

  __device__ __forceinline__ void load(char* tile, int32_t step) {
    const int32_t element = (step * kRowChunks + threadIdx.x % kRowChunks) * kVectorSize<T>;
    const int32_t first = threadIdx.x / kRowChunks;
    char* to = tile + chunk_offset(first, threadIdx.x % kRowChunks);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t row = first + i * kLoadRows;
      if (row >= filters_ + 8) break;
      const bool inside = row < filters_ && element < row_elements_;
      copy_async<kChunkBytes>(to + i * kLoadRows * kRowBytes,
                              inside ? from_[i] + element : from_[0], inside ? kChunkBytes : 0);
    }
  }

 private:
  static constexpr int kRows = kTileRows / kLoadRows;

  int32_t row_elements_;
  int32_t filters_;
  const T* from_[kRows];
};

}  // namespace inception_ext::kernels
