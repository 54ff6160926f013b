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
#include "device/sync.cuh"
#include "device/tensor_math.cuh"
#include "device/tile_store.cuh"
#include "launch.h"
#include "tile_plan.h"

namespace inception_ext::kernels {

// The accumulators of one thread, and the products of the warp that it belongs to.
template <typename Math, TileShape kShape>
struct WarpTile {
  using T = typename Math::Element;
  static constexpr int kM = kShape.m_fragments, kN = kShape.n_fragments;

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

  // Adds a step of K, of which `k` elements count.
  __device__ __forceinline__ void multiply(const char* a_tile, const char* b_tile, int32_t k) {
#pragma unroll
    for (int step = 0; step < kRowChunks / Math::kStepChunks; ++step) {
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

// The sums of all splits of a tile, in the block that comes last; false in the others. `shared` is
// four bytes that nobody reads any more.
template <typename Math, TileShape kShape>
__device__ __forceinline__ bool add_splits(WarpTile<Math, kShape>& warp, const Tile& tile,
                                           int32_t* counters, float* partials, int32_t* shared) {
  using Sum = Vector<float, 4>;
  constexpr int kVectors = kShape.m_fragments * kShape.n_fragments * kTileThreads;
  Sum* const first = reinterpret_cast<Sum*>(partials) + int64_t{tile.partial} * kVectors;
  warp.for_each([&](int index, float (&sum)[4]) {
    store_global(first + int64_t{tile.split} * kVectors + index * kTileThreads + threadIdx.x,
                 Sum{sum[0], sum[1], sum[2], sum[3]});
  });
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) store_shared(shared, add_global(counters + tile.counter, 1));
  __syncthreads();
  if (load_shared(shared) != tile.splits - 1) return false;
  __threadfence();
  warp.for_each([&](int index, float (&sum)[4]) {
#pragma unroll
    for (float& value : sum) value = 0;
#pragma unroll 1
    for (int split = 0; split < tile.splits; ++split) {
      const Sum part = load_global_coherent(first + int64_t{split} * kVectors +
                                            index * kTileThreads + threadIdx.x);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part.data[i];
    }
  });
  if (threadIdx.x == 0) store_global(counters + tile.counter, 0);  // for the next launch
  __syncthreads();                                                 // everybody has read `shared`
  return true;
}

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

// Grid: plan.blocks.
template <typename Math, TileShape kShape, int kMinBlocks>
__global__ void __launch_bounds__(kTileThreads, kMinBlocks)
    conv_group_kernel(const __grid_constant__ ConvGroupLaunch launch) {
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
  FilterLoader<T, kShape.columns()> filter_loader(p, tile.n, filters, tile.k_begin);
  const auto load_filters = [&](int32_t step) {
    filter_loader.load(stage(step) + a_rows * kTileRowBytes);
  };
  constexpr int kAhead = kTileStages - 1;
  for (int step = 0; step < kAhead; ++step) {
    if (step < steps) load_filters(step);
  }
  wait_for_previous_kernel();
  allow_next_kernel();

  WindowLoader<T, kShape.rows()> window_loader(p, tile.m, tile.k_begin);
  PixelLoader<T> pixel_loader(p, tile.m - p.input_w - 1, a_rows, tile.k_begin);
  const PoolPrologue<T, kShape.rows()> pool(p, tile.m);
  const auto load_pixels = [&](int32_t step) {
    if (p.max_pool) {
      pixel_loader.load(stage(step));
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
  if (tile.splits > 1 && !add_splits(warp, tile, launch.counters, launch.partials,
                                     reinterpret_cast<int32_t*>(shared))) {
    return;
  }
  store_tile(warp, p, tile, shared);
}

// Blocks that share a multiprocessor at least: this bounds the registers of a thread.
template <TileShape kShape>
constexpr int kMinResident = kShape.m_fragments * kShape.n_fragments > 16 ? 2 : 3;

template <typename Math, int kShape>
cudaError_t launch_conv_group(const ConvGroupLaunch& group, cudaStream_t stream) {
  constexpr TileShape kTileShape = kTileShapes[kShape];
  return launch_dependent(conv_group_kernel<Math, kTileShape, kMinResident<kTileShape>>,
                          dim3(group.plan.blocks), dim3(kTileThreads), group.plan.shared_bytes,
                          stream, group);
}

template <typename Math>
cudaError_t run_conv_group(const ConvGroupLaunch& group, cudaStream_t stream) {
  switch (group.plan.shape) {
    case 0:
      return launch_conv_group<Math, 0>(group, stream);
    case 1:
      return launch_conv_group<Math, 1>(group, stream);
    default:
      return launch_conv_group<Math, 2>(group, stream);
  }
}

}  // namespace inception_ext::kernels
