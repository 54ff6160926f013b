// A group of convolutions in one launch, each an implicit GEMM: see conv_group.h.
//
//   y[m, k] = relu(bias[k] + sum over (r, s, c) of x[n, p * stride_h - padding_h + r,
//                                                    q * stride_w - padding_w + s, c] * w[k, r, s,
//                                                    c])
//
// A block of four warps computes one tile of one of the GEMMs (tile_plan.h). Steps of 64 bytes of
// K go through kTileStages stages of shared memory: while a step is multiplied, the copies of the
// next three are under way. Fragments of 16 rows or 8 columns that hold nothing are skipped.
//
// Where K is split, every block writes its sums to global memory; the one that comes last reads all
// of them, in the order of the splits, whichever it is: results repeat bit for bit.
#pragma once

#include <cstdint>

#include "conv_group_launch.h"
#include "device/conv_loader.cuh"
#include "device/pool_prologue.cuh"
#include "device/split_sums.cuh"
#include "device/sync.cuh"
#include "device/tensor_math.cuh"
#include "device/tile_store.cuh"
#include "device/warp_tile.cuh"
#include "launch.h"
#include "tile_plan.h"
#include "variants.h"

namespace inception_ext::kernels {

template <typename Math, TileShape kShape>
__device__ __forceinline__ void store_tile(WarpTile<Math, kShape>& warp, const ConvProblem& p,
                                           const Tile& tile, char* shared) {
  using T = typename Math::Element;
  using Store = TileStore<T, kShape.n_fragments>;
  Store store(p, shared + threadIdx.x / 32 * Store::kBytes);
  const int32_t m_end = p.batch * p.output_h * p.output_w;
  const int32_t first_k = tile.n + warp.column;
  const int32_t k_end = smaller(p.filters, first_k + 8 * warp.n_count);
#pragma unroll
  for (int i = 0; i < kShape.m_fragments; ++i) {
    if (i >= warp.m_count) break;
#pragma unroll
    for (int j = 0; j < kShape.n_fragments; ++j) {
      if (j >= warp.n_count) break;
      const int32_t k = first_k + 8 * j + threadIdx.x % 4 * 2;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& value = warp.sum[i][j][e];
        if (k + e % 2 < k_end) value += load_global(p.bias + k + e % 2);
        if (p.relu && value < 0) value = 0;  // keeps NaN
      }
      store.put(j, warp.sum[i][j]);
    }
    __syncwarp();
    store.write(tile.m + warp.row + 16 * i, m_end, first_k, k_end);
    __syncwarp();
  }
}

// What a block computes; grid: plan.blocks.
template <typename Math, TileShape kShape>
__device__ __forceinline__ void compute_tile(const ConvGroupLaunch& launch) {
  using T = typename Math::Element;
  constexpr int32_t kStepElements = kTileRowBytes / sizeof(T);
  const Tile tile = tile_of(launch.plan, kShape, blockIdx.x);
  const ConvProblem& p = launch.problem[tile.gemm];
  const int32_t filters = smaller(8 * tile.n_units, p.filters - tile.n);
  const int32_t rows = smaller(kShape.rows(), p.batch * p.output_h * p.output_w - tile.m);
  const int32_t a_rows = staged_rows(kShape, p.max_pool ? p.input_w : 0);
  const int32_t stage_bytes = (a_rows + kShape.columns()) * kTileRowBytes;
  char* const shared = dynamic_shared();
  char* const pooled = shared + kTileStages * stage_bytes;
  const int32_t steps = tile.k_end - tile.k_begin;
  const auto stage = [&](int32_t step) { return shared + step % kTileStages * stage_bytes; };

  // The weights do not wait for the kernel before.
  const FilterLoader<T, kShape.columns()> filter_loader(p, tile.n, filters);
  const auto load_filters = [&](int32_t step) {
    filter_loader.load(stage(step) + a_rows * kTileRowBytes, tile.k_begin + step);
  };
  constexpr int kAhead = kTileStages - 1;
  for (int step = 0; step < kAhead; ++step) {
    if (step < steps) load_filters(step);
  }
  wait_for_previous_kernel();
  allow_next_kernel();

  WindowLoader<T, kShape.rows()> window_loader(p, tile.m, tile.k_begin);
  const PixelLoader<T> pixel_loader(p, tile.m - p.input_w - 1, a_rows);
  const PoolPrologue<T, kShape.rows()> pool(p, tile.m);
  const auto load_pixels = [&](int32_t step) {
    if (p.max_pool) {
      pixel_loader.load(stage(step), tile.k_begin + step);
    } else {
      window_loader.load(stage(step));
    }
  };
  for (int step = 0; step < kAhead; ++step) {
    if (step < steps) load_pixels(step);
    commit_copies();
  }

  WarpTile<Math, kShape> warp(rows, tile.n_units);
  const int32_t k_end = p.kernel_h * p.kernel_w * p.channels;
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    wait_copies<kAhead - 1>();
    __syncthreads();
    if (step + kAhead < steps) {
      load_pixels(step + kAhead);
      load_filters(step + kAhead);
    }
    commit_copies();
    const char* a_tile = stage(step);
    if (p.max_pool) {
      pool.reduce(a_tile, pooled);
      __syncthreads();
      a_tile = pooled;
    }
    warp.multiply(a_tile, stage(step) + a_rows * kTileRowBytes,
                  k_end - (tile.k_begin + step) * kStepElements);
  }

  wait_copies<0>();
  __syncthreads();
  if (tile.splits.count > 1 && !add_splits(warp, tile.splits, launch.counters, launch.partials,
                                           reinterpret_cast<int32_t*>(shared))) {
    return;
  }
  store_tile(warp, p, tile, shared);
}

// kShape: of kTileShapes; a struct as a template argument is too much for nvcc's host side.
template <typename Math, int kShape>
__global__ void __launch_bounds__(kTileThreads, min_resident(kTileShapes[kShape]))
    conv_group_kernel(const __grid_constant__ ConvGroupLaunch launch) {
  if constexpr (Math::kExists) {
    compute_tile<Math, kTileShapes[kShape]>(launch);
  } else {
    never_launched();
  }
}

template <typename Math>
cudaError_t run_conv_group(const ConvGroupLaunch& group, cudaStream_t stream) {
  return with_shape<Math::kFirstShape>(group.plan.shape, [&](auto shape) {
    return launch_dependent(conv_group_kernel<Math, decltype(shape)::value>,
                            dim3(group.plan.blocks), dim3(kTileThreads), group.plan.shared_bytes,
                            stream, group);
  });
}

}  // namespace inception_ext::kernels
