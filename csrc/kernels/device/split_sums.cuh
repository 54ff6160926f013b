// Sums of a tile in global memory: those of blocks that share its contraction, and those that one
// block lays aside.
#pragma once

#include <cstdint>

#include "../tile_plan.h"
#include "global.cuh"
#include "shared.cuh"
#include "types.cuh"
#include "warp_tile.cuh"

namespace inception_ext::kernels {

// Where a thread has its sums in tile `partial` of the partial sums.
template <TileShape kShape>
__device__ __forceinline__ Vector<float, 4>* partial_sums(float* partials, int32_t partial) {
  constexpr int kVectors = kShape.m_fragments * kShape.n_fragments * kTileThreads;
  return reinterpret_cast<Vector<float, 4>*>(partials) + int64_t{partial} * kVectors + threadIdx.x;
}

// Moves the sums there, and begins again at 0.
template <typename Math, TileShape kShape>
__device__ __forceinline__ void store_partial(WarpTile<Math, kShape>& warp, float* partials,
                                              int32_t partial) {
  Vector<float, 4>* const to = partial_sums<kShape>(partials, partial);
  warp.for_each([&](int index, float (&sum)[4]) {
    store_global(to + index * kTileThreads, Vector<float, 4>{sum[0], sum[1], sum[2], sum[3]});
#pragma unroll
    for (float& value : sum) value = 0;
  });
}

// Adds what lies there.
template <typename Math, TileShape kShape>
__device__ __forceinline__ void add_partial(WarpTile<Math, kShape>& warp, float* partials,
                                            int32_t partial) {
  const Vector<float, 4>* const from = partial_sums<kShape>(partials, partial);
#pragma unroll
  for (int i = 0; i < kShape.m_fragments; ++i) {
    if (i >= warp.m_count) break;
#pragma unroll
    for (int j = 0; j < kShape.n_fragments; ++j) {
      if (j >= warp.n_count) break;
      const Vector<float, 4> sum =
          load_global_coherent(from + (i * kShape.n_fragments + j) * kTileThreads);
#pragma unroll
      for (int e = 0; e < 4; ++e) warp.sum[i][j][e] += sum.data[e];
    }
    __syncwarp();  // the loads of a row of fragments overlap; there are no registers for more
  }
}

// The sums of all parts, in the block that comes last; false in the others. `shared` is four bytes
// that nobody reads any more.
template <typename Math, TileShape kShape>
__device__ __forceinline__ bool add_splits(WarpTile<Math, kShape>& warp, const SplitSums& splits,
                                           int32_t* counters, float* partials, int32_t* shared) {
  store_partial(warp, partials, splits.partial + splits.index);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) store_shared(shared, add_global(counters + splits.counter, 1));
  __syncthreads();
  if (load_shared(shared) != splits.count - 1) return false;
  __threadfence();
#pragma unroll 1
  for (int part = 0; part < splits.count; ++part) {
    add_partial(warp, partials, splits.partial + part);
  }
  if (threadIdx.x == 0) store_global(counters + splits.counter, 0);  // for the next launch
  __syncthreads();                                                   // everybody has read `shared`
  return true;
}

}  // namespace inception_ext::kernels
