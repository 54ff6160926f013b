// Convolution + bias + ReLU of a frozen network on the CPU, between channel slices.
#pragma once

#include <array>
#include <optional>

#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {

// An activation on its way through a frozen network: channels of a channels_last tensor.
struct Feature {
  // All channels of x.
  explicit Feature(const Tensor& x, bool lacks_relu = false);
  // Channels [first, first + size).
  Feature slice(int64_t first, int64_t size) const;

  Tensor tensor;  // [N, C or more, H, W]
  Pixels pixels;
  int64_t n, h, w;
  bool lacks_relu;  // whoever reads it applies it
};

struct FrozenConvolution {
  std::array<int64_t, 2> output_size(int64_t h, int64_t w) const;

  // relu(conv(x) + bias): into `out` where given, else into a tensor of its own, for which the ReLU
  // may be left to the reader.
  Feature run(const Feature& x, const std::optional<Feature>& out) const;

  Tensor weight;                   // [K, C, R, S], as it is or packed by oneDNN
  std::optional<Tensor> winograd;  // [36 * K, C, 1, 1] float32, likewise: see cpu/winograd.h
  int64_t least_tiles;             // of an image that goes by Winograd
  Tensor bias;                     // [K]
  std::array<int64_t, 2> stride, padding;

 private:
  void run_winograd(const Feature& x, const Feature& y) const;
};

// x with its ReLU applied, all channels of a tensor: a copy only where it is a slice.
Tensor dense(const Feature& x);

// y = x, or relu(x) where that is still missing.
void copy(const Feature& x, const Feature& y);

}  // namespace inception_ext
