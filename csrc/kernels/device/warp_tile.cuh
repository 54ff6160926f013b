// The part of a block's tile that a warp multiplies, and its sums.
#pragma once

#include <cstdint>

#include "../tile_plan.h"
#include "platform.cuh"
#include "tile.cuh"

namespace inception_ext::kernels {

// Blocks that share a multiprocessor at least: this bounds the registers of a thread.
constexpr int min_resident(const TileShape& shape) {
  return shape.m_fragments * shape.n_fragments > 16 ? 2 : 3;
}

// The accumulators of one thread, and the products of the warp that it belongs to.
template <typename Math, TileShape kShape>
struct WarpTile {
  using T = typename Math::Element;
  static constexpr int kM = kShape.m_fragments, kN = kShape.n_fragments;
  static constexpr int kSteps = kRowBytes / (Math::kStepK * sizeof(T));

  float sum[kM][kN][4] = {};
  int row;      // of the block's tile
  int column;   // likewise
  int m_count;  // fragments that hold a pixel
  int n_count;  // fragments that hold a filter

  __device__ __forceinline__ WarpTile(int32_t rows, int32_t n_units) {
    const int warp = threadIdx.x / 32;
    const int units = kShape.warps_n == 1 || warp % kShape.warps_n == 0
                          ? (n_units + kShape.warps_n - 1) / kShape.warps_n
                          : n_units / 2;
    row = warp / kShape.warps_n * kM * 16;
    column = warp % kShape.warps_n * ((n_units + 1) / 2) * 8;
    m_count = rows <= row ? 0 : (rows - row + 15) / 16;
    n_count = units;
  }

  // Gives each warp as many of the tile's fragments of rows as the others.
  __device__ __forceinline__ void spread_rows(int32_t m_units) {
    const int warp_m = threadIdx.x / 32 / kShape.warps_n;
    const int first = m_units * warp_m / kShape.warps_m;
    row = 16 * first;
    m_count = m_units * (warp_m + 1) / kShape.warps_m - first;
  }

  // Adds a step of K, of which `k` elements count.
  __device__ __forceinline__ void multiply(const char* a_tile, const char* b_tile, int32_t k) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step * Math::kStepK >= k) break;
      typename Math::A a[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        if (i < m_count) Math::load_a(a[i], a_tile, row + 16 * i, step);
      }
#pragma unroll
      for (int pair = 0; pair < kN / 2; ++pair) {
        if (2 * pair >= n_count) break;
        typename Math::B b;
        Math::load_b(b, b_tile, column + 16 * pair, step);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          if (i < m_count) Math::multiply(sum[i][2 * pair], a[i], b, 0);
        }
        if (2 * pair + 1 < n_count) {
#pragma unroll
          for (int i = 0; i < kM; ++i) {
            if (i < m_count) Math::multiply(sum[i][2 * pair + 1], a[i], b, 1);
          }
        }
      }
    }
  }

  // Calls function(vector index, sum[i][j]) for the fragments that hold something.
  template <typename Function>
  __device__ __forceinline__ void for_each(const Function& function) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if (i < m_count && j < n_count) function(i * kN + j, sum[i][j]);
      }
    }
  }
};

}  // namespace inception_ext::kernels
