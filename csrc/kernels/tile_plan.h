// How a group of GEMMs is cut into the tiles that blocks compute: plain C++, for host and device.
//
// C [M, N] of each GEMM is cut along M into rows of tiles, along N into tiles of nearly even width
// (a multiple of 8 columns, so that no tile is mostly padding) and, where there are few tiles,
// along K as well. Block b of the grid computes tile_of(plan, shape, b).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define INCEPTION_EXT_HOST_DEVICE __host__ __device__
#else
#define INCEPTION_EXT_HOST_DEVICE
#endif

namespace inception_ext::kernels {

constexpr int kTileWarps = 4;
constexpr int kTileThreads = 32 * kTileWarps;
constexpr int kTileStages = 4;     // of K under way in shared memory
constexpr int kTileRowBytes = 64;  // of K in a stage, from each row of A and B: device/tile.cuh
constexpr int kMaxGemms = 8;

// A warp computes m_fragments x n_fragments products of 16 x 8; the warps lie warps_m x warps_n.
struct TileShape {
  int warps_m;
  int warps_n;
  int m_fragments;
  int n_fragments;

  INCEPTION_EXT_HOST_DEVICE constexpr int rows() const { return warps_m * m_fragments * 16; }
  INCEPTION_EXT_HOST_DEVICE constexpr int columns() const { return warps_n * n_fragments * 8; }
};

constexpr int kTileShapeCount = 3;
constexpr TileShape kTileShapes[kTileShapeCount] = {{2, 2, 4, 8}, {4, 1, 2, 8}, {2, 2, 2, 4}};

struct Gemm {
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t pool_width;  // of the images that the max pool prologue reads; 0: none
};

// Where the tiles of one GEMM lie in the grid.
struct GemmTiles {
  int32_t gemm;         // its number in the group
  int32_t first_block;  // of the grid
  int32_t n_tiles;
  int32_t n_units;        // columns, in eights
  int32_t k_steps;        // of kTileRowBytes
  int32_t splits;         // of K
  int32_t first_counter;  // one for each tile of C, where K is split
  int32_t first_partial;  // in tiles of partial sums, likewise
};

struct TilePlan {
  int32_t shape;  // of kTileShapes
  int32_t blocks;
  int32_t shared_bytes;
  int32_t gemms;
  GemmTiles tiles[kMaxGemms];  // the longest first, so that the short ones fill the gaps
};

// The part that a block has of a sum over several blocks (device/split_sums.cuh).
struct SplitSums {
  int32_t index;
  int32_t count;
  int32_t counter;
  int32_t partial;  // of index 0; the others follow
};

// What one block computes: rows [m, m + shape.rows()) and columns [n, n + 8 * n_units) of a GEMM,
// over steps [k_begin, k_end) of K.
struct Tile {
  int32_t gemm;
  int32_t m;
  int32_t n;
  int32_t n_units;
  int32_t k_begin;
  int32_t k_end;
  SplitSums splits;
};

INCEPTION_EXT_HOST_DEVICE constexpr int32_t ceil_div(int32_t a, int32_t b) {
  return (a + b - 1) / b;
}

INCEPTION_EXT_HOST_DEVICE constexpr int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// Where part `index` of `parts` begins, when `size` is cut evenly.
INCEPTION_EXT_HOST_DEVICE constexpr int32_t cut(int32_t size, int32_t parts, int32_t index) {
  return static_cast<int32_t>(int64_t{size} * index / parts);
}

INCEPTION_EXT_HOST_DEVICE constexpr Tile tile_of(const TilePlan& plan, const TileShape& shape,
                                                 int32_t block) {
  int i = 0;
  while (i + 1 < plan.gemms && block >= plan.tiles[i + 1].first_block) ++i;
  const GemmTiles& t = plan.tiles[i];
  const int32_t index = block - t.first_block;
  const int32_t split = index % t.splits;
  const int32_t of_c = index / t.splits;  // along N first: neighbours share rows of A
  const int32_t column = of_c % t.n_tiles;
  const int32_t first_unit = cut(t.n_units, t.n_tiles, column);
  return {t.gemm,
          of_c / t.n_tiles * shape.rows(),
          first_unit * 8,
          cut(t.n_units, t.n_tiles, column + 1) - first_unit,
          cut(t.k_steps, t.splits, split),
          cut(t.k_steps, t.splits, split + 1),
          {split, t.splits, t.first_counter + of_c, t.first_partial + of_c * t.splits}};
}

// Rows of A that a stage holds: those of the tile and, for the max pool prologue, their neighbours.
INCEPTION_EXT_HOST_DEVICE constexpr int32_t staged_rows(const TileShape& shape,
                                                        int32_t pool_width) {
  return shape.rows() + (pool_width > 0 ? 2 * (pool_width + 1) : 0);
}

// Bytes of float32 partial sums in one tile.
constexpr int64_t partial_bytes(const TileShape& shape) {
  return int64_t{4} * shape.rows() * shape.columns();
}

// What the choice depends on besides the GEMMs.
struct TileBudget {
  int32_t element_bytes;    // 2 or 4
  int32_t multiprocessors;  // of the device
  int32_t shared_bytes;     // that a block may use
  int64_t counters;         // for split tiles; 0: K is not split
  int64_t partial_bytes;    // likewise
};

// Chooses shape, from `first_shape` of kTileShapes on, and splits. blocks = 0: all GEMMs are empty.
// shape = -1: no shape fits into shared memory (a max pool prologue over very wide images).
TilePlan plan_tiles(const Gemm* gemms, int count, int first_shape, const TileBudget& budget);

// The widest images that a max pool prologue has the shared memory for.
int32_t widest_pool(const TileBudget& budget);

// Multiply-accumulates that the blocks of a plan issue, padding included; step_k: elements of K to
// an instruction.
int64_t issued_macs(const TilePlan& plan, const Gemm* gemms, int step_k);

}  // namespace inception_ext::kernels
