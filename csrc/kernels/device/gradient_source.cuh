// Where the gradient of an activation [P, C] comes from, as a functor: Source(params, item, c)
// is that of the channels from c on, and load(pixel) gives a vector of them.
#pragma once

#include <cstdint>

#include "../batch_norm.h"
#include "global.cuh"
#include "platform.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

// dy [P, C] as it is.
template <typename T, int kVecSize>
class PlainGradient {
 public:
  using Element = T;
  static constexpr int kVec = kVecSize;
  static constexpr int kMinBlocks = 2;  // that registers have to leave room for
  using Gradient = Vector<T, kVec>;

  __device__ __forceinline__ PlainGradient(const BatchNormReluBackwardParams& /*p*/,
                                           const BatchNormReluBackwardItem& item, int32_t c)
      : dy_(static_cast<const T*>(item.dy) + c), stride_(item.dy_stride) {}

  __device__ __forceinline__ Gradient load(int64_t pixel) const {
    return load_global<kVec>(dy_ + pixel * stride_);
  }

 private:
  const T* dy_;
  int64_t stride_;
};

// The gradient of a max pool's input out of that of its output: a pixel adds up the windows whose
// maximum it was, from top to bottom and from left to right.
template <typename T, int kVecSize>
class PooledGradient {
 public:
  using Element = T;
  static constexpr int kVec = kVecSize;
  static constexpr int kMinBlocks = 2;
  using Gradient = Vector<float, kVec>;

  __device__ __forceinline__ PooledGradient(const BatchNormReluBackwardParams& p,
                                            const BatchNormReluBackwardItem& item, int32_t c)
      : p_(p), item_(item), c_(c) {}

  __device__ __forceinline__ Gradient load(int64_t pixel) const {
    const PoolWindow& window = p_.window;
    const int32_t row = static_cast<int32_t>(pixel) / p_.input_w;
    const int32_t w = static_cast<int32_t>(pixel) % p_.input_w + window.padding_w;
    const int32_t n = row / p_.input_h, h = row % p_.input_h + window.padding_h;
    const int32_t oh_end = window_end(h, window.stride_h, p_.output_h);
    const int32_t ow_end = window_end(w, window.stride_w, p_.output_w);
    const int32_t ow_begin = window_begin(w, window.kernel_w, window.stride_w);
    Gradient sum = {};
#pragma unroll 1
    for (int32_t oh = window_begin(h, window.kernel_h, window.stride_h); oh < oh_end; ++oh) {
      const int32_t first = (h - oh * window.stride_h) * window.kernel_w + w;
      const int64_t out_row = (int64_t{n} * p_.output_h + oh) * p_.output_w;
#pragma unroll 1
      for (int32_t ow = ow_begin; ow < ow_end; ow += kAtOnce) {
        Vector<T, kVec> dy[kAtOnce];
        Vector<uint8_t, kVec> argmax[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          // Past the last window: the last once more, at an index that no argmax has.
          const int64_t out = out_row + (ow + j < ow_end ? ow + j : ow);
          dy[j] = load_global<kVec>(static_cast<const T*>(item_.dy) + out * item_.dy_stride + c_);
          argmax[j] = load_global<kVec>(item_.argmax + out * item_.channels + c_);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int32_t index = ow + j < ow_end ? first - (ow + j) * window.stride_w : -1;
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            if (argmax[j].data[i] == index) sum.data[i] += to_float(dy[j].data[i]);
          }
        }
      }
    }
    return sum;
  }

 private:
  static constexpr int kAtOnce = 2;  // windows whose loads are under way together

  // The windows that hold a position of the padded input: begin ... end - 1.
  static __device__ __forceinline__ int32_t window_begin(int32_t at, int32_t kernel,
                                                         int32_t stride) {
    return at < kernel ? 0 : (at - kernel) / stride + 1;
  }
  static __device__ __forceinline__ int32_t window_end(int32_t at, int32_t stride,
                                                       int32_t windows) {
    const int32_t end = at / stride + 1;
    return end < windows ? end : windows;
  }

  const BatchNormReluBackwardParams& p_;
  const BatchNormReluBackwardItem& item_;
  int32_t c_;
};

}  // namespace inception_ext::kernels
