// A chain of one or two convolutions, each with batch norm and ReLU behind it, and a max pool at
// the end if asked for: what forward and backward share.
#pragma once

#include <string>
#include <vector>

#include "torch/train_blocks.h"

namespace inception_ext {

constexpr int kMaxChain = 2;

// Shapes and geometry, checked.
struct Chain {
  Chain(const char* op, const Tensor& x, const std::vector<Tensor>& conv_weights,
        const std::vector<int64_t>& strides, const std::vector<int64_t>& paddings,
        const std::vector<int64_t>& pool)
      : length(static_cast<int>(conv_weights.size())), pooled(!pool.empty()) {
    Argument{op, "x", x}
        .is_dense_of(/*cuda=*/true)
        .has_dim(4)
        .has_dtype({ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
    if (length < 1 || length > kMaxChain) {
      fail(op, "conv_weights", "expected 1 or 2 tensors, got ", length);
    }
    if (x.size(1) < 1 || x.size(2) < 1 || x.size(3) < 1) {
      fail(op, "x", "expected at least one channel, row and column, got ", shape_text(x));
    }
    check_length(op, "strides", strides.size());
    check_length(op, "paddings", paddings.size());
    size.emplace_back(op, x);
    int64_t inputs = x.size(1);
    for (int i = 0; i < length; ++i) {
      const std::string name = element("conv_weights", i);
      const Tensor& weight = conv_weights[i];
      const Argument argument{op, name.c_str(), weight};
      argument.is_dense_of(/*cuda=*/true)
          .has_dim(4)
          .has_dtype({x.scalar_type(), conv_weights[0].scalar_type()});
      if (conv_weights[0].scalar_type() != x.scalar_type()) {
        argument.has_dtype({ScalarType::Float});  // master weights
      }
      const int64_t kernel = weight.size(2);
      if (weight.size(0) < 1) fail(op, name.c_str(), "expected at least one output channel, got 0");
      argument.has_shape({weight.size(0), inputs, kernel, kernel});
      window.push_back({kernel, strides[i], paddings[i]});
      const ImageSize& from = size.back();
      if (kernel < 1 || kernel > 127 || strides[i] < 1 || strides[i] > 127 || paddings[i] < 0 ||
          paddings[i] >= kernel || from.h + 2 * paddings[i] < kernel ||
          from.w + 2 * paddings[i] < kernel) {
        fail(op, name.c_str(), "expected a kernel of 1 to 127 that fits ", from.h, " x ", from.w,
             " padded by less than itself, got ", kernel, ", stride ", strides[i], ", padding ",
             paddings[i]);
      }
      size.push_back(window.back().output(from));
      inputs = weight.size(0);
      offset.push_back(statistics_size);
      channels.push_back(inputs);
      statistics_size += inputs;
    }
    output = size.back();
    if (pooled) plan_pool(op, pool);
  }

  const ImageSize& input_of(int i) const { return size[i]; }
  const ImageSize& output_of(int i) const { return size[i + 1]; }

  int length;
  bool pooled;
  std::vector<ImageSize> size;  // of x, then of each convolution's output
  std::vector<Window> window;
  std::vector<int64_t> channels;  // of each convolution's output
  std::vector<int64_t> offset;    // of its batch norm in vectors that all share
  int64_t statistics_size = 0;
  ImageSize output{0, 0, 0};  // of y
  kernels::PoolWindow pool_window{};

 private:
  void check_length(const char* op, const char* name, size_t got) const {
    if (got != static_cast<size_t>(length)) {
      fail(op, name, "expected ", length, " values, got ", got);
    }
  }

  void plan_pool(const char* op, const std::vector<int64_t>& pool) {
    if (pool.size() != 4) {
      fail(op, "pool", "expected kernel, stride, padding and ceil mode or nothing, got ",
           pool.size(), " values");
    }
    const int64_t kernel = pool[0], stride = pool[1], padding = pool[2];
    if (kernel < 2 || kernel > 3 || stride < 1 || stride > 2 || padding < 0 ||
        padding > kernel / 2) {
      fail(op, "pool", "expected kernel 2 or 3, stride 1 or 2, padding up to half the kernel, got ",
           kernel, ", ", stride, ", ", padding);
    }
    const auto length_of = [&](int64_t input) {
      const int64_t span = input + 2 * padding - kernel + (pool[3] != 0 ? stride - 1 : 0);
      int64_t result = span < 0 ? 0 : span / stride + 1;
      // In ceil mode the last window must start inside the input or its left padding.
      if (pool[3] != 0 && (result - 1) * stride >= input + padding) --result;
      if (result < 1) fail(op, "pool", "Output size is too small: ", input, " gives ", result);
      return result;
    };
    const ImageSize& raw = size.back();
    output = {raw.n, length_of(raw.h), length_of(raw.w)};
    const auto side = static_cast<int32_t>(kernel), step = static_cast<int32_t>(stride);
    const auto margin = static_cast<int32_t>(padding);
    pool_window = {side, side, step, step, margin, margin};
  }
};

inline std::vector<Parameter> chain_parameters(const char* op, const char* name,
                                               const std::vector<Tensor>& tensors,
                                               const Chain& chain) {
  if (tensors.size() != chain.channels.size()) {
    fail(op, name, "expected ", chain.length, " tensors, got ", tensors.size());
  }
  std::vector<Parameter> result;
  for (int i = 0; i < chain.length; ++i) {
    result.emplace_back(op, element(name, i).c_str(), tensors[i], chain.channels[i],
                        /*cuda=*/true);
  }
  return result;
}

}  // namespace inception_ext
