#include "block.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "report.h"

namespace inception_ext::emulator {

constinit thread_local Block* Block::current_ = nullptr;

void Block::start_launch(const LaunchPlan& plan) {
  plan_ = &plan;
  threads_ = static_cast<int>(plan.block.x * plan.block.y * plan.block.z);
  contexts_.resize(kMaxThreads);
  copies_.resize(kMaxThreads);
  stack_of_.assign(kMaxThreads, -1);
  warps_.resize((threads_ + kWarpSize - 1) / kWarpSize);
  accesses_.resize(kMaxWarps);
  for (WarpAccesses& accesses : accesses_) accesses.start_launch();
  counts_ = {};
}

Counts Block::take_counts() { return std::exchange(counts_, {}); }

void Block::run(uint32_t number) {
  current_ = this;
  start_block(number);
  schedule();
  end_block();
  current_ = nullptr;
  if (failed_) throw Error(report_);
}

void Block::start_block(uint32_t number) {
  const dim3& grid = plan_->grid;
  index_ = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
  random_ = Random(plan_->seed * 0x2545f4914f6cdd1du + number);
  live_ = threads_;
  failed_ = false;
  barriers_.fill({});
  for (size_t w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    const int lanes = std::min(kWarpSize, threads_ - static_cast<int>(w) * kWarpSize);
    warp.live = lanes == kWarpSize ? kFullWarp : (1u << lanes) - 1;
    warp.ready = warp.waiting = 0;
    warp.mixed = warp.at_barrier = false;
    for (int i = 0; i < kWarpSize; ++i) warp.order[i] = static_cast<uint8_t>(i);
    for (int i = kWarpSize - 1; i > 0; --i) {
      std::swap(warp.order[i], warp.order[random_.below(i + 1)]);
    }
    warp.unstarted = 0;
    for (int turn = 0; turn < kWarpSize; ++turn) {
      warp.turn_of[warp.order[turn]] = static_cast<uint8_t>(turn);
      if (warp.live >> warp.order[turn] & 1) warp.unstarted |= 1u << turn;
    }
  }
  if (plan_->shared_bytes > 0) {
    shared_.start_block(plan_->shared_bytes);
    clocks_.start_block();
  }
}

void Block::end_block() {
  for (int thread = 0; thread < threads_; ++thread) {
    copies_[thread].give_up(
        [&](const AsyncCopies::Copy& copy) { shared_.land(copy.shared, copy.bytes, Access()); });
    if (stack_of_[thread] >= 0) give_back_stack(thread);  // after a failure
  }
}

void Block::schedule() {
  while (live_ > 0 && !failed_) {
    uint32_t runnable = 0;
    for (size_t w = 0; w < warps_.size(); ++w) {
      if (warps_[w].ready | warps_[w].unstarted) runnable |= 1u << w;
    }
    if (runnable == 0) {
      set_failure("deadlock: every thread waits" + waiting_threads());
      return;
    }
    for (uint32_t skip = random_.below(std::popcount(runnable)); skip > 0; --skip) {
      runnable &= runnable - 1;
    }
    const int w = std::countr_zero(runnable);
    Warp& warp = warps_[w];
    warp.turn = static_cast<int>(random_.below(kWarpSize));
    thread_ = w * kWarpSize;
    yield_from(scheduler_);
    const bool stuck = warp.live && !warp.at_barrier && !(warp.ready | warp.unstarted);
    if (stuck && !failed_) {
      set_failure("divergent warp: the lanes of warp " + std::to_string(w) +
                  " wait for one another" + waiting_threads());
    }
  }
}

void Block::yield_from(Context& from) {
  Warp& warp = warps_[thread_ / kWarpSize];
  const uint32_t candidates = warp.ready | warp.unstarted;
  if (candidates == 0) {
    switch_context(from, scheduler_);
    return;
  }
  const auto later = static_cast<uint32_t>(candidates & ~uint64_t{0} << (warp.turn + 1));
  const int turn = std::countr_zero(later ? later : candidates);
  const int thread = thread_ / kWarpSize * kWarpSize + warp.order[turn];
  warp.turn = turn;
  thread_ = thread;
  if (warp.unstarted >> turn & 1) {
    warp.unstarted &= ~(1u << turn);
    const int stack = stacks_.take();
    stack_of_[thread] = stack;
    prepare(contexts_[thread], stacks_.base(stack), stacks_.top(stack), &Block::fiber_main);
  }
  warp.ready &= ~(1u << turn);
  if (&contexts_[thread] != &from) switch_context(from, contexts_[thread]);
}

void Block::fiber_main() {
  for (;;) {
    Block& block = current();
    block.plan_->body(block.plan_->arguments);
    block.finish_thread();
  }
}

// Returns only to begin another thread, `thread_`, on the same stack.
void Block::finish_thread() {
  Warp& warp = warps_[this->warp()];
  const int thread = thread_;
  warp.live &= ~(1u << lane());
  --live_;
  // Those that wait may have waited for this lane alone.
  uint32_t lanes = warp.at_barrier ? 0 : warp.waiting;
  while (lanes != 0) {
    const Wait& wait = warp.waits[std::countr_zero(lanes)];
    if (wait.kind == WaitKind::kMatrix || wait.kind == WaitKind::kMma) {
      fail(name_of(Actor::thread(thread)) + " returned while others of its warp wait" +
           waiting_threads());
    }
    const uint32_t group = complete_group(warp, wait);
    lanes &= group ? ~group : lanes - 1;
    if (group == 0) continue;
    if (wait.compute) wait.compute(warp.operands.data(), group);
    if (wait.kind == WaitKind::kBlock || wait.kind == WaitKind::kNamed) {
      arrive(wait, group);
    } else {
      warp.waiting &= ~group;
      set_ready(warp, group);
    }
  }
  if (warp.live == 0) {
    accesses_[this->warp()].flush(counts_);
    if (plan_->shared_bytes > 0) clocks_.arrive(this->warp(), barriers_[0].clocks);
    release_if_complete(0);
  }
  const uint32_t next = warp.unstarted & -warp.unstarted;
  if (warp.ready == 0 && next != 0) {
    warp.unstarted &= ~next;
    warp.turn = std::countr_zero(next);
    thread_ = thread / kWarpSize * kWarpSize + warp.order[warp.turn];
    if (stacks_.overflowed(stack_of_[thread])) fail("a thread ran out of stack");
    std::swap(stack_of_[thread_], stack_of_[thread]);
    return;
  }
  give_back_stack(thread);
  Context gone;
  yield_from(gone);
}

void Block::give_back_stack(int thread) {
  if (stacks_.overflowed(stack_of_[thread])) set_failure("a thread ran out of stack");
  stacks_.give_back(stack_of_[thread]);
  stack_of_[thread] = -1;
}

void Block::set_ready(Warp& warp, uint32_t lanes) {
  if (lanes == kFullWarp) {
    warp.ready = kFullWarp;
    return;
  }
  for (; lanes != 0; lanes &= lanes - 1) {
    warp.ready |= 1u << warp.turn_of[std::countr_zero(lanes)];
  }
}

namespace {

bool same_wait(const Wait& a, const Wait& b) {
  if (a.kind != b.kind || a.mask != b.mask || a.barrier != b.barrier) return false;
  // Shuffles, votes and __syncwarp may stand at different places of a program; the others are
  // one instruction that the warp executes as a whole.
  const bool anywhere =
      a.kind == WaitKind::kSyncWarp || a.kind == WaitKind::kShuffle || a.kind == WaitKind::kBallot;
  return anywhere || same_place(a.place, b.place);
}

}  // namespace

uint32_t Block::complete_group(const Warp& warp, const Wait& wait) {
  const uint32_t needed = wait.mask & warp.live;
  if ((warp.waiting & needed) != needed) return 0;
  if (warp.mixed) {
    for (uint32_t lanes = needed; lanes != 0; lanes &= lanes - 1) {
      if (!same_wait(warp.waits[std::countr_zero(lanes)], wait)) return 0;
    }
  }
  return needed;
}

void Block::wait_for(const Wait& wait, void* operand) {
  Warp& warp = warps_[this->warp()];
  const uint32_t bit = 1u << lane();
  if (!(wait.mask & bit)) fail("a lane is missing in its own mask at " + place_text(wait.place));
  const bool whole = wait.kind == WaitKind::kMatrix || wait.kind == WaitKind::kMma;
  if (whole && warp.live != kFullWarp) {
    fail("a warp with lanes that returned or never were is at " + place_text(wait.place) +
         ", which needs all 32");
  }
  if (warp.waiting == 0) {
    warp.mixed = false;
  } else if (!warp.mixed) {
    warp.mixed = !same_wait(warp.waits[std::countr_zero(warp.waiting)], wait);
  }
  warp.waits[lane()] = wait;
  warp.operands[lane()] = operand;
  warp.waiting |= bit;
  const uint32_t group = complete_group(warp, wait);
  if (group == 0) {
    park();
    return;
  }
  if (wait.compute) wait.compute(warp.operands.data(), group);
  if (wait.kind == WaitKind::kBlock || wait.kind == WaitKind::kNamed) {
    arrive(wait, group);
    if (wait.stays) {
      switch_context(contexts_[thread_], scheduler_);
    } else {
      warp.ready &= ~(1u << warp.turn_of[lane()]);
    }
    return;
  }
  warp.waiting &= ~group;
  set_ready(warp, group & ~bit);
}

void Block::arrive(const Wait& wait, uint32_t lanes) {
  const int w = warp();
  Warp& warp = warps_[w];
  Barrier& barrier = barriers_[wait.barrier];
  if (barrier.warps == 0 && barrier.arrived == 0) {
    barrier.first = wait;
  } else if (wait.barrier == 0 && !same_place(barrier.first.place, wait.place)) {
    fail("divergent barrier: not all threads of the block are at the same __syncthreads" +
         waiting_threads());
  } else if (barrier.first.threads != wait.threads) {
    fail("named barrier " + std::to_string(wait.barrier) + " is for " +
         std::to_string(barrier.first.threads) + " threads at " + place_text(barrier.first.place) +
         " and for " + std::to_string(wait.threads) + " at " + place_text(wait.place));
  }
  if (plan_->shared_bytes > 0) clocks_.arrive(w, barrier.clocks);
  barrier.arrived += kWarpSize;
  if (wait.stays) {
    barrier.warps |= 1u << w;
    warp.at_barrier = true;
  } else {
    warp.waiting &= ~lanes;
    set_ready(warp, lanes);
  }
  release_if_complete(wait.barrier);
}

void Block::release_if_complete(int number) {
  Barrier& barrier = barriers_[number];
  if (number == 0) {
    uint32_t live = 0;
    for (size_t w = 0; w < warps_.size(); ++w) live |= (warps_[w].live ? 1u : 0u) << w;
    if (barrier.warps == 0 || barrier.warps != live) return;
  } else {
    if (barrier.arrived < barrier.first.threads) return;
    if (barrier.arrived > barrier.first.threads) {
      fail("more threads than the " + std::to_string(barrier.first.threads) +
           " that named barrier " + std::to_string(number) + " is for, at " +
           place_text(barrier.first.place));
    }
  }
  counts_.barriers += 1;
  for (uint32_t warps = barrier.warps; warps != 0; warps &= warps - 1) {
    const int w = std::countr_zero(warps);
    Warp& warp = warps_[w];
    if (plan_->shared_bytes > 0) clocks_.leave(w, barrier.clocks);
    accesses_[w].flush(counts_);
    set_ready(warp, warp.waiting);
    warp.waiting = 0;
    warp.at_barrier = false;
  }
  barrier.warps = 0;
  barrier.arrived = 0;
  if (number == 0) {
    if (plan_->shared_bytes > 0) clocks_.start_interval();
  } else {
    barrier.clocks = {};
  }
}

}  // namespace inception_ext::emulator
