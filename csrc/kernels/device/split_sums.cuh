// Tiles whose contraction is split over several blocks: adding up what each has.
#pragma once

#include <cstdint>

#include "../tile_plan.h"
#include "global.cuh"
#include "shared.cuh"
#include "types.cuh"
#include "warp_tile.cuh"

namespace inception_ext::kernels {

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

}  // namespace inception_ext::kernels
