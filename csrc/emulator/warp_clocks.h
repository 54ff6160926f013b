// Which shared-memory accesses of a block are ordered by a barrier: a vector clock for each warp.
//
// Every access is stamped with the clock of its warp. A warp's clock advances when the warp
// synchronises, alone or at a barrier; at a barrier it also learns the clocks of the other warps.
// An access of warp v at clock c comes before what warp w does now when w knows a later clock of v.
// Clocks only grow, from block to block too, so that older stamps need no clearing.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace inception_ext::emulator {

constexpr int kMaxWarps = 32;

using ClockVector = std::array<uint32_t, kMaxWarps>;

class WarpClocks {
 public:
  uint32_t clock(int warp) const { return known_[warp][warp]; }
  bool is_before(int warp, uint32_t clock, int now) const { return clock < known_[now][warp]; }

  // Intervals lie between barriers of the whole block. Has `now` met `warp` at a barrier within
  // the present one?
  uint32_t interval() const { return interval_; }
  bool met_in_interval(int warp, int now) const {
    return known_[now][warp] > interval_start_[warp];
  }

  void sync_warp(int warp) { ++known_[warp][warp]; }

  // A warp arrives at a barrier and leaves what it knows there.
  void arrive(int warp, ClockVector& barrier) {
    for (int v = 0; v < kMaxWarps; ++v) barrier[v] = std::max(barrier[v], known_[warp][v]);
    barrier[warp] = ++known_[warp][warp];
  }

  // A warp leaves a barrier with what all have left there.
  void leave(int warp, const ClockVector& barrier) {
    for (int v = 0; v < kMaxWarps; ++v) known_[warp][v] = std::max(known_[warp][v], barrier[v]);
  }

  void start_interval() {
    ++interval_;
    for (int v = 0; v < kMaxWarps; ++v) interval_start_[v] = known_[v][v];
  }

  // Everything so far is ordered before everything from now on.
  void start_block() {
    ClockVector barrier = {};
    for (int v = 0; v < kMaxWarps; ++v) arrive(v, barrier);
    for (int v = 0; v < kMaxWarps; ++v) leave(v, barrier);
    start_interval();
  }

 private:
  std::array<ClockVector, kMaxWarps> known_ = {};
  ClockVector interval_start_ = {};
  uint32_t interval_ = 0;
};

}  // namespace inception_ext::emulator
