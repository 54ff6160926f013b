#include "memory_access.h"

#include <cstring>
#include <sstream>

#include "global_memory.h"

namespace inception_ext::emulator {
namespace {

std::string verb(bool write, size_t bytes) {
  return std::string(write ? " writes " : " reads ") + std::to_string(bytes) + " bytes ";
}

void fail_with_collision(Block& block, size_t offset, size_t bytes, bool write,
                         const Access& access, const Collision& collision) {
  const Access& other = collision.other;
  std::ostringstream text;
  const bool unfinished = other.in_flight;
  text << (unfinished ? "cp.async without a wait" : "race in shared memory") << "\n    "
       << block.name_of(access.actor) << verb(write, bytes) << "at shared memory + " << offset
       << ": " << place_text(access.place) << "\n    " << block.name_of(other.actor)
       << (unfinished               ? " copies to them and has not waited for it: "
           : collision.other_writes ? " wrote them: "
                                    : " read them: ")
       << place_text(other.place);
  if (!unfinished) text << "\n    and no barrier lies between";
  block.fail(text.str());
}

}  // namespace

void check_shared(Block& block, const void* pointer, size_t bytes, bool write,
                  const Access& access) {
  if (!block.plan().checks) return;
  SharedMemory& shared = block.shared();
  const auto offset = static_cast<const char*>(pointer) - shared.data();
  if (!shared.holds(pointer, bytes) || offset % bytes != 0) {
    std::ostringstream text;
    text << (shared.holds(pointer, bytes) ? "misaligned shared memory access"
                                          : "shared memory overrun")
         << "\n    " << block.name_of(access.actor) << verb(write, bytes) << "at shared memory + "
         << offset << " of " << shared.size() << " bytes: " << place_text(access.place);
    block.fail(text.str());
  }
  const auto collision = write ? shared.write(pointer, bytes, access, block.clocks())
                               : shared.read(pointer, bytes, access, block.clocks());
  if (collision) fail_with_collision(block, offset, bytes, write, access, *collision);
}

void check_global(Block& block, const void* pointer, size_t bytes, size_t alignment, bool write,
                  Place place) {
  const LaunchPlan& plan = block.plan();
  if (plan.counting) {
    (write ? block.counts().bytes_written : block.counts().bytes_read) +=
        static_cast<int64_t>(bytes);
  }
  if (!plan.checks && !plan.counting) return;
  std::string problem;
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    problem = "at a misaligned address";
  } else if (plan.scope) {
    problem = plan.scope->access(pointer, bytes, write);
  } else {
    problem = "outside every tensor: none was declared";
  }
  if (problem.empty() || !plan.checks) return;
  block.fail("bad global memory access\n    " + block.name_of(Actor::thread(block.thread())) +
             verb(write, bytes) + problem + "\n    at " + place_text(place));
}

namespace {

Access access_of(const Block& block, Place place, const WarpClocks& clocks) {
  return {place, clocks.clock(block.warp()), Actor::thread(block.thread()), false};
}

void shared_access(const void* pointer, size_t bytes, bool write, Place place) {
  Block& block = Block::current();
  if (block.plan().checks) {
    check_shared(block, pointer, bytes, write, access_of(block, place, block.clocks()));
  }
  if (block.plan().counting) {
    const auto offset = static_cast<const char*>(pointer) - block.shared().data();
    block.warp_accesses().add(block.lane(), static_cast<uint32_t>(offset), static_cast<int>(bytes),
                              place, block.counts());
  }
}

}  // namespace

void* dynamic_shared() { return Block::current().shared().data(); }
size_t dynamic_shared_bytes() { return Block::current().plan().shared_bytes; }

void read_shared(const void* pointer, size_t bytes, Place place) {
  shared_access(pointer, bytes, false, place);
}

void write_shared(const void* pointer, size_t bytes, Place place) {
  shared_access(pointer, bytes, true, place);
}

void read_global(const void* pointer, size_t bytes, Place place) {
  check_global(Block::current(), pointer, bytes, bytes, false, place);
}

void write_global(const void* pointer, size_t bytes, Place place) {
  check_global(Block::current(), pointer, bytes, bytes, true, place);
}

void update_global(const void* pointer, size_t bytes, Place place) {
  read_global(pointer, bytes, place);
  write_global(pointer, bytes, place);
}

void copy_async(void* shared, const void* global, int bytes, int valid, Place place) {
  Block& block = Block::current();
  if (valid > 0) check_global(block, global, valid, bytes, false, place);
  Access access = access_of(block, place, block.clocks());
  access.in_flight = compute_capability() >= 80;
  check_shared(block, shared, bytes, true, access);
  if (block.plan().counting) {
    const auto offset = static_cast<const char*>(shared) - block.shared().data();
    block.warp_accesses().add(block.lane(), static_cast<uint32_t>(offset), bytes, place,
                              block.counts());
  }
  if (access.in_flight) {
    block.copies().start({static_cast<char*>(shared), global, bytes, valid, place});
  } else {
    if (valid > 0) std::memcpy(shared, global, valid);
    std::memset(static_cast<char*>(shared) + valid, 0, bytes - valid);
  }
}

void commit_copies() { Block::current().copies().commit(); }

void wait_copies(int pending) {
  Block& block = Block::current();
  block.copies().wait(pending, [&](const AsyncCopies::Copy& copy) {
    if (!block.plan().checks) return;
    block.shared().land(copy.shared, copy.bytes, access_of(block, copy.place, block.clocks()));
  });
}

}  // namespace inception_ext::emulator
