// Images at the edge of the network, and copies between channel slices.

#include <limits>
#include <vector>

#include "cpu/copy_channels.h"
#include "torch/cpu_kernels.h"
#include "torch/library.h"
#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {
namespace {

Tensor image_to_nhwc(Tensor x, std::vector<double> scale, std::vector<double> shift,
                     ScalarType dtype) {
  static constexpr const char* op = "image_to_nhwc";
  Argument{op, "x", x}
      .is_dense_of(/*cuda=*/false)
      .has_dim(4)
      .has_dtype({ScalarType::Byte, ScalarType::Float, ScalarType::BFloat16});
  const auto channels = static_cast<size_t>(x.size(1));
  if (scale.size() != channels || shift.size() != channels) {
    fail(op, "scale and shift", "expected ", channels, " values each, got ", scale.size(), " and ",
         shift.size());
  }
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16) {
    fail(op, "dtype", "expected float32 or bfloat16, got ", dtype_name(dtype));
  }
  const std::vector<float> scale32(scale.begin(), scale.end());
  const std::vector<float> shift32(shift.begin(), shift.end());
  Tensor y = empty_nhwc(x, x.size(0), x.size(1), x.size(2), x.size(3), dtype);
  cpu::image_to_nhwc({.x = x.data_ptr(),
                      .x_dtype = cpu_dtype(x),
                      .x_stride_n = x.stride(0),
                      .x_stride_c = x.stride(1),
                      .x_stride_h = x.stride(2),
                      .x_stride_w = x.stride(3),
                      .y = y.data_ptr(),
                      .y_dtype = cpu_dtype(y),
                      .y_stride = x.size(1),
                      .n = x.size(0),
                      .c = x.size(1),
                      .h = x.size(2),
                      .w = x.size(3),
                      .scale = scale32.data(),
                      .shift = shift32.data(),
                      .parallel = torch_threads});
  return y;
}

void copy_channels(Tensor y, Tensor x, int64_t offset) {
  static constexpr const char* op = "copy_channels";
  check_cpu_activation({op, "y", y});
  check_cpu_activation({op, "x", x});
  Argument{op, "x", x}
      .has_dtype({y.scalar_type()})
      .has_shape({y.size(0), x.size(1), y.size(2), y.size(3)});
  if (offset < 0 || offset > y.size(1) - x.size(1)) {
    fail(op, "offset", "expected 0 to ", y.size(1) - x.size(1), ", got ", offset);
  }
  if (y.numel() && !pixel_stride(y)) {
    fail(op, "y", "expected a channels_last tensor, got other strides");
  }
  const Tensor input = by_pixels(x);
  const Pixels from(input), to = Pixels(y).slice(offset, x.size(1));
  cpu::copy_channels({.x = from.data,
                      .x_stride = from.stride,
                      .y = to.data,
                      .y_stride = to.stride,
                      .dtype = cpu_dtype(x),
                      .pixels = from.count,
                      .channels = from.channels,
                      .parallel = torch_threads});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CPU, m) {
  m.impl("image_to_nhwc", TORCH_BOX(&image_to_nhwc));
  m.impl("copy_channels", TORCH_BOX(&copy_channels));
}

}  // namespace inception_ext
