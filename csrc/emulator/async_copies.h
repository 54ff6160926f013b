// The cp.async copies that a thread has under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "place.h"

namespace inception_ext::emulator {

class AsyncCopies {
 public:
  struct Copy {
    char* shared;
    const void* global;
    int bytes;  // written to shared memory: `valid` from global memory, then zeros
    int valid;
    Place place;
  };

  void start(const Copy& copy) {
    copies_.push_back(copy);
    ++open_;
  }

  void commit() {
    groups_.push_back(open_);
    open_ = 0;
  }

  // Completes the oldest groups until `pending` are left, and calls landed(copy) for each copy.
  template <typename Function>
  void wait(size_t pending, const Function& landed) {
    while (groups_.size() - first_group_ > pending) {
      for (uint32_t i = groups_[first_group_++]; i > 0; --i) {
        const Copy& copy = copies_[first_copy_++];
        if (copy.valid > 0) std::memcpy(copy.shared, copy.global, copy.valid);
        std::memset(copy.shared + copy.valid, 0, copy.bytes - copy.valid);
        landed(copy);
      }
    }
    drop_completed();
  }

  // Forgets all copies; calls function(copy) for each that did not land.
  template <typename Function>
  void give_up(const Function& function) {
    for (; first_copy_ < copies_.size(); ++first_copy_) function(copies_[first_copy_]);
    copies_.clear();
    groups_.clear();
    first_copy_ = first_group_ = open_ = 0;
  }

 private:
  void drop_completed() {
    constexpr size_t kKeep = 64;
    if (first_copy_ > kKeep) {
      copies_.erase(copies_.begin(), copies_.begin() + static_cast<ptrdiff_t>(first_copy_));
      first_copy_ = 0;
    }
    if (first_group_ > kKeep) {
      groups_.erase(groups_.begin(), groups_.begin() + static_cast<ptrdiff_t>(first_group_));
      first_group_ = 0;
    }
  }

  std::vector<Copy> copies_;      // from first_copy_ on under way
  std::vector<uint32_t> groups_;  // copies of each committed group, from first_group_ on
  size_t first_copy_ = 0;
  size_t first_group_ = 0;
  uint32_t open_ = 0;  // copies not committed yet
};

}  // namespace inception_ext::emulator
