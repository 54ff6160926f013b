// Tensors of shape [N, C, H, W] seen as N*H*W pixels of C channels each (channels_last).
#pragma once

#include <optional>

#include "torch/stable.h"

namespace inception_ext {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements from one pixel to the next, where that is one number for the whole tensor and channels
// lie side by side: dense channels_last tensors and channel slices of them. Dimensions of size 1
// carry no stride.
inline std::optional<int64_t> pixel_stride(const Tensor& x) {
  const auto size = x.sizes();
  const auto stride = x.strides();
  if (size[1] > 1 && stride[1] != 1) return std::nullopt;
  int64_t pixel = size[1];    // when N = H = W = 1
  int64_t pixels_passed = 1;  // pixels that one step along the dimension passes
  bool known = false;
  for (int d : {3, 2, 0}) {  // W, H, N: from the fastest to the slowest
    if (size[d] > 1) {
      if (!known) {
        if (stride[d] % pixels_passed != 0) return std::nullopt;
        pixel = stride[d] / pixels_passed;
        known = true;
      }
      if (stride[d] != pixel * pixels_passed || pixel < size[1]) return std::nullopt;
    }
    pixels_passed *= size[d];
  }
  return pixel;
}

// The tensor itself where it can be read by pixels, else a channels_last copy.
inline Tensor by_pixels(const Tensor& x) {
  if (x.numel() == 0 || pixel_stride(x)) return x;
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

// A pixel-strided tensor, described once.
struct Pixels {
  explicit Pixels(const Tensor& x)
      : data(x.data_ptr()),
        channels(x.size(1)),
        count(x.size(0) * x.size(2) * x.size(3)),
        stride(x.numel() ? pixel_stride(x).value() : channels),
        element_size(static_cast<int64_t>(x.element_size())) {}

  // Channels [first, first + size) of the same pixels.
  Pixels slice(int64_t first, int64_t size) const {
    Pixels part = *this;
    part.data = static_cast<char*>(data) + first * element_size;
    part.channels = size;
    return part;
  }

  void* data;
  int64_t channels;
  int64_t count;   // N * H * W
  int64_t stride;  // elements from one pixel to the next, >= channels
  int64_t element_size;
};

inline Tensor empty_nhwc(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w,
                         std::optional<ScalarType> dtype = std::nullopt) {
  const int64_t size[] = {n, c, h, w};
  return torch::stable::empty({size, 4}, dtype.value_or(like.scalar_type()), std::nullopt,
                              like.device(), std::nullopt, MemoryFormat::ChannelsLast);
}

inline Tensor empty_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  return torch::stable::empty({&size, 1}, dtype, std::nullopt, like.device());
}

}  // namespace inception_ext
