// What a launch did, in numbers that are properties of the program and not of the machine.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace inception_ext::emulator {

// Counted by each block while it runs, then added up over the launch.
struct Counts {
  int64_t bytes_read = 0;      // of global memory, as issued: what the L2 cache sees
  int64_t bytes_written = 0;   // likewise
  int64_t macs = 0;            // issued: 2048 for each mma m16n8k16, padding included
  int64_t barriers = 0;        // of a block, each counted once a block
  int64_t shared_passes = 0;   // of shared memory that the accesses need without conflicts
  int64_t bank_conflicts = 0;  // passes beyond that
  std::map<std::string, int64_t> conflict_places;  // "gemm.cu:40" -> its bank conflicts

  void add(const Counts& other) {
    bytes_read += other.bytes_read;
    bytes_written += other.bytes_written;
    macs += other.macs;
    barriers += other.barriers;
    shared_passes += other.shared_passes;
    bank_conflicts += other.bank_conflicts;
    for (const auto& [place, conflicts] : other.conflict_places) {
      conflict_places[place] += conflicts;
    }
  }
};

// Bytes of one tensor that a launch touched, each once.
struct Touched {
  std::string operand;
  int64_t read;
  int64_t written;
};

struct LaunchRecord {
  std::string kernel;
  std::string op;  // of the scope that it ran in
  uint32_t grid[3];
  uint32_t block[3];
  int64_t shared_bytes;
  int64_t useful_macs;  // as announced by note_useful_macs
  Counts counts;
  std::vector<Touched> touched;
};

// The launches of this process since the last call, in order.
std::vector<LaunchRecord> take_launches();
void add_launch(LaunchRecord record);

}  // namespace inception_ext::emulator
