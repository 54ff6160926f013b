#include "launch.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "counters.h"
#include "global_memory.h"
#include "report.h"

namespace inception_ext::emulator {
namespace {

std::mutex settings_mutex;
Settings current_settings;

thread_local int64_t useful_macs = 0;

// Blocks keep their stacks and shadow memory between launches.
std::mutex pool_mutex;
std::vector<std::unique_ptr<Block>> pool;

std::unique_ptr<Block> take_block() {
  const std::lock_guard lock(pool_mutex);
  if (pool.empty()) return std::make_unique<Block>();
  auto block = std::move(pool.back());
  pool.pop_back();
  return block;
}

void give_back(std::unique_ptr<Block> block) {
  const std::lock_guard lock(pool_mutex);
  pool.push_back(std::move(block));
}

// What the workers of one launch share.
struct Progress {
  std::vector<uint32_t> order;  // of the blocks
  std::atomic<size_t> next = 0;
  std::mutex mutex;  // of the rest
  std::exception_ptr error;
  Counts counts;
};

void work(const LaunchPlan& plan, Progress& progress) {
  auto block = take_block();
  block->start_launch(plan);
  try {
    for (size_t i; (i = progress.next++) < progress.order.size();) block->run(progress.order[i]);
  } catch (...) {
    progress.next = progress.order.size();
    const std::lock_guard lock(progress.mutex);
    if (!progress.error) progress.error = std::current_exception();
  }
  {
    const std::lock_guard lock(progress.mutex);
    progress.counts.add(block->take_counts());
  }
  give_back(std::move(block));
}

int worker_count(const Settings& settings, int64_t threads) {
  // Below this, starting a host thread costs more than it saves.
  constexpr int64_t kThreadsPerWorker = 2048;
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const int workers = settings.workers > 0 ? settings.workers : cores;
  return static_cast<int>(std::clamp<int64_t>(threads / kThreadsPerWorker, 1, workers));
}

std::vector<uint3> all_thread_indices(const dim3& block) {
  std::vector<uint3> indices;
  for (unsigned z = 0; z < block.z; ++z) {
    for (unsigned y = 0; y < block.y; ++y) {
      for (unsigned x = 0; x < block.x; ++x) indices.push_back({x, y, z});
    }
  }
  return indices;
}

}  // namespace

Settings settings() {
  const std::lock_guard lock(settings_mutex);
  return current_settings;
}

void set_settings(const Settings& settings) {
  const std::lock_guard lock(settings_mutex);
  current_settings = settings;
}

void note_useful_macs(int64_t macs) { useful_macs = macs; }

cudaError_t run_kernel(const void* kernel, const GridAt& grid_at, dim3 block, size_t shared_bytes,
                       void (*body)(const void*), const void* arguments) {
  const Settings settings = emulator::settings();
  const int64_t useful = std::exchange(useful_macs, 0);
  const dim3& grid = grid_at.grid;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMaxThreads || block.z > 64 || shared_bytes > settings.shared_limit) {
    return cudaErrorInvalidConfiguration;
  }
  Scope* scope = Scope::current();
  const LaunchPlan plan{function_name(kernel),
                        grid_at.place,
                        grid,
                        block,
                        shared_bytes,
                        settings.seed,
                        settings.checks,
                        settings.counting,
                        settings.capability,
                        scope,
                        body,
                        arguments,
                        all_thread_indices(block)};
  if (scope)
    scope->add_kernel(plan.kernel + ", launched at " + place_text(plan.place), plan.checks);

  Progress progress;
  progress.order.resize(blocks);
  std::iota(progress.order.begin(), progress.order.end(), 0);
  Random random(settings.seed);
  for (size_t i = progress.order.size() - 1; i > 0; --i) {
    std::swap(progress.order[i], progress.order[random.below(static_cast<uint32_t>(i + 1))]);
  }
  std::vector<std::thread> helpers;
  for (int i = 1; i < worker_count(settings, blocks * threads); ++i) {
    helpers.emplace_back([&] { work(plan, progress); });
  }
  work(plan, progress);
  for (std::thread& helper : helpers) helper.join();

  std::vector<Touched> touched;
  if (scope) touched = scope->take_touched();
  if (progress.error) std::rethrow_exception(progress.error);
  if (settings.counting) {
    add_launch({plan.kernel,
                scope ? scope->op() : "",
                {grid.x, grid.y, grid.z},
                {block.x, block.y, block.z},
                static_cast<int64_t>(shared_bytes),
                useful,
                std::move(progress.counts),
                std::move(touched)});
  }
  return cudaSuccess;
}

}  // namespace inception_ext::emulator
