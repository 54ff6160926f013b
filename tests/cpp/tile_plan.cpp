// Tile plans of random groups and of GoogLeNet: each is checked block by block, those of GoogLeNet
// are printed as well. tests/test_tile_plan.py reads what this prints.
#include "kernels/tile_plan.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace inception_ext::kernels {
namespace {

int64_t g_checks = 0, g_failures = 0;

void check(bool ok, const char* what, const std::string& where) {
  ++g_checks;
  if (ok || ++g_failures > 20) return;
  std::fprintf(stderr, "FAILED: %s: %s\n", what, where.c_str());
}

struct Group {
  std::vector<Gemm> gemms;
  TileBudget budget;

  int count() const { return static_cast<int>(gemms.size()); }
  TilePlan plan() const { return plan_tiles(gemms.data(), count(), 0, budget); }
  int32_t k_steps(int i) const {
    return ceil_div(gemms[i].k * budget.element_bytes, kTileRowBytes);
  }

  std::string text() const {
    std::string text = "budget " + std::to_string(budget.element_bytes) + " " +
                       std::to_string(budget.multiprocessors) + " " +
                       std::to_string(budget.shared_bytes) + " " + std::to_string(budget.counters);
    for (const Gemm& g : gemms) {
      text += ", " + std::to_string(g.m) + " x " + std::to_string(g.n) + " x " +
              std::to_string(g.k) + " pool " + std::to_string(g.pool_width);
    }
    return text;
  }
};

constexpr int64_t kCounters = 4096, kPartialBytes = 16 << 20;
constexpr int kShared = 227 << 10;  // of an H100

// What the kernel lays out in shared memory.
int64_t shared_bytes(const Gemm& gemm, const TileShape& shape) {
  const int64_t stage = staged_rows(shape, gemm.pool_width) + shape.columns();
  return (kTileStages * stage + (gemm.pool_width > 0 ? shape.rows() : 0)) * kTileRowBytes;
}

// Multiply-accumulates of the fragments that a block computes.
int64_t macs_of(const Gemm& gemm, const Tile& tile, const TileShape& shape, int step_k,
                int element_bytes) {
  const int32_t per_step = kTileRowBytes / element_bytes;
  const int32_t rows = std::min(shape.rows(), gemm.m - tile.m);
  const int32_t k = std::min(tile.k_end * per_step, gemm.k) - tile.k_begin * per_step;
  return int64_t{ceil_div(rows, 16) * 16} * (8 * tile.n_units) * (ceil_div(k, step_k) * step_k);
}

bool same(const TilePlan& a, const TilePlan& b) {
  return a.shape == b.shape && a.blocks == b.blocks && a.shared_bytes == b.shared_bytes &&
         a.gemms == b.gemms && std::memcmp(a.tiles, b.tiles, a.gemms * sizeof(GemmTiles)) == 0;
}

// Every element of C belongs to one tile, every step of K of it to one split; tiles, counters and
// partial sums keep within their bounds and apart from one another.
TilePlan check_plan(const Group& group) {
  const std::string where = group.text();
  const TilePlan plan = group.plan();
  check(same(plan, group.plan()), "the same plan again", where);
  check(plan.shape >= 0 && plan.shape < kTileShapeCount, "a shape", where);
  if (plan.shape < 0) return plan;
  const TileShape& shape = kTileShapes[plan.shape];

  int64_t needed = 0;
  std::vector<std::vector<uint8_t>> seen;  // by GEMM: [row of tiles, column in eights, step of K]
  int filled = 0;
  for (int i = 0; i < group.count(); ++i) {
    const Gemm& g = group.gemms[i];
    const bool empty = g.m == 0 || g.n == 0;
    filled += !empty;
    if (!empty) needed = std::max(needed, shared_bytes(g, shape));
    const size_t tiles = empty ? 0 : ceil_div(g.m, shape.rows()) * ceil_div(g.n, 8);
    seen.emplace_back(tiles * group.k_steps(i));
  }
  check(plan.gemms == filled, "the GEMMs that are not empty", where);
  check(plan.shared_bytes == needed, "shared memory as the kernel needs it", where);
  check(plan.shared_bytes <= group.budget.shared_bytes, "shared memory within the budget", where);

  int64_t macs = 0;
  const int step_k = 32 / group.budget.element_bytes;
  std::set<int32_t> counters, partials;
  for (int32_t block = 0; block < plan.blocks; ++block) {
    const Tile t = tile_of(plan, shape, block);
    const bool known = t.gemm >= 0 && t.gemm < group.count();
    check(known, "a GEMM of the group", where);
    if (!known) continue;
    const Gemm& g = group.gemms[t.gemm];
    const int32_t units = ceil_div(g.n, 8), steps = group.k_steps(t.gemm);
    check(t.m % shape.rows() == 0 && t.m >= 0 && t.m < g.m, "rows within C", where);
    check(t.n % 8 == 0 && t.n >= 0 && t.n_units >= 1 && t.n / 8 + t.n_units <= units &&
              8 * t.n_units <= shape.columns(),
          "columns within C and the shape", where);
    check(t.k_begin >= 0 && t.k_begin < t.k_end && t.k_end <= steps, "steps within K", where);
    check(t.splits.index >= 0 && t.splits.index < t.splits.count, "a split", where);
    if (g_failures) return plan;
    for (int32_t unit = t.n / 8; unit < t.n / 8 + t.n_units; ++unit) {
      for (int32_t step = t.k_begin; step < t.k_end; ++step) {
        ++seen[t.gemm][(int64_t{t.m / shape.rows()} * units + unit) * steps + step];
      }
    }
    macs += macs_of(g, t, shape, step_k, group.budget.element_bytes);
    if (t.splits.count == 1) continue;
    check(t.splits.counter >= 0 && t.splits.counter < group.budget.counters,
          "a counter of the budget", where);
    check(counters.insert(t.splits.counter).second == (t.splits.index == 0),
          "a counter for each tile", where);
    const int32_t partial = t.splits.partial + t.splits.index;
    check(partials.insert(partial).second, "partial sums of its own", where);
    check((partial + 1) * partial_bytes(shape) <= group.budget.partial_bytes,
          "partial sums within the budget", where);
  }
  for (const auto& counts : seen) {
    const bool once = std::all_of(counts.begin(), counts.end(), [](uint8_t c) { return c == 1; });
    check(once, "every element of C and step of K once", where);
  }
  check(macs == issued_macs(plan, group.gemms.data(), step_k), "issued_macs adds up", where);
  return plan;
}

void check_random_groups(int count) {
  std::mt19937_64 engine(7);
  const auto below = [&](int64_t n) { return static_cast<int32_t>(engine() % n); };
  const auto spread = [&](int bits) { return 1 + below(int64_t{1} << (1 + below(bits))); };
  for (int i = 0; i < count; ++i) {
    Group group;
    const int multiprocessors[] = {1, 2, 40, 108, 132};
    const int shared[] = {64 << 10, 99 << 10, 163 << 10, kShared};
    const int64_t counters[] = {0, 3, 60, kCounters};
    const int64_t partial[] = {0, 100 << 10, kPartialBytes};
    group.budget = {2 + 2 * below(2), multiprocessors[below(5)], shared[below(4)],
                    counters[below(4)], partial[below(3)]};
    if (group.budget.partial_bytes == 0) group.budget.counters = 0;
    const int size = 1 + below(kMaxGemms);
    for (int j = 0; j < size; ++j) {
      const bool empty = below(10) == 0;
      const int32_t m = empty ? 0 : spread(12), n = spread(10), k = spread(12);
      const int32_t width = below(4) == 0 ? std::min(spread(8), widest_pool(group.budget)) : 0;
      group.gemms.push_back({m, n, k, width});
    }
    check_plan(group);
  }
}

void check_limits() {
  for (int bytes : {2, 4}) {
    for (int shared : {48 << 10, 64 << 10, 99 << 10, 163 << 10, kShared}) {
      const TileBudget budget{bytes, 132, shared, 0, 0};
      const int32_t widest = widest_pool(budget);
      check(widest > 0, "some width", std::to_string(shared));
      check_plan({{{5000, 64, 64, widest}}, budget});
      const Group wider{{{5000, 64, 64, widest + 1}}, budget};
      check(wider.plan().shape < 0, "no plan for wider images", wider.text());
    }
  }
  const Group empty{{{0, 8, 8, 0}, {8, 0, 8, 0}}, {2, 132, kShared, 0, 0}};
  check(check_plan(empty).blocks == 0, "no block", empty.text());
}

struct Module {
  const char* name;
  int in, side, one, reduce3, three, reduce5, five, pool;
};

constexpr Module kModules[] = {
    {"3a", 192, 28, 64, 96, 128, 16, 32, 32},     {"3b", 256, 28, 128, 128, 192, 32, 96, 64},
    {"4a", 480, 14, 192, 96, 208, 16, 48, 64},    {"4b", 512, 14, 160, 112, 224, 24, 64, 64},
    {"4c", 512, 14, 128, 128, 256, 24, 64, 64},   {"4d", 512, 14, 112, 144, 288, 32, 64, 64},
    {"4e", 528, 14, 256, 160, 320, 32, 128, 128}, {"5a", 832, 7, 256, 160, 320, 32, 128, 128},
    {"5b", 832, 7, 384, 192, 384, 48, 128, 128},
};

// The two launches of a module: the merged 1x1 and the pool projection; the 3x3 and the "5x5".
Group launch_of(const Module& m, int batch, int number) {
  const int pixels = batch * m.side * m.side;
  Group group{{}, {2, 132, kShared, kCounters, kPartialBytes}};
  if (number == 0) {
    group.gemms = {{pixels, m.one + m.reduce3 + m.reduce5, m.in, 0},
                   {pixels, m.pool, m.in, m.side}};
  } else {
    group.gemms = {{pixels, m.three, 9 * m.reduce3, 0}, {pixels, m.five, 9 * m.reduce5, 0}};
  }
  return group;
}

void print_googlenet(int batch) {
  int64_t useful = 0, issued = 0;
  for (const Module& m : kModules) {
    for (int number = 0; number < 2; ++number) {
      const Group group = launch_of(m, batch, number);
      const TilePlan plan = check_plan(group);
      for (const Gemm& g : group.gemms) useful += int64_t{g.m} * g.n * g.k;
      issued += issued_macs(plan, group.gemms.data(), 16);
      std::printf("plan batch %d module %s launch %d shape %d blocks %d", batch, m.name, number + 1,
                  plan.shape, plan.blocks);
      for (int i = 0; i < plan.gemms; ++i) {
        const GemmTiles& t = plan.tiles[i];
        std::printf(" | gemm %d: %d columns of tiles, %d splits of %d steps", t.gemm, t.n_tiles,
                    t.splits, t.k_steps);
      }
      std::printf("\n");
    }
  }
  std::printf("useful batch %d share %.4f\n", batch, double(useful) / double(issued));
}

}  // namespace
}  // namespace inception_ext::kernels

int main() {
  using namespace inception_ext::kernels;
  check_random_groups(400);
  check_limits();
  for (int batch : {1, 8, 128, 256}) print_googlenet(batch);
  std::printf("%lld checks, %lld failures\n", static_cast<long long>(g_checks),
              static_cast<long long>(g_failures));
  return g_failures != 0;
}
