// Lists of problems, as the ops take them that run several convolutions in one launch.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels/conv_group.h"
#include "kernels/params.h"
#include "torch/checks.h"
#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/max_pool.h"
#include "torch/stable.h"

namespace inception_ext {

using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

// What messages call entry i.
inline std::string item(const char* list, size_t i) {
  std::string text(list);
  text.append("[").append(std::to_string(i)).append("]");
  return text;
}

inline void check_length(const char* op, const char* name, size_t got, size_t expected) {
  if (got != expected) fail(op, name, "expected ", expected, " entries, got ", got);
}

// How many problems there are, by the first list.
inline size_t problem_count(const char* op, const Tensors& x) {
  if (x.empty() || x.size() > kernels::kMaxConvProblems) {
    fail(op, "x", "expected 1 to ", kernels::kMaxConvProblems, " tensors, got ", x.size());
  }
  return x.size();
}

// The outputs of problem i, segments[i] of them, where `used` belong to those before it.
inline const Tensor* take_outputs(const char* op, const Integers& segments, size_t i,
                                  const Tensors& outputs, size_t& used) {
  if (segments[i] < 1 || segments[i] > kernels::kMaxConvSegments) {
    fail(op, item("segments", i).c_str(), "expected 1 to ", kernels::kMaxConvSegments, ", got ",
         segments[i]);
  }
  const Tensor* first = outputs.data() + used;
  used += static_cast<size_t>(segments[i]);
  if (used > outputs.size()) {
    fail(op, "outputs", "expected as many tensors as all segments, got ", outputs.size());
  }
  return first;
}

// Height and width of problem i.
struct Pair {
  int64_t h, w;
};
inline Pair pair_of(const char* op, const char* name, const Integers& values, size_t i,
                    int64_t least) {
  constexpr int64_t kLargest = kernels::kMaxConvSide / 4;
  const Pair pair{values[2 * i], values[2 * i + 1]};
  for (int64_t value : {pair.h, pair.w}) {
    if (value < least || value > kLargest) {
      fail(op, item(name, i).c_str(), "expected ", least, " to ", kLargest, ", got ", value);
    }
  }
  return pair;
}

// A convolution [R, S] whose input may be max pooled on load.
inline void check_pooled(const char* op, size_t i, Pair kernel, Pair stride, Pair padding) {
  if (kernel.h != 1 || kernel.w != 1 || stride.h != 1 || stride.w != 1 || padding.h != 0 ||
      padding.w != 0) {
    fail(op, item("pools", i).c_str(), "expected false unless kernel 1x1, stride 1, padding 0");
  }
}

// Images [N, C, H, W] of problem i.
inline void check_images(const char* op, const char* list, size_t i, const Tensor& x,
                         ScalarType dtype) {
  const std::string name = item(list, i);
  Argument{op, name.c_str(), x}.is_dense_of(/*cuda=*/true).has_dim(4).has_dtype({dtype});
  constexpr int64_t kLargest = kernels::kMaxConvSide / 2;
  for (int d = 1; d < 4; ++d) {
    if (x.size(d) < 1 || (d > 1 && x.size(d) > kLargest)) {
      fail(op, name.c_str(),
           "expected channels, height and width of at least 1, images of at most ", kLargest,
           " pixels a side, got shape ", shape_text(x));
    }
  }
  constexpr int64_t kLargestPixels = 1 << 30;
  if (x.size(0) * x.size(2) * x.size(3) > kLargestPixels || x.size(1) > kLargestPixels) {
    fail(op, name.c_str(), "expected at most 2^30 pixels and channels, got shape ", shape_text(x));
  }
}

// Height or width of a convolution's output; `argument` is what the kernel size comes from.
inline int64_t window_positions(const char* op, const std::string& argument, int64_t input,
                                int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t span = input + 2 * padding - kernel;
  if (span < 0) {
    fail(op, argument.c_str(), "expected at most ", input + 2 * padding, " for an input of ", input,
         " with padding ", padding, ", got ", kernel);
  }
  return span / stride + 1;
}

// x, max pooled by a kernel of its own where its images are wider than a prologue takes (what
// conv_wgrad takes is wider still); `pool` is false then.
inline Tensor pooled_where_wide(const char* op, const Tensor& x, bool& pool) {
  if (!pool || x.numel() == 0) return x;
  const OnDeviceOf guard(x);
  int32_t width = 0;
  const cudaError_t error = kernels::max_pooled_width(kernel_dtype(x.scalar_type()), &width);
  if (error != cudaSuccess) fail(op, "device", "cudaError_t ", static_cast<int>(error));
  if (x.size(3) <= width) return x;
  pool = false;
  return same_size_max_pool_cuda(op, x);
}

// What blocks need that share a sum; nothing without a workspace.
struct SplitMemory {
  std::optional<Tensor> counters;
  std::optional<Tensor> partials;
};

inline int64_t conv_group_workspace_bytes() {
  return kernels::kConvCounterBytes + kernels::kConvPartialBytes;
}

inline SplitMemory split_memory(const char* op, std::optional<Tensor>& workspace) {
  if (!workspace) return {};
  Argument{op, "workspace", *workspace}
      .is_dense_of(/*cuda=*/true)
      .has_shape({conv_group_workspace_bytes()})
      .has_dtype({ScalarType::Byte});
  if (!workspace->is_contiguous()) fail(op, "workspace", "expected a contiguous tensor");
  return {
      torch::stable::narrow(*workspace, 0, 0, kernels::kConvCounterBytes),
      torch::stable::narrow(*workspace, 0, kernels::kConvCounterBytes, kernels::kConvPartialBytes)};
}

}  // namespace inception_ext
