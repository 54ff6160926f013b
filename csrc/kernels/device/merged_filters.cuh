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
      : problem_(problem), first_k_(first_k), filters_(filters) {}

  __device__ __forceinline__ void load(char* tile, int32_t step) const {
    const ConvProblem& p = problem_.conv;
    const int32_t row_elements = (p.kernel_h * p.kernel_w * p.channels + 7) / 8 * 8;
    const int32_t element = (step * kRowChunks + threadIdx.x % kRowChunks) * kVectorSize<T>;
    const int32_t first = threadIdx.x / kRowChunks;
    char* to = tile + chunk_offset(first, threadIdx.x % kRowChunks);
#pragma unroll
    for (int i = 0; i < kTileRows / kLoadRows; ++i) {
      const int32_t row = first + i * kLoadRows;
      if (row >= filters_ + 8) break;
      const bool inside = row < filters_ && element < row_elements;
      const T* from = static_cast<const T*>(p.weight);
      if (inside) from = filter(first_k_ + row, row_elements) + element;
      copy_async<kChunkBytes>(to + i * kLoadRows * kRowBytes, from, inside ? kChunkBytes : 0);
    }
  }

 private:
  // Worked out anew each time: the accumulators want the registers that pointers would take.
  __device__ __forceinline__ const T* filter(int32_t k, int32_t row_elements) const {
    const void* weight = problem_.conv.weight;
    int32_t first = 0;
    for (int j = 0; j < problem_.more_filters; ++j) {
      if (k < problem_.more[j].first) break;
      weight = problem_.more[j].weight;
      first = problem_.more[j].first;
    }
    return static_cast<const T*>(weight) + int64_t{k - first} * row_elements;
  }

  const ConvTrainProblem& problem_;
  int32_t first_k_;
  int32_t filters_;
};

}  // namespace inception_ext::kernels
