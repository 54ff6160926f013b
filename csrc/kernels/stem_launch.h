// What the launchers of the two stem kernels have in common.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "conv_problem.h"
#include "device/tensor_math.cuh"
#include "launch.h"
#include "stem_plan.h"
#include "variants.h"

namespace inception_ext::kernels {

// Sizes that the kernels count in 32 bits, and windows of the pool that start inside of the
// convolution's conv_h x conv_w pixels.
template <typename Params>
bool has_valid_sizes(const Params& p, int32_t conv_h, int32_t conv_w) {
  constexpr int32_t kMaxExtent = 1 << 28;
  return p.batch >= 0 && p.input_h >= 1 && p.input_h <= kMaxExtent && p.input_w >= 1 &&
         p.input_w <= kMaxExtent && conv_h >= 1 && conv_w >= 1 && p.output_h >= 1 &&
         p.output_w >= 1 && 2 * (p.output_h - 1) < conv_h && 2 * (p.output_w - 1) < conv_w;
}

// launch(Kind<Math>(), std::integral_constant<int, rows>(), device), as the current device and the
// params have it. Tile<rows, bytes>: what a block keeps in shared memory (stem_plan.h).
template <template <int, int> typename Tile, typename Params, typename Launch>
cudaError_t with_stem_tile(const Params& p, const Launch& launch) {
  DeviceLimits device;
  if (const cudaError_t error = device_limits(device); error != cudaSuccess) return error;
  const bool scalar = is_scalar(p.dtype, p.exact, device);
  return with_math<TensorMath, ScalarMath>(p.dtype, scalar, [&](auto math) {
    using Math = typename decltype(math)::Type;
    constexpr int kBytes = sizeof(typename Math::Element);
    // Four rows waste less than two, where they leave no multiprocessor idle.
    if constexpr (kBytes == 2 && Math::kStepChunks == 2) {
      if (device.capability >= 80 && Tile<4, kBytes>::kSharedBytes <= device.shared_bytes &&
          stem_tiles(4, p.batch, p.output_h, p.output_w) >= device.multiprocessors) {
        return launch(math, std::integral_constant<int, 4>(), device);
      }
    }
    if (Tile<2, kBytes>::kSharedBytes > device.shared_bytes) return cudaErrorInvalidConfiguration;
    return launch(math, std::integral_constant<int, 2>(), device);
  });
}

}  // namespace inception_ext::kernels
