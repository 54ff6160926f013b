// Channel counts and offsets of one Inception module, as the ops of every device see it.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "torch/batch_norm_vectors.h"
#include "torch/checks.h"
#include "torch/stable.h"

namespace inception_ext {

// Convolutions in module order: indices into the op's lists.
enum Conv { kBranch1, kReduce3x3, kConv3x3, kReduce5x5, kConv5x5, kPoolProjection, kConvs };
constexpr std::array<Conv, 3> kMerged = {kBranch1, kReduce3x3, kReduce5x5};
// Statistics of all six lie in one vector, those of the merged convolutions side by side.
constexpr std::array<Conv, kConvs> kStatisticsOrder = {kBranch1, kReduce3x3, kReduce5x5,
                                                       kConv3x3, kConv5x5,   kPoolProjection};

// Channel counts and offsets of one module, read off its conv_weights [K, C, R, R].
struct Layout {
  // cuda: which kernels it is for; those take float16 too, and float32 weights of 16-bit
  // activations (autocast's master weights).
  Layout(const char* op, const Tensor& x, const std::vector<Tensor>& conv_weights, bool cuda)
      : cuda(cuda) {
    static constexpr int64_t any = 0;
    static constexpr std::array<int64_t, kConvs> sizes = {1, 1, 3, 1, any, 1};
    const Argument x_argument = Argument{op, "x", x}.is_dense_of(cuda).has_dim(4);
    if (cuda) {
      x_argument.has_dtype({ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
    } else {
      x_argument.has_dtype({ScalarType::Float, ScalarType::BFloat16});
    }
    if (x.size(1) < 1 || x.size(2) < 1 || x.size(3) < 1) {
      fail(op, "x", "expected at least one channel, row and column, got ", shape_text(x));
    }
    if (conv_weights.size() != kConvs) {
      fail(op, "conv_weights", "expected 6 tensors, got ", conv_weights.size());
    }
    for (int conv = 0; conv < kConvs; ++conv) {
      const std::string name = element("conv_weights", conv);
      const Argument weight{op, name.c_str(), conv_weights[conv]};
      weight.is_dense_of(cuda).has_dim(4).has_dtype(
          {x.scalar_type(), cuda ? conv_weights[0].scalar_type() : x.scalar_type()});
      channels[conv] = conv_weights[conv].size(0);
      if (channels[conv] < 1) fail(op, name.c_str(), "expected at least one output channel, got 0");
      const Tensor& input = conv == kConv3x3   ? conv_weights[kReduce3x3]
                            : conv == kConv5x5 ? conv_weights[kReduce5x5]
                                               : x;
      const int64_t inputs = conv == kConv3x3 || conv == kConv5x5 ? input.size(0) : x.size(1);
      int64_t size = sizes[conv];
      if (size == any) size = conv_weights[conv].size(2) == 5 ? 5 : 3;
      weight.has_shape({channels[conv], inputs, size, size});
    }
    int64_t offset = 0;
    for (Conv conv : kStatisticsOrder) {
      statistics[conv] = offset;
      offset += channels[conv];
    }
    statistics_size = offset;
    output_channels = 0;
    for (Conv conv : {kBranch1, kConv3x3, kConv5x5, kPoolProjection}) {
      output[conv] = output_channels;
      output_channels += channels[conv];
    }
    merged_channels = channels[kBranch1] + channels[kReduce3x3] + channels[kReduce5x5];
  }

  bool cuda;
  std::array<int64_t, kConvs> channels;
  std::array<int64_t, kConvs> statistics;  // offset into mean and rstd
  std::array<int64_t, kConvs> output;      // offset into out, of the last convolution of a branch
  int64_t statistics_size;
  int64_t output_channels;
  int64_t merged_channels;
};

inline std::vector<Parameter> parameters(const char* op, const char* name,
                                         const std::vector<Tensor>& tensors, const Layout& layout) {
  if (tensors.size() != kConvs) fail(op, name, "expected 6 tensors, got ", tensors.size());
  std::vector<Parameter> result;
  for (int conv = 0; conv < kConvs; ++conv) {
    result.emplace_back(op, element(name, conv).c_str(), tensors[conv], layout.channels[conv],
                        layout.cuda);
  }
  return result;
}

}  // namespace inception_ext
