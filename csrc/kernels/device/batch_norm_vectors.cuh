// What batch norm + ReLU needs of a thread's channels: mean, gamma * rstd and beta.
#pragma once

#include <cstdint>

#include "channel_group.cuh"
#include "global.cuh"
#include "platform.cuh"
#include "shared.cuh"

namespace inception_ext::kernels {

// Keeps NaN.
__device__ __forceinline__ float relu(float value) { return value <= 0 ? 0.0f : value; }

template <typename Item>
bool has_vectors(const Item& item) {
  return item.mean != nullptr && item.rstd != nullptr && item.gamma != nullptr &&
         item.beta != nullptr;
}

template <int kVec>
struct BatchNormVectors {
  static constexpr int kCount = 3;

  // Reads the vectors of the group once for the block, through shared [kCount][kMaxGroupChannels].
  // Every thread of the block calls it.
  template <typename Item>
  __device__ __forceinline__ BatchNormVectors(const Item& item, const ChannelGroup<kVec>& group,
                                              float* shared) {
    const int32_t vector = threadIdx.x / kMaxGroupChannels;
    const int32_t position = threadIdx.x % kMaxGroupChannels;
    if (vector < kCount && position < group.size()) {
      const int32_t c = group.channel_at(position);
      const float* from = vector == 0 ? item.mean : vector == 1 ? item.gamma : item.beta;
      float value = load_global(from + c);
      if (vector == 1) value *= load_global(item.rstd + c);
      store_shared(shared + threadIdx.x, value);
    }
    __syncthreads();
    group.read(shared, mean);
    group.read(shared + kMaxGroupChannels, scale);
    group.read(shared + 2 * kMaxGroupChannels, beta);
  }

  // Of the vector's channel i.
  __device__ __forceinline__ float normalise(int i, float x) const {
    return (x - mean[i]) * scale[i] + beta[i];
  }

  float mean[kVec];
  float scale[kVec];  // gamma * rstd
  float beta[kVec];
};

}  // namespace inception_ext::kernels
