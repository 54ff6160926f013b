#include "tile_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace inception_ext::kernels {
namespace {

// A model of an H100, in clock cycles of one multiprocessor. It only has to rank plans.
constexpr double kClocksPerProduct = 3.2;   // of m16n8 over 64 bytes of K, by all warps together
constexpr double kBytesPerClock = 25;       // from the L2 cache, when every multiprocessor reads
constexpr double kBytesPerClockAlone = 64;  // when few do
constexpr double kStepClocks = 150;    // of a step of K besides its products: barrier, ldmatrix
constexpr double kTileClocks = 2000;   // start, first copies, epilogue
constexpr double kSplitClocks = 2500;  // until the last block adds up
constexpr double kSplitGain = 0.95;    // of the clocks without, at most: the model is no finer
constexpr int kMaxSplits = 16;
constexpr int kUnsplit = 1 << 30;  // steps of K in a block
// Blocks that share a multiprocessor, by registers.
constexpr int kResident[kTileShapeCount] = {2, 3, 3};

struct Candidate {
  TilePlan plan;
  double clocks;
};

int32_t m_tiles(const Gemm& gemm, const TileShape& shape) { return ceil_div(gemm.m, shape.rows()); }

int32_t shared_bytes(const Gemm& gemm, const TileShape& shape) {
  const int32_t staged = staged_rows(shape, gemm.pool_width) + shape.columns();
  const int32_t pooled = gemm.pool_width > 0 ? shape.rows() : 0;
  return (kTileStages * staged + pooled) * kTileRowBytes;
}

// Clocks of a step of K of one block.
struct StepClocks {
  double busy;   // of the multiprocessor, when it has other blocks to go on with
  double alone;  // from start to end, when it has none: nothing hides barrier and ldmatrix
};

StepClocks step_clocks(const Gemm& gemm, const TileShape& shape, double units) {
  const int32_t rows = std::min(gemm.m, shape.rows()), fragments = ceil_div(rows, 16);
  const double bytes = (rows + 8 * units) * kTileRowBytes;
  const double products = kClocksPerProduct * fragments * units;
  const double slowest_warp = kTileWarps * kClocksPerProduct *
                              std::min(fragments, shape.m_fragments) *
                              std::ceil(units / shape.warps_n);
  return {std::max(products, bytes / kBytesPerClock),
          std::max(kStepClocks + slowest_warp, bytes / kBytesPerClockAlone)};
}

Candidate make_plan(const Gemm* gemms, int count, int shape_index, int steps_a_block,
                    const TileBudget& budget) {
  const TileShape& shape = kTileShapes[shape_index];
  const int32_t step_k = kTileRowBytes / budget.element_bytes;
  Candidate result{{shape_index, 0, 0, 0, {}}, 0};
  TilePlan& plan = result.plan;
  struct Entry {
    GemmTiles tiles;
    int32_t tiles_of_c;
    double clocks;  // of one block, alone
    double share;   // of a multiprocessor's, when it has other blocks too
  };
  Entry entries[kMaxGemms] = {};
  int32_t counters = 0, partials = 0;
  double work = 0;
  for (int i = 0; i < count; ++i) {
    const Gemm& gemm = gemms[i];
    if (gemm.m == 0 || gemm.n == 0) continue;
    const int32_t units = ceil_div(gemm.n, 8);
    const int32_t n_tiles = ceil_div(units, shape.columns() / 8);
    const int32_t k_steps = ceil_div(gemm.k, step_k);
    const int32_t tiles_of_c = m_tiles(gemm, shape) * n_tiles;
    int32_t splits = std::clamp(ceil_div(k_steps, steps_a_block), 1, kMaxSplits);
    if (counters + tiles_of_c > budget.counters ||
        int64_t{partials + tiles_of_c * splits} * partial_bytes(shape) > budget.partial_bytes) {
      splits = 1;
    }
    const double steps = static_cast<double>(k_steps) / splits;
    const auto [busy, alone] = step_clocks(gemm, shape, static_cast<double>(units) / n_tiles);
    double share = busy * steps + kTileClocks / kResident[shape_index];
    double clocks = alone * steps + kTileClocks;
    if (splits > 1) {
      const double bytes = static_cast<double>(partial_bytes(shape));
      share += 2 * bytes / kBytesPerClock;
      clocks += kSplitClocks + splits * bytes / kBytesPerClockAlone;
    }
    work += share * tiles_of_c * splits;
    entries[plan.gemms++] = {
        {i, 0, n_tiles, units, k_steps, splits, counters, partials}, tiles_of_c, clocks, share};
    if (splits > 1) {
      counters += tiles_of_c;
      partials += tiles_of_c * splits;
    }
    plan.shared_bytes = std::max(plan.shared_bytes, shared_bytes(gemm, shape));
  }
  std::stable_sort(entries, entries + plan.gemms,
                   [](const Entry& a, const Entry& b) { return a.clocks > b.clocks; });
  // Where the longest blocks go first, the grid ends about when it must: not before an even share
  // of the work is done, nor before the multiprocessor with the most blocks has done these.
  result.clocks = std::max(entries[0].clocks, work / budget.multiprocessors);
  for (int i = 0; i < plan.gemms; ++i) {
    plan.tiles[i] = entries[i].tiles;
    plan.tiles[i].first_block = plan.blocks;
    plan.blocks += entries[i].tiles_of_c * entries[i].tiles.splits;
    const int32_t most = ceil_div(plan.blocks, budget.multiprocessors);
    result.clocks = std::max(result.clocks, most * entries[i].share);
  }
  return result;
}

}  // namespace

TilePlan plan_tiles(const Gemm* gemms, int count, int first_shape, const TileBudget& budget) {
  TilePlan best{};
  best.shape = -1;
  double clocks = std::numeric_limits<double>::infinity();
  for (int shape = first_shape; shape < kTileShapeCount; ++shape) {
    for (int steps = kUnsplit; steps >= 2; steps = steps > 128 ? 128 : steps / 2) {
      const Candidate candidate = make_plan(gemms, count, shape, steps, budget);
      if (candidate.plan.shared_bytes > budget.shared_bytes) break;
      if (candidate.clocks < (steps == kUnsplit ? 1 : kSplitGain) * clocks) {
        clocks = candidate.clocks;
        best = candidate.plan;
      }
      if (budget.counters == 0) break;
    }
  }
  return best;
}

int32_t widest_pool(const TileBudget& budget) {
  int32_t width = 0;
  for (const TileShape& shape : kTileShapes) {
    const int32_t without = shared_bytes({1, 1, 1, 0}, shape) + shape.rows() * kTileRowBytes;
    const int32_t rows = (budget.shared_bytes - without) / (kTileStages * kTileRowBytes);
    width = std::max(width, rows / 2 - 1);
  }
  return width;
}

int64_t issued_macs(const TilePlan& plan, const Gemm* gemms, int step_k) {
  int64_t macs = 0;
  for (int i = 0; i < plan.gemms; ++i) {
    const GemmTiles& tiles = plan.tiles[i];
    const Gemm& gemm = gemms[tiles.gemm];
    // Fragments of 16 rows, 8 columns and step_k of K, wherever one holds an element. A split of K
    // lies between steps, so that it adds none.
    const int64_t rows = int64_t{ceil_div(gemm.m, 16)} * 16;
    const int64_t columns = int64_t{tiles.n_units} * 8;
    const int64_t k = int64_t{ceil_div(gemm.k, step_k)} * step_k;
    macs += rows * columns * k;
  }
  return macs;
}

}  // namespace inception_ext::kernels
