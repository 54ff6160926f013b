// The words in which a block reports an error.
#include <bit>
#include <sstream>

#include "block.h"

namespace inception_ext::emulator {
namespace {

std::string triple(unsigned x, unsigned y, unsigned z) {
  std::ostringstream text;
  text << '(' << x << ", " << y << ", " << z << ')';
  return text.str();
}

const char* kind_text(WaitKind kind) {
  switch (kind) {
    case WaitKind::kBlock:
      return "__syncthreads";
    case WaitKind::kNamed:
      return "a named barrier";
    case WaitKind::kSyncWarp:
      return "__syncwarp";
    case WaitKind::kShuffle:
      return "a shuffle";
    case WaitKind::kBallot:
      return "a vote";
    case WaitKind::kMatrix:
      return "ldmatrix";
    case WaitKind::kMma:
      return "mma";
    case WaitKind::kNone:
      break;
  }
  return "nothing";
}

}  // namespace

std::string Block::name_of(const Actor& actor) const {
  if (actor.is_whole_warp()) return "warp " + std::to_string(actor.warp());
  const uint3 index = plan_->thread_indices[actor.thread()];
  return "thread " + triple(index.x, index.y, index.z);
}

void Block::set_failure(const std::string& what) {
  if (failed_) return;
  failed_ = true;
  std::ostringstream text;
  text << "emulator: " << what << "\n  kernel " << plan_->kernel << ", block "
       << triple(index_.x, index_.y, index_.z) << " of grid "
       << triple(plan_->grid.x, plan_->grid.y, plan_->grid.z) << ", " << threads_
       << " threads, launched at " << place_text(plan_->place) << ", seed " << plan_->seed;
  report_ = text.str();
}

void Block::fail(const std::string& what) {
  set_failure(what);
  Context gone;
  switch_context(gone, scheduler_);
  __builtin_unreachable();
}

std::string Block::waiting_threads() const {
  struct Group {
    Wait wait;
    int first;
    int count;
  };
  std::vector<Group> groups;
  for (size_t w = 0; w < warps_.size(); ++w) {
    for (uint32_t lanes = warps_[w].waiting; lanes != 0; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      const Wait& wait = warps_[w].waits[lane];
      auto group = groups.begin();
      while (group != groups.end() &&
             !(group->wait.kind == wait.kind && group->wait.mask == wait.mask &&
               same_place(group->wait.place, wait.place))) {
        ++group;
      }
      if (group == groups.end()) {
        groups.push_back({wait, static_cast<int>(w) * kWarpSize + lane, 1});
      } else {
        ++group->count;
      }
    }
  }
  std::ostringstream text;
  for (const Group& group : groups) {
    text << "\n    " << group.count << (group.count == 1 ? " thread" : " threads") << ", the first "
         << name_of(Actor::thread(group.first)) << ", at " << kind_text(group.wait.kind);
    if (group.wait.mask != kFullWarp)
      text << " of mask 0x" << std::hex << group.wait.mask << std::dec;
    text << ": " << place_text(group.wait.place);
  }
  const int returned = threads_ - live_;
  if (returned > 0) text << "\n    " << returned << " threads have returned";
  return text.str();
}

}  // namespace inception_ext::emulator
