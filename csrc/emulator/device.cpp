// The twins that concern one thread at a time, and the warp's synchronisation.
#include "device.h"

#include <algorithm>
#include <bit>
#include <sstream>

#include "block.h"
#include "global_memory.h"

namespace inception_ext::emulator {

uint3 thread_index() {
  const Block& block = Block::current();
  return block.plan().thread_indices[block.thread()];
}
uint3 block_index() { return Block::current().index(); }
dim3 block_extent() { return Block::current().plan().block; }
dim3 grid_extent() { return Block::current().plan().grid; }

int compute_capability() { return Block::current().plan().capability; }

void sync_block(Place place) {
  Block::current().wait_for({.kind = WaitKind::kBlock, .mask = kFullWarp, .place = place}, nullptr);
}

void sync_named(int barrier, int threads, bool wait, Place place) {
  Block& block = Block::current();
  if (barrier < 1 || barrier >= kNamedBarriers || threads <= 0 || threads % kWarpSize != 0) {
    block.fail("named barrier " + std::to_string(barrier) + " for " + std::to_string(threads) +
               " threads at " + place_text(place) + ": expected 1 to 15, and whole warps");
  }
  block.wait_for({.kind = WaitKind::kNamed,
                  .mask = kFullWarp,
                  .barrier = barrier,
                  .threads = threads,
                  .stays = wait,
                  .place = place},
                 nullptr);
}

void sync_warp(uint32_t mask, Place place) {
  Block::current().wait_for({.kind = WaitKind::kSyncWarp,
                             .mask = mask,
                             .compute =
                                 [](void* const*, uint32_t) {
                                   Block& block = Block::current();
                                   block.clocks().sync_warp(block.warp());
                                 },
                             .place = place},
                            nullptr);
}

namespace {

struct ShuffleOperand {
  uint64_t bits;
  int source;  // lane
  uint64_t result;
};

int shuffle_source(Shuffle kind, int lane, int argument, int width) {
  const int first = lane / width * width, last = first + width - 1;
  switch (kind) {
    case Shuffle::kIndex:
      return first + (argument & (width - 1));
    case Shuffle::kUp:
      return lane - argument >= first ? lane - argument : lane;
    case Shuffle::kDown:
      return lane + argument <= last ? lane + argument : lane;
    case Shuffle::kXor:
      return (lane ^ argument) <= last ? lane ^ argument : lane;
  }
  return lane;
}

struct BallotOperand {
  bool predicate;
  uint32_t result;
};

}  // namespace

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int lane, int width, Place place) {
  Block& block = Block::current();
  ShuffleOperand operand{bits, shuffle_source(kind, block.lane(), lane, width), 0};
  block.wait_for(
      {.kind = WaitKind::kShuffle,
       .mask = mask,
       .compute =
           [](void* const* operands, uint32_t lanes) {
             constexpr uint64_t kPoison = ~uint64_t{0};  // a lane that is not there
             for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
               auto& mine = *static_cast<ShuffleOperand*>(operands[std::countr_zero(rest)]);
               mine.result = lanes >> mine.source & 1
                                 ? static_cast<ShuffleOperand*>(operands[mine.source])->bits
                                 : kPoison;
             }
           },
       .place = place},
      &operand);
  return operand.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Place place) {
  BallotOperand operand{predicate, 0};
  Block::current().wait_for(
      {.kind = WaitKind::kBallot,
       .mask = mask,
       .compute =
           [](void* const* operands, uint32_t lanes) {
             uint32_t votes = 0;
             for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
               const int lane = std::countr_zero(rest);
               if (static_cast<BallotOperand*>(operands[lane])->predicate) votes |= 1u << lane;
             }
             for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
               static_cast<BallotOperand*>(operands[std::countr_zero(rest)])->result = votes;
             }
           },
       .place = place},
      &operand);
  return operand.result;
}

void count_macs(int64_t macs) { Block::current().counts().macs += macs; }

}  // namespace inception_ext::emulator
