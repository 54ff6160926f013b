// Weight gradients of several convolutions in one launch, each a GEMM: see conv_wgrad.h.
//
// A block of four warps computes one tile of one of the GEMMs (wgrad_plan.h), rows (r, s, c) by
// filters, over a part of the pixels. Both operands lie in memory pixel by pixel, and so they do in
// shared memory: steps of 32 pixels (16 of float) go through kTileStages stages, and ldmatrix
// transposes while it reads fragments. Fragments of 16 rows or 8 filters that hold nothing are
// skipped.
//
// What a prologue makes of x is made one step ahead of the products, so that it overlaps them:
// batch norm in place, by the thread that copied a chunk; max pooling from a ring of raw pixels
// into two tiles that take turns.
//
// A block lays its sums aside in global memory after a chain of steps, and adds these sums up:
// rounding errors grow with the number of additions in a row.
//
// Blocks that share a tile write their sums to global memory; whoever comes last reads all of them,
// in a fixed order: results repeat bit for bit.
#pragma once

#include <cstdint>

#include "conv_wgrad_launch.h"
#include "device/pixel_math.cuh"
#include "device/split_sums.cuh"
#include "device/sync.cuh"
#include "device/warp_tile.cuh"
#include "device/wgrad_loader.cuh"
#include "device/wgrad_pool.cuh"
#include "device/wgrad_store.cuh"
#include "launch.h"
#include "variants.h"
#include "wgrad_plan.h"

namespace inception_ext::kernels {

// What a block computes; grid: plan.blocks.
template <typename Math, TileShape kShape>
__device__ __forceinline__ void compute_wgrad_tile(const ConvWgradLaunch& launch) {
  using T = typename Math::Element;
  constexpr int kAhead = kTileStages - 1;
  constexpr int kRows = kShape.rows();
  constexpr int kDyBytes = kShape.columns() * kTileRowBytes;
  const WgradTile tile = wgrad_tile_of(launch.plan, blockIdx.x);
  const WgradProblem& p = launch.problem[launch.plan.tiles[tile.entry].gemm];
  char* const shared = dynamic_shared();  // kTileStages tiles of dy, then what x needs
  char* const x_shared = shared + kTileStages * kDyBytes;
  WarpTile<Math, kShape> warp(16 * tile.m_units, tile.n_units);
  warp.spread_rows(tile.m_units);

  wait_for_previous_kernel();
  allow_next_kernel();
  const auto contract = [&](int32_t first_m, int32_t steps, auto x) {
    GradLoader<Math, kShape.columns()> grads(p, tile.n, 8 * tile.n_units, first_m);
    const int32_t pixels = p.batch * p.output_h * p.output_w - first_m;
    const auto dy_tile = [&](int32_t step) { return shared + step % kTileStages * kDyBytes; };
    const auto load = [&](int32_t step) {
      if (step < steps) {
        grads.load(dy_tile(step));
        x.load(step);
      }
      commit_copies();
    };
    for (int step = 0; step < kAhead; ++step) load(step);
    if (x.prepares() && steps > 0) {
      wait_copies<kAhead - 1>();
      __syncthreads();
      x.prepare(0);
    }
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
      if (x.prepares()) {
        wait_copies<kAhead - 2>();
      } else {
        wait_copies<kAhead - 1>();
      }
      __syncthreads();
      load(step + kAhead);
      if (x.prepares() && step + 1 < steps) x.prepare(step + 1);
      warp.multiply(x.tile(step), dy_tile(step), pixels - step * kStepPixels<T>);
    }
    wait_copies<0>();
    __syncthreads();
  };
  const auto contract_steps = [&](int32_t begin, int32_t end) {
    const int32_t m = begin * kStepPixels<T>, steps = end - begin;
    if (p.prologue == WgradPrologue::kMaxPool) {
      contract(m, steps, PoolOperand<Math, kRows>(p, tile.m, 16 * tile.m_units, m, x_shared));
    } else {
      contract(m, steps, TapOperand<Math, kRows>(p, tile.m, 16 * tile.m_units, m, x_shared));
    }
  };
  if constexpr (lays_aside(kShape)) {
    const int32_t partial = wgrad_partial_of(launch.plan, tile);
    const int32_t chain = partial < 0 ? tile.end - tile.begin : Math::kChainSteps;
#pragma unroll 1
    for (int32_t begin = tile.begin; begin < tile.end; begin += chain) {
      contract_steps(begin, smaller(begin + chain, tile.end));
      if (begin > tile.begin) add_partial(warp, launch.partials, partial);
      if (begin + chain < tile.end) store_partial(warp, launch.partials, partial);
    }
  } else {
    static_assert(Math::kChainSteps == kTensorChainSteps);
    contract_steps(tile.begin, tile.end);
  }

  int32_t* const flag = reinterpret_cast<int32_t*>(shared);
  const auto add = [&](const SplitSums& part) {
    return part.count == 1 || add_splits(warp, part, launch.counters, launch.partials, flag);
  };
  const WgradSums sums = wgrad_sums_of(launch.plan, tile);
  if (!add(sums.of_run) || !add(sums.of_tile)) return;
  WgradStore<T, kShape.n_fragments>(p, shared).write(warp, tile.m, tile.n);
}

// Shared memory of sm_75 holds one or two blocks at a time, which may use its registers.
constexpr int wgrad_resident(const TileShape& shape) {
  return kArchitecture > 0 && kArchitecture < 800 ? 1 : min_resident(shape);
}

// kShape: of kTileShapes.
template <typename Math, int kShape>
__global__ void __launch_bounds__(kTileThreads, wgrad_resident(kTileShapes[kShape]))
    conv_wgrad_kernel(const __grid_constant__ ConvWgradLaunch launch) {
  if constexpr (Math::kExists) {
    compute_wgrad_tile<Math, kTileShapes[kShape]>(launch);
  } else {
    never_launched();
  }
}

template <typename Math>
cudaError_t run_conv_wgrad(const ConvWgradLaunch& group, cudaStream_t stream) {
  return with_shape<Math::kFirstShape>(group.plan.shape, [&](auto shape) {
    return launch_dependent(conv_wgrad_kernel<Math, decltype(shape)::value>,
                            dim3(group.plan.blocks), dim3(kTileThreads), group.plan.shared_bytes,
                            stream, group);
  });
}

}  // namespace inception_ext::kernels
