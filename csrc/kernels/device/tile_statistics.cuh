// Mean and sum of squared deviations of every column of a block's tile, as it is stored (rounded to
// T): two passes over the sums in registers, then the warps' parts merged by Chan's formula,
//
//   n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d * n_b / n,
//   m2 = m2_a + m2_b + d^2 * n_a * n_b / n
//
// in a fixed order.
#pragma once

#include <cstdint>

#include "../tile_plan.h"
#include "global.cuh"
#include "shared.cuh"
#include "types.cuh"
#include "warp_tile.cuh"

namespace inception_ext::kernels {

template <typename Math, TileShape kShape>
class TileStatistics {
 public:
  static constexpr int kFloats = kShape.warps_m * kShape.columns() * 2;  // of shared memory

  // Of the warp's columns. `rows`: of the block's tile that hold pixels.
  static __device__ __forceinline__ void put(const WarpTile<Math, kShape>& warp, int32_t rows,
                                             float* shared) {
    using T = typename Math::Element;
    const int lane = threadIdx.x % 32;
    float* own = shared + threadIdx.x / 32 / kShape.warps_n * kShape.columns() * 2;
    const int32_t count = warp_rows(rows, warp.row);
    const float divisor = count > 0 ? static_cast<float>(count) : 1.0f;
#pragma unroll
    for (int j = 0; j < kShape.n_fragments; ++j) {
      if (j >= warp.n_count) break;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        // Row 16 * i + 8 * half + lane / 4 of the warp's rows.
        const auto sum_rows = [&](const auto& term) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < kShape.m_fragments; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float value = to_float(from_float<T>(warp.sum[i][j][2 * half + column]));
              if (16 * i + 8 * half + lane / 4 < count) sum += term(value);
            }
          }
#pragma unroll
          for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
          return sum;
        };
        const float mean = sum_rows([](float value) { return value; }) / divisor;
        const float m2 = sum_rows([&](float value) { return (value - mean) * (value - mean); });
        if (lane < 4) {
          const int k = warp.column + 8 * j + 2 * lane + column;
          store_shared<2>(own + 2 * k, Vector<float, 2>{mean, m2});
        }
      }
    }
  }

  // After a barrier: merges the warps and writes `columns` columns.
  static __device__ __forceinline__ void write(int32_t rows, int32_t columns, const float* shared,
                                               float* tile_mean, float* tile_m2) {
    for (int32_t k = threadIdx.x; k < columns; k += kTileThreads) {
      float mean = 0, m2 = 0, count = 0;
#pragma unroll
      for (int i = 0; i < kShape.warps_m; ++i) {
        const int32_t more = warp_rows(rows, i * kShape.m_fragments * 16);
        if (more == 0) break;
        const Vector<float, 2> part = load_shared<2>(shared + (i * kShape.columns() + k) * 2);
        const float total = count + more;
        const float delta = part.data[0] - mean;
        mean += delta * (more / total);
        m2 += part.data[1] + delta * delta * (count * (more / total));
        count = total;
      }
      store_global(tile_mean + k, mean);
      store_global(tile_m2 + k, m2);
    }
  }

 private:
  static __device__ __forceinline__ int32_t warp_rows(int32_t rows, int32_t first) {
    const int32_t left = rows - first;
    return left < 0 ? 0 : smaller(left, kShape.m_fragments * 16);
  }
};

}  // namespace inception_ext::kernels
