#include "global_memory.h"

#include <algorithm>
#include <bit>
#include <sstream>
#include <utility>

#include "report.h"

namespace inception_ext::emulator {

ByteSet::ByteSet(size_t bytes)
    : chunk_count_((bytes + kWordBytes * kChunkWords - 1) / (kWordBytes * kChunkWords)),
      chunks_(new std::atomic<Chunk*>[chunk_count_]()) {}

ByteSet::~ByteSet() { clear(); }

void ByteSet::clear() {
  for (size_t i = 0; i < chunk_count_; ++i) delete chunks_[i].exchange(nullptr);
}

ByteSet::Chunk& ByteSet::chunk_at(size_t word) {
  std::atomic<Chunk*>& slot = chunks_[word / kChunkWords];
  Chunk* chunk = slot.load(std::memory_order_acquire);
  if (!chunk) {
    auto* fresh = new Chunk();
    if (slot.compare_exchange_strong(chunk, fresh)) return *fresh;
    delete fresh;  // another thread was first
  }
  return *chunk;
}

void ByteSet::insert(size_t begin, size_t count) {
  while (count > 0) {
    const size_t first = begin % kWordBytes, bits = std::min(count, kWordBytes - first);
    const uint64_t mask = (bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1) << first;
    const size_t word = begin / kWordBytes;
    std::atomic<uint64_t>& slot = chunk_at(word).words[word % kChunkWords];
    if ((slot.load(std::memory_order_relaxed) & mask) != mask) {
      slot.fetch_or(mask, std::memory_order_relaxed);
    }
    begin += bits;
    count -= bits;
  }
}

bool ByteSet::contains(size_t begin, size_t count) const {
  while (count > 0) {
    const size_t first = begin % kWordBytes, bits = std::min(count, kWordBytes - first);
    const uint64_t mask = (bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1) << first;
    const size_t word = begin / kWordBytes;
    const Chunk* chunk = chunks_[word / kChunkWords].load(std::memory_order_acquire);
    if (!chunk || (chunk->words[word % kChunkWords].load() & mask) != mask) return false;
    begin += bits;
    count -= bits;
  }
  return true;
}

int64_t ByteSet::size() const {
  int64_t size = 0;
  for (size_t i = 0; i < chunk_count_; ++i) {
    const Chunk* chunk = chunks_[i].load(std::memory_order_acquire);
    if (!chunk) continue;
    for (const auto& word : chunk->words) size += std::popcount(word.load());
  }
  return size;
}

namespace {

thread_local Scope* innermost = nullptr;

int64_t element_count(const Operand& operand) {
  int64_t count = 1;
  for (const int64_t size : operand.sizes) count *= size;
  return count;
}

std::string shape_text(const Operand& operand) {
  std::ostringstream text;
  text << operand.name << " [";
  for (size_t i = 0; i < operand.sizes.size(); ++i) text << (i ? ", " : "") << operand.sizes[i];
  text << "] of " << operand.element_size << "-byte elements";
  return text.str();
}

}  // namespace

Scope::Entry Scope::make_entry(const Operand& operand) {
  Entry entry{operand,
              reinterpret_cast<uintptr_t>(operand.data),
              0,
              {},
              operand.element_size,
              nullptr,
              nullptr,
              nullptr};
  if (element_count(operand) == 0) return entry;
  std::vector<Axis> axes;
  entry.span = operand.element_size;
  for (size_t i = 0; i < operand.sizes.size(); ++i) {
    if (operand.sizes[i] == 1 || operand.strides[i] == 0) continue;
    axes.push_back({operand.strides[i] * operand.element_size, operand.sizes[i]});
    entry.span += axes.back().step * (axes.back().size - 1);
  }
  std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.step > b.step; });
  while (!axes.empty() && axes.back().step == entry.run) {
    entry.run *= axes.back().size;
    axes.pop_back();
  }
  for (const Axis& axis : axes) {
    if (!entry.axes.empty() && entry.axes.back().step == axis.step * axis.size) {
      entry.axes.back() = {axis.step, entry.axes.back().size * axis.size};
    } else {
      entry.axes.push_back(axis);
    }
  }
  entry.read = std::make_unique<ByteSet>(entry.span);
  entry.written = std::make_unique<ByteSet>(entry.span);
  entry.ever_written = std::make_unique<ByteSet>(entry.span);
  return entry;
}

Scope::Scope(std::string op, const std::vector<Operand>& operands)
    : op_(std::move(op)), outer_(std::exchange(innermost, this)) {
  for (const Operand& operand : operands) entries_.push_back(make_entry(operand));
}

Scope::~Scope() { innermost = outer_; }

Scope* Scope::current() { return innermost; }

bool Scope::holds(const Entry& entry, uintptr_t address, size_t bytes) {
  const uintptr_t offset = address - entry.begin;  // wraps around below the operand
  if (offset >= entry.span || bytes > entry.span - offset) return false;
  int64_t rest = static_cast<int64_t>(offset);
  for (const Axis& axis : entry.axes) {
    const int64_t index = std::min(rest / axis.step, axis.size - 1);
    rest -= index * axis.step;
  }
  return rest + static_cast<int64_t>(bytes) <= entry.run;
}

std::string Scope::access(const void* pointer, size_t bytes, bool write) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (Entry& entry : entries_) {
    if (!holds(entry, address, bytes) || (write && entry.operand.use == Use::kRead)) continue;
    const size_t offset = address - entry.begin;
    const Use use = entry.operand.use;
    const bool starts_empty = use == Use::kWrite || use == Use::kScratch;
    if (write) {
      entry.written->insert(offset, bytes);
      if (starts_empty) entry.ever_written->insert(offset, bytes);
    } else {
      if (starts_empty && !entry.ever_written->contains(offset, bytes)) {
        return "before a kernel wrote it: " + shape_text(entry.operand) + ", byte " +
               std::to_string(offset);
      }
      entry.read->insert(offset, bytes);
    }
    return "";
  }
  return describe_miss(address, bytes, write);
}

std::string Scope::describe_miss(uintptr_t address, size_t bytes, bool write) const {
  std::ostringstream text;
  for (const Entry& entry : entries_) {
    if (write && holds(entry, address, bytes)) {
      text << "to an operand that is only read: " << shape_text(entry.operand);
      return text.str();
    }
  }
  text << "outside every tensor of the op:";
  for (const Entry& entry : entries_) {
    if (entry.span == 0) continue;
    const uintptr_t end = entry.begin + entry.span;
    text << "\n    ";
    if (address + bytes <= entry.begin) {
      text << entry.begin - address << " bytes before ";
    } else if (address >= end) {
      text << address - end << " bytes behind the end of ";
    } else if (address < entry.begin || address + bytes > end) {
      text << "across the " << (address < entry.begin ? "start" : "end") << " of ";
    } else {
      text << "between elements of ";
    }
    text << shape_text(entry.operand);
  }
  return text.str();
}

void Scope::check_complete() const {
  if (!marked_) return;
  for (const Entry& entry : entries_) {
    if (entry.operand.use != Use::kWrite || entry.span == 0) continue;
    const Operand& operand = entry.operand;
    const int64_t missing =
        element_count(operand) * operand.element_size - entry.ever_written->size();
    if (missing <= 0) continue;
    // The first element that is not written, in row-major order of the tensor.
    std::vector<int64_t> index(operand.sizes.size(), 0);
    const auto is_written = [&] {
      int64_t offset = 0;
      for (size_t i = 0; i < index.size(); ++i) offset += index[i] * operand.strides[i];
      return entry.ever_written->contains(offset * operand.element_size, operand.element_size);
    };
    while (is_written()) {
      for (size_t i = index.size(); i-- > 0;) {
        if (++index[i] < operand.sizes[i]) break;
        index[i] = 0;
      }
    }
    std::ostringstream text;
    text << "emulator: " << op_ << " left an output unwritten: " << missing << " bytes of "
         << shape_text(operand) << ", the first at [";
    for (size_t i = 0; i < index.size(); ++i) text << (i ? ", " : "") << index[i];
    text << "]; kernels:";
    for (const std::string& kernel : kernels_) text << "\n  " << kernel;
    if (kernels_.empty()) text << " none";
    throw Error(text.str());
  }
}

std::vector<Touched> Scope::take_touched() {
  std::vector<Touched> touched;
  for (Entry& entry : entries_) {
    if (entry.span == 0) continue;
    const int64_t read = entry.read->size(), written = entry.written->size();
    if (read + written > 0) touched.push_back({entry.operand.name, read, written});
    entry.read->clear();
    entry.written->clear();
  }
  return touched;
}

}  // namespace inception_ext::emulator
