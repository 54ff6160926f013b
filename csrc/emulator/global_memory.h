// The tensors that the kernels of one op may touch, and which bytes of them they did touch.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "counters.h"
#include "use.h"

namespace inception_ext::emulator {

// A strided tensor, or any other memory.
struct Operand {
  std::string name;
  Use use;
  const void* data;
  int64_t element_size;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // in elements
};

// One bit for each byte of an operand, in chunks that exist where something was marked.
class ByteSet {
 public:
  explicit ByteSet(size_t bytes);
  ~ByteSet();
  ByteSet(const ByteSet&) = delete;
  ByteSet& operator=(const ByteSet&) = delete;

  // Several threads may insert at the same time.
  void insert(size_t begin, size_t count);
  bool contains(size_t begin, size_t count) const;
  int64_t size() const;
  void clear();

 private:
  static constexpr size_t kWordBytes = 64;  // bytes of memory to a word of the set
  static constexpr size_t kChunkWords = 1024;
  struct Chunk {
    std::atomic<uint64_t> words[kChunkWords];
  };

  Chunk& chunk_at(size_t word);

  size_t chunk_count_;
  std::unique_ptr<std::atomic<Chunk*>[]> chunks_;
};

// The operands of the op that runs on this host thread, for all its launches.
class Scope {
 public:
  Scope(std::string op, const std::vector<Operand>& operands);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  // Throws Error where an operand with Use::kWrite is not complete.
  void check_complete() const;

  // The innermost one of the calling host thread, or nullptr.
  static Scope* current();

  const std::string& op() const { return op_; }

  // Marks an access of a kernel; "" or what is wrong with it. May be called by several threads.
  std::string access(const void* pointer, size_t bytes, bool write);

  // What was touched since the last call.
  std::vector<Touched> take_touched();
  // A launch in this scope. Unless `marked`, its accesses are not recorded.
  void add_kernel(const std::string& kernel, bool marked) {
    kernels_.push_back(kernel);
    marked_ = marked_ && marked;
  }

 private:
  // Bytes to go from one entry of an axis to the next, and their number; outermost first.
  struct Axis {
    int64_t step;
    int64_t size;
  };
  struct Entry {
    Operand operand;
    uintptr_t begin;
    size_t span;             // from the first byte to behind the last
    std::vector<Axis> axes;  // neighbouring ones merged, so that a dense tensor has none
    int64_t run;             // contiguous bytes below the axes
    std::unique_ptr<ByteSet> read, written, ever_written;
  };

  static Entry make_entry(const Operand& operand);
  static bool holds(const Entry& entry, uintptr_t address, size_t bytes);
  std::string describe_miss(uintptr_t address, size_t bytes, bool write) const;

  std::string op_;
  std::vector<Entry> entries_;
  std::vector<std::string> kernels_;  // that ran in this scope
  bool marked_ = true;
  Scope* outer_;
};

}  // namespace inception_ext::emulator
