// How a group of weight gradients is cut into the tiles that blocks compute: plain C++, for host
// and device.
//
// Each is a GEMM: rows m = (r, s, c), columns are filters, and the contraction runs over pixels. C
// is small and the contraction long, so it is cut into splits, whose sums are added in two stages
// where there are many: first those of each run of splits, then the runs. Tiles are of nearly even
// size in both directions, so that none is mostly padding. Block b of the grid computes
// wgrad_tile_of(plan, b).
#pragma once

#include <cstdint>

#include "tile_plan.h"

namespace inception_ext::kernels {

// Rounding errors grow with the number of additions in a row. So after a chain of steps a block
// lays its sums aside in the memory of the partial sums, and begins again at 0. Those of the
// largest tile, which is for tensor cores, leave no registers for that: its splits are no longer
// than that.
constexpr int32_t kTensorChainSteps = 64;  // 2048 pixels, 1024 of float
constexpr int32_t kScalarChainPixels = 512;

INCEPTION_EXT_HOST_DEVICE constexpr bool lays_aside(const TileShape& shape) {
  return shape.m_fragments * shape.n_fragments <= 16;
}

struct WgradGemm {
  int32_t rows;        // R * S * C
  int32_t filters;     // K
  int32_t pixels;      // N * P * Q
  int32_t pool_width;  // of the images that the max pool prologue reads; 0: none
  bool batch_norm;     // prologue
};

// Where the tiles of one GEMM lie in the grid.
struct WgradTiles {
  int32_t gemm;         // its number in the group
  int32_t first_block;  // of the grid
  int32_t m_tiles;
  int32_t m_units;  // rows, in sixteens
  int32_t n_tiles;
  int32_t n_units;        // filters, in eights
  int32_t steps;          // of kTileRowBytes of pixels
  int32_t splits;         // of the steps
  int32_t runs;           // of the splits; 1: they are added at once
  int32_t first_counter;  // of each tile, where it is split: one for each run, one for all
  // In tiles of partial sums, of each tile: one for each split, one for each run; -1: there is no
  // room for those of a tile that is not split.
  int32_t first_partial;
};

struct WgradPlan {
  int32_t shape;  // of kTileShapes
  int32_t blocks;
  int32_t shared_bytes;
  int32_t gemms;
  WgradTiles tiles[kMaxGemms];  // the longest first
};

// What one block computes: rows [m, m + 16 * m_units) and filters [n, n + 8 * n_units) of a GEMM,
// over steps [begin, end) of the pixels.
struct WgradTile {
  int32_t entry;  // of plan.tiles
  int32_t index;  // among the tiles of its GEMM
  int32_t split;
  int32_t m;
  int32_t m_units;
  int32_t n;
  int32_t n_units;
  int32_t begin;
  int32_t end;
};

INCEPTION_EXT_HOST_DEVICE constexpr WgradTile wgrad_tile_of(const WgradPlan& plan, int32_t block) {
  int i = 0;
  while (i + 1 < plan.gemms && block >= plan.tiles[i + 1].first_block) ++i;
  const WgradTiles& t = plan.tiles[i];
  const int32_t tiles = t.m_tiles * t.n_tiles;
  const int32_t index = (block - t.first_block) % tiles;  // neighbours share pixels
  const int32_t split = (block - t.first_block) / tiles;
  const int32_t m_tile = index / t.n_tiles, n_tile = index % t.n_tiles;
  const int32_t m = cut(t.m_units, t.m_tiles, m_tile);
  const int32_t n = cut(t.n_units, t.n_tiles, n_tile);
  return {i,
          index,
          split,
          16 * m,
          cut(t.m_units, t.m_tiles, m_tile + 1) - m,
          8 * n,
          cut(t.n_units, t.n_tiles, n_tile + 1) - n,
          cut(t.steps, t.splits, split),
          cut(t.steps, t.splits, split + 1)};
}

// The block's part in the sum of its run of splits; then the run's in that of the tile.
struct WgradSums {
  SplitSums of_run;
  SplitSums of_tile;
};

INCEPTION_EXT_HOST_DEVICE constexpr WgradSums wgrad_sums_of(const WgradPlan& plan,
                                                            const WgradTile& tile) {
  const WgradTiles& t = plan.tiles[tile.entry];
  const int32_t run = ((tile.split + 1) * t.runs - 1) / t.splits;  // the last that begins by then
  const int32_t first = cut(t.splits, t.runs, run);
  const int32_t counter = t.first_counter + tile.index * (t.runs + 1);
  const int32_t partial = t.first_partial + tile.index * (t.splits + t.runs);
  return {
      {tile.split - first, cut(t.splits, t.runs, run + 1) - first, counter + run, partial + first},
      {run, t.runs, counter + t.runs, partial + t.splits}};
}

// Where a block may lay its own sums aside; -1: nowhere.
INCEPTION_EXT_HOST_DEVICE constexpr int32_t wgrad_partial_of(const WgradPlan& plan,
                                                             const WgradTile& tile) {
  const SplitSums own = wgrad_sums_of(plan, tile).of_run;
  return plan.tiles[tile.entry].first_partial < 0 ? -1 : own.partial + own.index;
}

// Rows of the ring that the max pool prologue reads (device/wgrad_pool.cuh): a step's pixels with
// their neighbours, and the steps that are copied meanwhile.
INCEPTION_EXT_HOST_DEVICE constexpr int32_t pool_ring_rows(int32_t pool_width,
                                                           int32_t step_pixels) {
  return (kTileStages - 1) * step_pixels + 2 * (pool_width + 1);
}

// Chooses shape, from `first_shape` of kTileShapes on, and splits. blocks = 0: no GEMM has rows and
// filters. shape = -1: no shape fits into shared memory (a max pool prologue over very wide
// images).
WgradPlan plan_wgrad(const WgradGemm* gemms, int count, int first_shape, const TileBudget& budget);

}  // namespace inception_ext::kernels
