// One thread block in execution: its threads, their turns, and where they wait for one another.
//
// Every CUDA thread is a context with a stack of its own (fiber.h). A thread runs until it has to
// wait; then the next ready lane of its warp goes on, and when the warp has none, the scheduler
// picks another warp. Lanes and warps take turns in a random order that the seed decides.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "async_copies.h"
#include "bank_conflicts.h"
#include "counters.h"
#include "device.h"
#include "fiber.h"
#include "shared_memory.h"
#include "warp_clocks.h"

namespace inception_ext::emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = kMaxWarps * kWarpSize;
constexpr int kNamedBarriers = 16;  // 0 is __syncthreads

class Scope;

// Everything about a launch that its blocks share; nothing in it changes while they run.
struct LaunchPlan {
  std::string kernel;
  Place place;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  uint64_t seed;
  bool checks;
  bool counting;
  int capability;
  Scope* scope;               // may be nullptr
  void (*body)(const void*);  // runs the kernel as the current thread
  const void* arguments;
  std::vector<uint3> thread_indices;
};

// xorshift64*: small, fast and good enough to shuffle turns.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u | 1) {
    for (int i = 0; i < 4; ++i) below(2);
  }
  uint32_t below(uint32_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    const uint64_t bits = (state_ * 0x2545f4914f6cdd1du) >> 32;
    return static_cast<uint32_t>(bits * bound >> 32);
  }

 private:
  uint64_t state_;
};

enum class WaitKind : uint8_t {
  kNone,
  kBlock,
  kNamed,
  kSyncWarp,
  kShuffle,
  kBallot,
  kMatrix,
  kMma
};

// operands[lane] is what each of `lanes` brought.
using Compute = void (*)(void* const* operands, uint32_t lanes);

// What a lane waits for.
struct Wait {
  WaitKind kind = WaitKind::kNone;
  uint32_t mask = 0;          // of the lanes that have to come
  int barrier = 0;            // its number, for kBlock and kNamed
  int threads = 0;            // that a named barrier is for
  bool stays = true;          // false: arrives at a named barrier and goes on
  Compute compute = nullptr;  // of a collective
  Place place;
};

class Block {
 public:
  // The one whose threads run on this host thread.
  static Block& current() { return *current_; }

  void start_launch(const LaunchPlan& plan);
  // Runs block `number` of the grid to its end. Throws Error, also with what a check found.
  void run(uint32_t number);
  Counts take_counts();

  // The rest is for code that runs as a CUDA thread of the block.

  // Waits until the lanes of `mask` that have not returned are here with the same `kind`; the last
  // one calls wait.compute(operands, lanes) for all of them. Barriers gather their warps so too.
  void wait_for(const Wait& wait, void* operand);

  // Ends the block with a report; never returns. `what` goes after "emulator: ".
  [[noreturn]] void fail(const std::string& what);

  const LaunchPlan& plan() const { return *plan_; }
  uint3 index() const { return index_; }
  int thread() const { return thread_; }
  int lane() const { return thread_ % kWarpSize; }
  int warp() const { return thread_ / kWarpSize; }
  uint32_t live_lanes() const { return warps_[warp()].live; }
  AsyncCopies& copies() { return copies_[thread_]; }
  WarpAccesses& warp_accesses() { return accesses_[warp()]; }
  SharedMemory& shared() { return shared_; }
  WarpClocks& clocks() { return clocks_; }
  Counts& counts() { return counts_; }

  // "thread (3, 0, 0)" or "warp 2"
  std::string name_of(const Actor& actor) const;

 private:
  struct Warp {
    uint32_t live = 0;       // lanes that have not returned
    uint32_t unstarted = 0;  // turns (see order) that have not begun
    uint32_t ready = 0;      // turns that can go on
    uint32_t waiting = 0;    // lanes in `waits`
    bool mixed = false;      // the waiting lanes do not all wait for the same
    bool at_barrier = false;
    int turn = 0;
    std::array<uint8_t, kWarpSize> order;    // turn -> lane
    std::array<uint8_t, kWarpSize> turn_of;  // lane -> turn
    std::array<Wait, kWarpSize> waits;
    std::array<void*, kWarpSize> operands;
  };
  struct Barrier {
    uint32_t warps = 0;  // that wait
    int arrived = 0;     // threads
    Wait first;          // of the first warp to arrive
    ClockVector clocks = {};
  };

  static void fiber_main();
  void start_block(uint32_t number);
  void end_block();
  void schedule();
  void finish_thread();
  // Goes on with another lane of the current warp, or with the scheduler.
  void yield_from(Context& from);
  void park() { yield_from(contexts_[thread_]); }
  void set_ready(Warp& warp, uint32_t lanes);
  // The lanes that wait and can go on together now; 0 where there are none.
  static uint32_t complete_group(const Warp& warp, const Wait& wait);
  // The warp of `lanes` arrives at a barrier with the last of them.
  void arrive(const Wait& wait, uint32_t lanes);
  void release_if_complete(int barrier);
  void give_back_stack(int thread);
  void set_failure(const std::string& what);
  std::string waiting_threads() const;

  static constinit thread_local Block* current_ __attribute__((tls_model("initial-exec")));

  const LaunchPlan* plan_ = nullptr;
  uint3 index_ = {};
  int threads_ = 0;
  int thread_ = 0;  // the running one
  int live_ = 0;
  bool failed_ = false;
  std::string report_;
  Random random_{0};
  Context scheduler_;
  StackPool stacks_;
  std::vector<Context> contexts_;
  std::vector<int> stack_of_;
  std::vector<AsyncCopies> copies_;
  std::vector<Warp> warps_;
  std::vector<WarpAccesses> accesses_;
  std::array<Barrier, kNamedBarriers> barriers_;
  SharedMemory shared_;
  WarpClocks clocks_;
  Counts counts_;
};

}  // namespace inception_ext::emulator
