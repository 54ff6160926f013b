#include "shared_memory.h"

#include <algorithm>
#include <cstring>

namespace inception_ext::emulator {
namespace {

// More than any device has; the launch checks the real limit.
constexpr size_t kCapacity = 256 << 10;
constexpr size_t kAlignment = 1024;

}  // namespace

SharedMemory::SharedMemory() : storage_(new char[kCapacity + kAlignment]) {
  const auto address = reinterpret_cast<uintptr_t>(storage_.get());
  data_ = storage_.get() + (kAlignment - address % kAlignment) % kAlignment;
}

void SharedMemory::start_block(size_t bytes) {
  size_ = bytes;
  std::memset(data_, 0xff, bytes);
  const size_t lines = (bytes + kLine - 1) / kLine;
  if (lines_.size() < lines) {
    lines_.resize(lines);
    bytes_.resize(lines * kLine);
    split_.resize(lines);
  }
}

std::optional<Collision> SharedMemory::read_cell(Cell& cell, const Access& access,
                                                 const WarpClocks& clocks) {
  const Actor actor = access.actor, writer = cell.write.actor;
  const int warp = actor.warp();
  if (writer.exists() &&
      (cell.write.in_flight ||
       (writer != actor && !clocks.is_before(writer.warp(), cell.write.clock, warp)))) {
    return Collision{cell.write, true};
  }
  if (cell.interval != clocks.interval()) {
    cell.interval = clocks.interval();
    cell.reading_warps = 0;
  }
  const Actor reader = cell.read.actor;
  const bool same_step =
      reader.exists() && reader.warp() == warp && cell.read.clock == access.clock;
  cell.several_lanes = same_step && (cell.several_lanes || reader != actor);
  cell.read = access;
  cell.reading_warps |= 1u << warp;
  return std::nullopt;
}

std::optional<Collision> SharedMemory::write_cell(Cell& cell, const Access& access,
                                                  const WarpClocks& clocks) {
  const Actor actor = access.actor, writer = cell.write.actor, reader = cell.read.actor;
  const int warp = actor.warp();
  if (writer.exists() &&
      (cell.write.in_flight ||
       (writer != actor && !clocks.is_before(writer.warp(), cell.write.clock, warp)))) {
    return Collision{cell.write, true};
  }
  if (reader.exists()) {
    // A warp's own ldmatrix is over before any of its lanes goes on.
    const bool own_collective = reader.is_whole_warp() && reader.warp() == warp;
    const bool same_thread = reader == actor && !cell.several_lanes;
    if (!own_collective && !same_thread &&
        !clocks.is_before(reader.warp(), cell.read.clock, warp)) {
      return Collision{cell.read, false};
    }
    uint32_t others = cell.interval == clocks.interval() ? cell.reading_warps & ~(1u << warp) : 0;
    for (; others != 0; others &= others - 1) {
      const int other = __builtin_ctz(others);
      if (!clocks.met_in_interval(other, warp)) {
        return Collision{{cell.read.place, cell.read.clock, Actor::warp(other), false}, false};
      }
    }
  }
  cell.write = access;
  cell.read.actor = Actor::nobody();
  cell.reading_warps = 0;
  cell.several_lanes = false;
  return std::nullopt;
}

template <typename Function>
std::optional<Collision> SharedMemory::for_cells(const void* pointer, size_t bytes,
                                                 bool whole_line_resets, const Function& function) {
  size_t begin = static_cast<const char*>(pointer) - data_;
  const size_t end = begin + bytes;
  while (begin < end) {
    const size_t line = begin / kLine;
    const size_t stop = std::min(end, (line + 1) * kLine);
    const bool whole = stop - begin == kLine;
    if (whole && !split_[line]) {
      if (auto collision = function(lines_[line])) return collision;
    } else {
      if (!split_[line]) {
        split_[line] = 1;
        std::fill_n(&bytes_[line * kLine], kLine, lines_[line]);
      }
      for (size_t i = begin; i < stop; ++i) {
        if (auto collision = function(bytes_[i])) return collision;
      }
      if (whole && whole_line_resets) {  // 16 equal cells
        split_[line] = 0;
        lines_[line] = bytes_[begin];
      }
    }
    begin = stop;
  }
  return std::nullopt;
}

std::optional<Collision> SharedMemory::read(const void* pointer, size_t bytes, const Access& access,
                                            const WarpClocks& clocks) {
  return for_cells(pointer, bytes, false,
                   [&](Cell& cell) { return read_cell(cell, access, clocks); });
}

std::optional<Collision> SharedMemory::write(const void* pointer, size_t bytes,
                                             const Access& access, const WarpClocks& clocks) {
  return for_cells(pointer, bytes, true,
                   [&](Cell& cell) { return write_cell(cell, access, clocks); });
}

void SharedMemory::land(const void* pointer, size_t bytes, const Access& access) {
  for_cells(pointer, bytes, false, [&](Cell& cell) -> std::optional<Collision> {
    cell.write = access;
    return std::nullopt;
  });
}

}  // namespace inception_ext::emulator
