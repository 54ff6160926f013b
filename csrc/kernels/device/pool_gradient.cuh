// The gradient of a 3x3 max pool (stride 1, padding 1) by gather: an input pixel adds up the
// gradients of the up to nine windows whose maximum it was.
#pragma once

#include <cstdint>

#include "global.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

// Of pixel m of [N, H, W, channels], kVec channels from `channel` on, added to sum.
template <typename T, int kVec>
__device__ __forceinline__ void add_pool_gradient(float (&sum)[kVec], const T* grad,
                                                  const uint8_t* argmax, int64_t grad_stride,
                                                  int32_t channels, int32_t m, int32_t channel,
                                                  int32_t height, int32_t width) {
  const int32_t pixel = m % (height * width);
  const int32_t h = pixel / width, w = pixel % width;
#pragma unroll 1
  for (int kh = 0; kh < 3; ++kh) {
    if (static_cast<uint32_t>(h + 1 - kh) >= static_cast<uint32_t>(height)) continue;
#pragma unroll
    for (int kw = 0; kw < 3; ++kw) {
      if (static_cast<uint32_t>(w + 1 - kw) >= static_cast<uint32_t>(width)) continue;
      const int64_t window = m + (1 - kh) * width + 1 - kw;
      const auto index = load_global<kVec>(argmax + window * channels + channel);
      const auto value = load_global<kVec>(grad + window * grad_stride + channel);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (index.data[e] == kh * 3 + kw) sum[e] += to_float(value.data[e]);
      }
    }
  }
}

}  // namespace inception_ext::kernels
