// Convolutions of training: the implicit GEMM of conv_group.cuh with other things before and behind
// the products. See conv_train.h.
//
// Raw outputs are rounded before their statistics are taken, so that these are the statistics of
// what the batch norm will read.
#pragma once

#include <cstdint>

#include "conv_train_launch.h"
#include "device/batch_norm_prologue.cuh"
#include "device/conv_loader.cuh"
#include "device/merged_filters.cuh"
#include "device/pool_gradient.cuh"
#include "device/pool_prologue.cuh"
#include "device/sync.cuh"
#include "device/tensor_math.cuh"
#include "device/tile_statistics.cuh"
#include "device/tile_store.cuh"
#include "device/warp_tile.cuh"
#include "launch.h"
#include "variants.h"

namespace inception_ext::kernels {

// Raw sums plus the gradient of a max pool, where the problem has one.
template <typename Math, TileShape kShape>
__device__ __forceinline__ void store_raw(const WarpTile<Math, kShape>& warp,
                                          const ConvTrainProblem& problem, const Tile& tile,
                                          char* shared) {
  using T = typename Math::Element;
  using Store = TileStore<T, kShape.n_fragments>;
  constexpr int kVec = kVectorSize<T>;
  const ConvProblem& p = problem.conv;
  const T* const grad = static_cast<const T*>(problem.pool_grad);
  const bool vectors =
      grad == nullptr || (p.filters % kVec == 0 && problem.pool_stride % kVec == 0 &&
                          reinterpret_cast<uintptr_t>(grad) % kChunkBytes == 0);
  Store store(p, shared + threadIdx.x / 32 * Store::kBytes, vectors);
  const int32_t m_end = p.batch * p.output_h * p.output_w;
  const int32_t first_k = tile.n + warp.column;
  const int32_t k_end = smaller(p.filters, first_k + 8 * warp.n_count);
  const auto add_gradient = [&]<int kSize>(Vector<T, kSize>& values, int32_t m, int32_t k) {
    if (grad == nullptr) return;
    float sum[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) sum[e] = to_float(values.data[e]);
    add_pool_gradient<T, kSize>(sum, grad, problem.pool_argmax, problem.pool_stride, p.filters, m,
                                k, p.output_h, p.output_w);
#pragma unroll
    for (int e = 0; e < kSize; ++e) values.data[e] = from_float<T>(sum[e]);
  };
#pragma unroll
  for (int i = 0; i < kShape.m_fragments; ++i) {
    if (i >= warp.m_count) break;
#pragma unroll
    for (int j = 0; j < kShape.n_fragments; ++j) {
      if (j >= warp.n_count) break;
      store.put(j, warp.sum[i][j]);
    }
    __syncwarp();
    store.write(tile.m + warp.row + 16 * i, m_end, first_k, k_end, add_gradient);
    __syncwarp();
  }
}

// What a block computes; grid: plan.blocks.
template <typename Math, TileShape kShape>
__device__ __forceinline__ void compute_train_tile(const ConvTrainLaunch& launch) {
  using T = typename Math::Element;
  using Statistics = TileStatistics<Math, kShape>;
  using Normalize = BatchNormPrologue<T, kShape.rows()>;
  constexpr int32_t kStepElements = kTileRowBytes / sizeof(T);
  const Tile tile = tile_of(launch.plan, kShape, blockIdx.x);
  const ConvTrainProblem& problem = launch.problem[tile.gemm];
  const ConvProblem& p = problem.conv;
  const bool pools = problem.prologue == ConvPrologue::kMaxPool;
  const bool normalizes = problem.prologue == ConvPrologue::kBatchNormRelu;
  const int32_t filters = smaller(8 * tile.n_units, p.filters - tile.n);
  const int32_t m_end = p.batch * p.output_h * p.output_w;
  const int32_t rows = smaller(kShape.rows(), m_end - tile.m);
  const int32_t a_rows = staged_rows(kShape, pools ? p.input_w : 0);
  const int32_t stage_bytes = (a_rows + kShape.columns()) * kTileRowBytes;
  char* const shared = dynamic_shared();
  char* const behind_stages = shared + kTileStages * stage_bytes;  // pooled tile, or BN vectors
  const int32_t steps = tile.k_end - tile.k_begin;
  const auto stage = [&](int32_t step) { return shared + step % kTileStages * stage_bytes; };

  // Other kernels of the same step may write the weights: nothing is read before the wait.
  wait_for_previous_kernel();
  allow_next_kernel();

  MergedFilterLoader<T, kShape.columns()> filter_loader(problem, tile.n, filters);
  WindowLoader<T, kShape.rows()> window_loader(p, tile.m, tile.k_begin);
  const PixelLoader<T> pixel_loader(p, tile.m - p.input_w - 1, a_rows);
  const PoolPrologue<T, kShape.rows()> pool(p, tile.m);
  const auto load = [&](int32_t step) {
    if (pools) {
      pixel_loader.load(stage(step), tile.k_begin + step);
    } else {
      window_loader.load(stage(step));
    }
    filter_loader.load(stage(step) + a_rows * kTileRowBytes, tile.k_begin + step);
  };
  constexpr int kAhead = kTileStages - 1;
  for (int step = 0; step < kAhead; ++step) {
    if (step < steps) load(step);
    commit_copies();
  }
  float* const table = reinterpret_cast<float*>(behind_stages);
  if (normalizes) {
    Normalize::fill_table(table, p.channels, problem.mean, problem.rstd, problem.gamma,
                          problem.beta);
    __syncthreads();
  }
  Normalize normalize(p, table, tile.k_begin);

  WarpTile<Math, kShape> warp(rows, tile.n_units);
  const int32_t k_end = p.kernel_h * p.kernel_w * p.channels;
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    wait_copies<kAhead - 1>();
    if (normalizes) normalize.apply(stage(step), window_loader);
    __syncthreads();
    if (step + kAhead < steps) load(step + kAhead);
    commit_copies();
    const char* a_tile = stage(step);
    if (pools) {
      if (problem.argmax != nullptr && tile.n == 0) {
        const int32_t c =
            (tile.k_begin + step) * kStepElements + threadIdx.x % kRowChunks * kVectorSize<T>;
        pool.reduce(a_tile, behind_stages, problem.argmax, tile.m, m_end, p.channels, c);
      } else {
        pool.reduce(a_tile, behind_stages);
      }
      __syncthreads();
      a_tile = behind_stages;
    }
    warp.multiply(a_tile, stage(step) + a_rows * kTileRowBytes,
                  k_end - (tile.k_begin + step) * kStepElements);
  }

  wait_copies<0>();
  __syncthreads();
  if (problem.tile_mean != nullptr) {
    float* const parts =
        reinterpret_cast<float*>(shared + kTileWarps * TileStore<T, kShape.n_fragments>::kBytes);
    const int64_t row = int64_t{tile.m / kShape.rows()} * p.filters + tile.n;
    Statistics::put(warp, rows, parts);
    __syncthreads();
    Statistics::write(rows, filters, parts, problem.tile_mean + row, problem.tile_m2 + row);
  }
  store_raw(warp, problem, tile, shared);
}

constexpr int min_resident_train(const TileShape& shape) {
  return shape.m_fragments * shape.n_fragments > 8 ? 2 : 3;
}

// kShape: of kTileShapes; a struct as a template argument is too much for nvcc's host side.
template <typename Math, int kShape>
__global__ void __launch_bounds__(kTileThreads, min_resident_train(kTileShapes[kShape]))
    conv_train_kernel(const __grid_constant__ ConvTrainLaunch launch) {
  if constexpr (Math::kExists) {
    compute_train_tile<Math, kTileShapes[kShape]>(launch);
  } else {
    never_launched();
  }
}

template <typename Math>
cudaError_t run_conv_train(const ConvTrainLaunch& group, cudaStream_t stream) {
  return with_shape<Math::kFirstShape>(group.plan.shape, [&](auto shape) {
    return launch_dependent(conv_train_kernel<Math, decltype(shape)::value>,
                            dim3(group.plan.blocks), dim3(kTileThreads), group.plan.shared_bytes,
                            stream, group);
  });
}

}  // namespace inception_ext::kernels
