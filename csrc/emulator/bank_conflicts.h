// Bank conflicts of a warp's shared-memory accesses.
//
// Shared memory has 32 banks of 4 bytes. A warp's access is served in phases: all 32 lanes for up
// to 4 bytes each, 16 lanes for 8 bytes, 8 lanes for 16 bytes. A phase takes as many passes as the
// busiest bank has different words to deliver.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "counters.h"
#include "place.h"

namespace inception_ext::emulator {

// Counts one phase: `count` lanes at byte offsets `offsets`, `bytes` each.
void count_phase(const uint32_t* offsets, int count, int bytes, const Place& place, Counts& counts);

// Lanes run one after another here. This puts their accesses back together: those of the same
// place, each lane's n-th since the last barrier, are one instruction of the warp.
class WarpAccesses {
 public:
  void start_launch();
  void add(int lane, uint32_t offset, int bytes, const Place& place, Counts& counts);
  // At a barrier: counts the instructions that not all lanes took part in.
  void flush(Counts& counts);

 private:
  struct Instruction {
    uint32_t lanes = 0;
    std::array<uint32_t, 32> offsets;
  };
  struct Site {
    Place place;
    int bytes;
    std::array<uint32_t, 32> executed = {};  // by each lane, since the last flush
    std::vector<Instruction> instructions;
  };

  static void count(const Site& site, const Instruction& instruction, Counts& counts);
  Site& site_of(const Place& place, int bytes);

  std::vector<Site> sites_;
  size_t last_ = 0;
  bool dirty_ = false;
};

}  // namespace inception_ext::emulator
