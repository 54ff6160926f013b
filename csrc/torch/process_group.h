// Processes whose batch norms have their statistics in common.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "torch/checks.h"
#include "torch/library.h"
#include "torch/stable.h"

namespace inception_ext {

// What it exchanges goes through ops that Python implements with torch.distributed; they run in
// the order of the current stream.
class ProcessGroup {
 public:
  // `size` 1: the calling process alone, whatever the name. In evaluation nothing is exchanged.
  ProcessGroup(const char* op, const std::string& name, int64_t size, bool training)
      : name_(name), size_(size) {
    if (size < 1) fail(op, "group_size", "expected at least 1, got ", size);
    if (size == 1) return;
    if (!training) fail(op, "group_size", "expected 1 in evaluation mode, got ", size);
    std::array<StableIValue, 1> stack{from(name_)};
    call("process_group_size", stack.data());
    const auto actual = to<int64_t>(stack[0]);
    if (actual == 0) {
      fail(op, "group_name", "expected the name of a process group, got '", name, "'");
    }
    if (actual != size) {
      fail(op, "group_size", "expected ", actual, ", the size of group '", name, "', got ", size);
    }
  }

  bool is_alone() const { return size_ == 1; }
  int64_t size() const { return size_; }

  // x [n] of every process, in the order of ranks -> all [size, n].
  void gather(const Tensor& x, const Tensor& all) const {
    std::array<StableIValue, 3> stack{from(x), from(name_), from(all)};
    call("gather_over_group", stack.data());
  }

  // The parts one behind the other, each value added up over all processes -> sums.
  void add_up(const std::vector<Tensor>& parts, const Tensor& sums) const {
    std::array<StableIValue, 3> stack{from(parts), from(name_), from(sums)};
    call("sum_over_group", stack.data());
  }

 private:
  template <typename T>
  static StableIValue from(const T& value) {
    return torch::stable::detail::from(value);
  }
  template <typename T>
  static T to(StableIValue value) {
    return torch::stable::detail::to<T>(value);
  }
  static void call(const char* op, StableIValue* stack) {
    const std::string name = std::string(kNamespace) + "::" + op;
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION));
  }

  std::string name_;
  int64_t size_;
};

}  // namespace inception_ext
