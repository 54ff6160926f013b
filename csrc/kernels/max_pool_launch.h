// What the launchers of the max pool kernels share: launch geometry, and what they take.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/max_pool_walk.cuh"
#include "device/types.cuh"
#include "params.h"

namespace inception_ext::kernels {

// Launch geometry: `columns` threads for each of `rows` steps down.
struct PoolPlan {
  dim3 grid;
  int32_t rows_per_thread;
};

inline PoolPlan plan_pool(int64_t columns, int64_t rows, int64_t batch) {
  // Walking further saves loads and compares as long as enough threads are left to fill the device:
  // 1024 on each of 128 multiprocessors. Past 16 rows the first ones of a chunk, which the chunk
  // above reads too, are few already.
  constexpr int64_t kFill = 1 << 17;
  constexpr int64_t kMaxWalk = 16;
  constexpr int64_t kMaxGridYZ = 65535;
  int64_t walk = 1;
  while (walk < kMaxWalk && columns * rows / (2 * walk) >= kFill / batch + 1) walk *= 2;
  int64_t chunks = (rows + walk - 1) / walk;
  walk = (rows + chunks - 1) / chunks;  // chunks of even length
  const dim3 grid(static_cast<unsigned>((columns + kPoolThreads - 1) / kPoolThreads),
                  static_cast<unsigned>(chunks < kMaxGridYZ ? chunks : kMaxGridYZ),
                  static_cast<unsigned>(batch < kMaxGridYZ ? batch : kMaxGridYZ));
  return {grid, static_cast<int32_t>(walk)};
}

// H, W, W * C and the like: what a thread holds in 32 bits, with room for a grid stride.
constexpr int64_t kMaxPoolExtent = 1 << 30;

inline bool takes_pool_axis(int64_t input, int64_t output, int32_t kernel, int32_t stride,
                            int32_t padding) {
  return input >= 0 && input <= kMaxPoolExtent && output >= 0 && output <= kMaxPoolExtent &&
         (kernel == 2 || kernel == 3) && (stride == 1 || stride == 2) && padding >= 0 &&
         padding <= kernel / 2 && (output == 0 || (output - 1) * stride - padding < input);
}

template <typename Params>
bool takes_pool(const Params& p) {
  const PoolWindow& window = p.window;
  return (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16 ||
          p.dtype == DType::kFloat32) &&
         p.batch >= 0 && p.channels >= 0 &&
         takes_pool_axis(p.input_h, p.output_h, window.kernel_h, window.stride_h,
                         window.padding_h) &&
         takes_pool_axis(p.input_w, p.output_w, window.kernel_w, window.stride_w,
                         window.padding_w) &&
         p.channels <= kMaxPoolExtent && p.input_w * p.channels <= kMaxPoolExtent &&
         p.output_w * p.channels <= kMaxPoolExtent;
}

// Can [N, H, W, C] with these strides be moved in vectors of `size` elements? The stride of an axis
// of one entry is never used and may be anything.
template <typename T>
bool is_image_vectorizable(const void* data, const PixelStrides& stride, int64_t n, int64_t h,
                           int64_t w, int64_t c) {
  constexpr int64_t kSize = kVectorSize<T>;
  return is_aligned(data, kSize * sizeof(T)) && c % kSize == 0 &&
         (n <= 1 || stride.n % kSize == 0) && (h <= 1 || stride.h % kSize == 0) &&
         (w <= 1 || stride.w % kSize == 0);
}

// Calls function(kernel_h, stride_h) with both as compile-time constants.
template <typename Function>
cudaError_t with_window(const PoolWindow& window, const Function& function) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  if (window.kernel_h == 2) {
    return window.stride_h == 1 ? function(Two(), One()) : function(Two(), Two());
  }
  return window.stride_h == 1 ? function(Three(), One()) : function(Three(), Two());
}

}  // namespace inception_ext::kernels
