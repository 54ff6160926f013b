// A block's shared memory and, for each byte of it, who wrote and read it last.
//
// A race is two accesses of one byte by different threads, at least one of them a write, that no
// barrier orders (WarpClocks). Bytes are kept 16 at a time as long as they are accessed 16 at a
// time, which the tiles of a GEMM are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "place.h"
#include "warp_clocks.h"

namespace inception_ext::emulator {

// Who accesses memory: thread 0 ... 1023 of the block, or a warp as a whole (ldmatrix).
class Actor {
 public:
  static Actor thread(int thread) { return Actor(static_cast<uint16_t>(thread)); }
  static Actor warp(int warp) { return Actor(static_cast<uint16_t>(kWarp | warp << 5)); }
  static Actor nobody() { return Actor(kNobody); }

  bool exists() const { return id_ != kNobody; }
  bool is_whole_warp() const { return id_ & kWarp; }
  int warp() const { return (id_ & 1023) >> 5; }
  int thread() const { return id_ & 1023; }
  bool operator==(const Actor&) const = default;

 private:
  static constexpr uint16_t kWarp = 1024, kNobody = 0xffff;
  explicit Actor(uint16_t id) : id_(id) {}
  uint16_t id_;
};

struct Access {
  Place place;
  uint32_t clock = 0;
  Actor actor = Actor::nobody();
  bool in_flight = false;  // a cp.async that nobody has waited for yet
};

// The earlier access that a checked one collides with.
struct Collision {
  Access other;
  bool other_writes;
};

class SharedMemory {
 public:
  SharedMemory();

  // Fills `bytes` of memory with NaN.
  void start_block(size_t bytes);
  char* data() { return data_; }
  size_t size() const { return size_; }
  bool holds(const void* pointer, size_t bytes) const {
    const auto offset = static_cast<size_t>(static_cast<const char*>(pointer) - data_);
    return offset <= size_ && bytes <= size_ - offset;
  }

  // Checks and records an access to bytes that it holds.
  std::optional<Collision> read(const void* pointer, size_t bytes, const Access& access,
                                const WarpClocks& clocks);
  std::optional<Collision> write(const void* pointer, size_t bytes, const Access& access,
                                 const WarpClocks& clocks);
  // The cp.async that wrote these bytes has arrived, at the clock of `access`, or is given up.
  void land(const void* pointer, size_t bytes, const Access& access);

 private:
  static constexpr size_t kLine = 16;

  struct Cell {
    Access write;
    Access read;             // the last
    uint32_t reading_warps;  // in `interval`
    uint32_t interval;
    bool several_lanes;  // of the last reader's warp read at the same clock
  };

  static std::optional<Collision> read_cell(Cell& cell, const Access& access,
                                            const WarpClocks& clocks);
  static std::optional<Collision> write_cell(Cell& cell, const Access& access,
                                             const WarpClocks& clocks);
  // Calls function(cell) for every cell of [pointer, pointer + bytes) until it returns a collision.
  template <typename Function>
  std::optional<Collision> for_cells(const void* pointer, size_t bytes, bool whole_line_resets,
                                     const Function& function);

  std::unique_ptr<char[]> storage_;
  char* data_;
  size_t size_ = 0;
  std::vector<Cell> lines_;     // of 16 bytes
  std::vector<Cell> bytes_;     // used where split_
  std::vector<uint8_t> split_;  // of each line
};

}  // namespace inception_ext::emulator
