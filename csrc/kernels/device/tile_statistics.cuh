// Mean and sum of squared deviations of every column of a block's tile, as it is stored (rounded to
// T): two passes over the sums in registers, then the warps' parts merged by Chan's formula,
//
//   n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d * n_b / n,
//   m2 = m2_a + m2_b + d^2 * n_a * n_b / n
//
// in a fixed order. Means are relative: a warp's to its first row, the tile's to the tile's. Where
// they are large, float32 would not hold what the deviations are made of.
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
  static constexpr int kPlane = kShape.warps_m * kShape.columns();
  static constexpr int kFloats = 3 * kPlane;  // of shared memory: first row, mean, m2

  // Of the warp's columns. `rows`: of the block's tile that hold pixels.
  static __device__ __forceinline__ void put(const WarpTile<Math, kShape>& warp, int32_t rows,
                                             float* shared) {
    using T = typename Math::Element;
    const int lane = threadIdx.x % 32;
    float* own = shared + threadIdx.x / 32 / kShape.warps_n * kShape.columns();
    const int32_t count = warp_rows(rows, warp.row);
    const float divisor = count > 0 ? static_cast<float>(count) : 1.0f;
#pragma unroll
    for (int j = 0; j < kShape.n_fragments; ++j) {
      if (j >= warp.n_count) break;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        // Row 16 * i + 8 * half + lane / 4 of the warp's rows.
        const auto value_of = [&](int i, int half) {
          return to_float(from_float<T>(warp.sum[i][j][2 * half + column]));
        };
        const float first = __shfl_sync(0xffffffffu, value_of(0, 0), lane % 4);
        const auto sum_rows = [&](const auto& term) {
          float sum = 0;
#pragma unroll
          for (int i = 0; i < kShape.m_fragments; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if (16 * i + 8 * half + lane / 4 < count) sum += term(value_of(i, half) - first);
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
          store_shared(own + k, first);
          store_shared(own + kPlane + k, mean);
          store_shared(own + 2 * kPlane + k, m2);
        }
      }
    }
  }

  // After a barrier: merges the warps and writes `columns` columns.
  static __device__ __forceinline__ void write(int32_t rows, int32_t columns, const float* shared,
                                               float* tile_mean, float* tile_m2) {
    for (int32_t k = threadIdx.x; k < columns; k += kTileThreads) {
      const float first = load_shared(shared + k);
      float mean = 0, m2 = 0, count = 0;
#pragma unroll
      for (int i = 0; i < kShape.warps_m; ++i) {
        const int32_t more = warp_rows(rows, i * kShape.m_fragments * 16);
        if (more == 0) break;
        const float* part = shared + i * kShape.columns() + k;
        const float total = count + more;
        const float delta = load_shared(part) - first + load_shared(part + kPlane) - mean;
        mean += delta * (more / total);
        m2 += load_shared(part + 2 * kPlane) + delta * delta * (count * (more / total));
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
