#include "wgrad_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace inception_ext::kernels {
namespace {

// A model of an H100, in clock cycles of one multiprocessor. It only has to rank plans.
constexpr double kClocksPerProduct = 1.6;   // of m16n8 over 32 bytes of pixels, by all warps
constexpr double kBytesPerClock = 25;       // from the L2 cache, when every multiprocessor reads
constexpr double kBytesPerClockAlone = 64;  // when few do
// Partial sums cost what they would in device memory, and what they push out of the L2 cache: many
// splits with little to gain would move more bytes than the activations.
constexpr double kPartialBytesPerClock = 6;
constexpr double kStepLatency = 200;   // of a step, however small: copy, barrier, products
constexpr double kTileClocks = 3000;   // start, first copies, epilogue
constexpr double kStageClocks = 1500;  // of the last block of a sum, before it has read anything
// Blocks that share a multiprocessor, by registers.
constexpr int kResident[kTileShapeCount] = {2, 3, 4};
constexpr int kMostAtOnce = 12;  // splits that are added in one stage
constexpr int kLeastSteps = 4;   // of a split

struct Candidate {
  WgradPlan plan;
  double clocks;
  bool fits;  // into the budget
};

int32_t shared_bytes(const WgradGemm& gemm, const TileShape& shape, int32_t element_bytes) {
  const int32_t filters = kTileStages * shape.columns() * kTileRowBytes;
  if (gemm.pool_width == 0) {
    const int32_t vectors = gemm.batch_norm ? 3 * shape.rows() * 4 : 0;
    return filters + kTileStages * shape.rows() * kTileRowBytes + vectors;
  }
  const int64_t ring = int64_t{pool_ring_rows(gemm.pool_width, kTileRowBytes / element_bytes)} *
                       shape.rows() * element_bytes;
  const int64_t bytes = filters + 2 * shape.rows() * kTileRowBytes + ring;
  return static_cast<int32_t>(std::min<int64_t>(bytes, std::numeric_limits<int32_t>::max()));
}

// Clocks of one block over `steps`, if it had a multiprocessor's throughput to itself.
double work_of(double m_units, double n_units, double steps) {
  const double bytes = (16 * m_units + 8 * n_units) * kTileRowBytes;
  return steps * std::max(kClocksPerProduct * 2 * m_units * n_units, bytes / kBytesPerClock);
}

Candidate make_plan(const WgradGemm* gemms, int count, int shape_index, int steps_a_block,
                    const TileBudget& budget) {
  const TileShape& shape = kTileShapes[shape_index];
  const int64_t tile_bytes = partial_bytes(shape);
  Candidate result{{shape_index, 0, 0, 0, {}}, 0, true};
  WgradPlan& plan = result.plan;
  struct Entry {
    WgradTiles tiles;
    double clocks;  // of one block, alone
  };
  Entry entries[kMaxGemms];
  int64_t counters = 0, partials = 0;
  double work = 0, longest = 0;
  for (int i = 0; i < count; ++i) {
    const WgradGemm& gemm = gemms[i];
    if (gemm.rows == 0 || gemm.filters == 0) continue;
    const int32_t m_units = ceil_div(gemm.rows, 16), n_units = ceil_div(gemm.filters, 8);
    const int32_t m_tiles = ceil_div(m_units, shape.rows() / 16);
    const int32_t n_tiles = ceil_div(n_units, shape.columns() / 8);
    const int64_t tiles = int64_t{m_tiles} * n_tiles;
    const int32_t steps = ceil_div(gemm.pixels, kTileRowBytes / budget.element_bytes);
    const int32_t splits = std::max(1, ceil_div(steps, steps_a_block));
    const int32_t runs = splits <= kMostAtOnce ? 1 : std::lround(std::sqrt(splits));
    const double each = static_cast<double>(steps) / splits;
    const double one = work_of(static_cast<double>(m_units) / m_tiles,
                               static_cast<double>(n_units) / n_tiles, each);
    double clocks = std::max(one, kStepLatency * each) + kTileClocks;
    work += (one + kTileClocks / kResident[shape_index]) * tiles * splits;
    if (splits > 1) {
      const double sums = ceil_div(splits, runs) + (runs > 1 ? runs : 0);
      clocks += (runs > 1 ? 2 : 1) * kStageClocks + sums * tile_bytes / kBytesPerClockAlone;
      work += 2.0 * splits * tiles * tile_bytes / kPartialBytesPerClock;
    }
    longest = std::max(longest, clocks);
    entries[plan.gemms++] = {
        {i, 0, m_tiles, m_units, n_tiles, n_units, steps, splits, runs,
         static_cast<int32_t>(counters), splits > 1 ? static_cast<int32_t>(partials) : -1},
        clocks};
    if (splits > 1) {
      counters += tiles * (runs + 1);
      partials += tiles * (splits + runs);
      if (counters > budget.counters || partials * tile_bytes > budget.partial_bytes) {
        result.fits = false;
        return result;
      }
    }
    plan.shared_bytes =
        std::max(plan.shared_bytes, shared_bytes(gemm, shape, budget.element_bytes));
  }
  result.fits = plan.shared_bytes <= budget.shared_bytes;
  std::stable_sort(entries, entries + plan.gemms,
                   [](const Entry& a, const Entry& b) { return a.clocks > b.clocks; });
  for (int i = 0; i < plan.gemms; ++i) {
    plan.tiles[i] = entries[i].tiles;
    plan.tiles[i].first_block = plan.blocks;
    plan.blocks += plan.tiles[i].m_tiles * plan.tiles[i].n_tiles * plan.tiles[i].splits;
  }
  for (WgradTiles& t : plan.tiles) {  // where there is room left
    const int64_t needed = int64_t{2} * t.m_tiles * t.n_tiles;
    if (t.splits != 1 || (partials + needed) * tile_bytes > budget.partial_bytes) continue;
    t.first_partial = static_cast<int32_t>(partials);
    partials += needed;
  }
  // List scheduling ends at most one block after an even share of the work.
  result.clocks = work / budget.multiprocessors + longest;
  return result;
}

}  // namespace

WgradPlan plan_wgrad(const WgradGemm* gemms, int count, int first_shape, const TileBudget& budget) {
  int32_t pixels = 1;
  for (int i = 0; i < count; ++i) pixels = std::max(pixels, gemms[i].pixels);
  WgradPlan best{};
  best.shape = -1;
  double clocks = std::numeric_limits<double>::infinity();
  for (int shape = first_shape; shape < kTileShapeCount; ++shape) {
    const int32_t most = ceil_div(pixels, kTileRowBytes / budget.element_bytes);
    const bool is_free = lays_aside(kTileShapes[shape]) || most <= kTensorChainSteps;
    if (!is_free && budget.counters == 0) continue;
    // All steps in one block, or as many as it may have; then ever fewer: 3/4 of them at a time.
    for (int32_t steps = is_free ? most : kTensorChainSteps;;
         steps = std::max(kLeastSteps, steps - ceil_div(steps, 4))) {
      const Candidate candidate = make_plan(gemms, count, shape, steps, budget);
      if (!candidate.fits) break;
      if (candidate.clocks < clocks) {
        clocks = candidate.clocks;
        best = candidate.plan;
      }
      if (budget.counters == 0 || steps <= kLeastSteps) break;
    }
  }
  return best;
}

}  // namespace inception_ext::kernels
