// From tensors to the fields of csrc/kernels/params.h.
#pragma once

#include "kernels/params.h"
#include "torch/checks.h"
#include "torch/nhwc.h"

namespace inception_ext {

// Of a dtype that the CUDA kernels take.
inline kernels::DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return kernels::DType::kFloat16;
    case ScalarType::BFloat16:
      return kernels::DType::kBFloat16;
    default:
      return kernels::DType::kFloat32;
  }
}

// Rows and images follow one another without a gap.
inline kernels::PixelStrides pixel_strides(const Pixels& x, int64_t h, int64_t w) {
  return {h * w * x.stride, w * x.stride, x.stride};
}

// An activation of the CUDA kernels: [N, C, H, W], float16, bfloat16 or float32.
inline const Argument& check_cuda_activation(const Argument& argument) {
  return argument.is_dense_of(/*cuda=*/true)
      .has_dim(4)
      .has_dtype({ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
}

// An output that the caller provides, of the dtype of x and on its device.
inline void check_cuda_output(const char* op, const Tensor& x, const Tensor& y,
                              std::initializer_list<int64_t> shape) {
  Argument{op, "y", y}.is_dense_of(/*cuda=*/true).has_shape(shape).has_dtype({x.scalar_type()});
  if (y.numel() && !pixel_stride(y)) {
    fail(op, "y", "expected channels_last or a channel slice of it, got shape ", shape_text(y),
         " with strides ", strides_text(y));
  }
}

}  // namespace inception_ext
