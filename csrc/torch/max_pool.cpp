#include "torch/max_pool.h"

#include <limits>
#include <tuple>
#include <vector>

#include "torch/cpu_kernels.h"
#include "torch/library.h"
#ifdef INCEPTION_EXT_CUDA_VERSION
#include "kernels/max_pool.h"
#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/stable.h"
#endif

namespace inception_ext {

cpu::MaxPoolShape same_size_pool(const Tensor& x) {
  return {.n = x.size(0),
          .h = x.size(2),
          .w = x.size(3),
          .c = x.size(1),
          .out_h = x.size(2),
          .out_w = x.size(3),
          .kernel_h = 3,
          .kernel_w = 3,
          .stride_h = 1,
          .stride_w = 1,
          .padding_h = 1,
          .padding_w = 1};
}

void max_pool_pixels(const cpu::MaxPoolShape& shape, const Pixels& x, const Pixels& y,
                     uint8_t* argmax, ScalarType dtype) {
  cpu::max_pool_forward({.shape = shape,
                         .x = x.data,
                         .x_stride = x.stride,
                         .y = y.data,
                         .y_stride = y.stride,
                         .argmax = argmax,
                         .dtype = cpu_dtype(dtype),
                         .parallel = torch_threads});
}

void max_pool_backward_pixels(const cpu::MaxPoolShape& shape, const Pixels& grad,
                              const uint8_t* argmax, const Pixels& dx, bool accumulate,
                              ScalarType dtype) {
  cpu::max_pool_backward({.shape = shape,
                          .dy = grad.data,
                          .dy_stride = grad.stride,
                          .argmax = argmax,
                          .dx = dx.data,
                          .dx_stride = dx.stride,
                          .accumulate = accumulate,
                          .dtype = cpu_dtype(dtype),
                          .parallel = torch_threads});
}

namespace {

using Pair = std::vector<int64_t>;  // [height, width]

// Output size along one axis, by torch's rule: in ceil mode the last window must start inside the
// input or its left padding.
int64_t output_size(const char* op, const char* axis, int64_t input, int64_t kernel, int64_t stride,
                    int64_t padding, bool ceil_mode) {
  const int64_t span = input + 2 * padding - kernel + (ceil_mode ? stride - 1 : 0);
  int64_t size = (span < 0 ? -1 : span / stride) + 1;
  if (ceil_mode && (size - 1) * stride >= input + padding) --size;
  if (size < 1) {
    fail(op, "x", "Output size is too small: ", axis, " ", input, " gives ", size, " (kernel_size ",
         kernel, ", stride ", stride, ", padding ", padding, ")");
  }
  return size;
}

void check_pair(const char* op, const char* name, const Pair& pair) {
  if (pair.size() != 2) fail(op, name, "expected 2 values, got ", pair.size());
}

}  // namespace

void MaxPoolWindow::check(const char* op, bool cuda) const {
  constexpr int64_t largest = std::numeric_limits<int32_t>::max();
  check_pair(op, "kernel_size", kernel);
  check_pair(op, "stride", stride);
  check_pair(op, "padding", padding);
  for (int axis = 0; axis < 2; ++axis) {
    if (kernel[axis] < 1 || kernel[axis] > 255) {
      fail(op, "kernel_size", "expected 1 to 255, got ", kernel[axis]);
    }
    if (stride[axis] < 1 || stride[axis] > largest) {
      fail(op, "stride", "expected 1 to ", largest, ", got ", stride[axis]);
    }
    if (padding[axis] < 0 || padding[axis] > kernel[axis] / 2) {
      fail(op, "padding", "expected 0 to kernel_size / 2 = ", kernel[axis] / 2, ", got ",
           padding[axis]);
    }
    if (cuda && (kernel[axis] < 2 || kernel[axis] > 3 || stride[axis] > 2)) {
      fail(op, "kernel_size", "expected 2 or 3 with stride 1 or 2 on CUDA, got ", kernel[axis],
           " with stride ", stride[axis]);
    }
  }
  if (kernel[0] * kernel[1] > 255) {
    fail(op, "kernel_size", "expected an area of at most 255, got ", kernel[0], " x ", kernel[1]);
  }
}

cpu::MaxPoolShape MaxPoolWindow::over(const char* op, int64_t n, int64_t c, int64_t h,
                                      int64_t w) const {
  return {.n = n,
          .h = h,
          .w = w,
          .c = c,
          .out_h = output_size(op, "height", h, kernel[0], stride[0], padding[0], ceil_mode),
          .out_w = output_size(op, "width", w, kernel[1], stride[1], padding[1], ceil_mode),
          .kernel_h = kernel[0],
          .kernel_w = kernel[1],
          .stride_h = stride[0],
          .stride_w = stride[1],
          .padding_h = padding[0],
          .padding_w = padding[1]};
}

namespace {

// A device that this file has kernels for, and a dtype that they take.
void check_activation(const char* op, const char* name, const Tensor& x) {
  if (on_cuda(x)) {
    Argument{op, name, x}.has_dim(4).has_dtype(
        {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
  } else {
    check_cpu_activation({op, name, x});
  }
}

#ifdef INCEPTION_EXT_CUDA_VERSION

kernels::PoolWindow kernel_window(const cpu::MaxPoolShape& shape) {
  return {static_cast<int32_t>(shape.kernel_h),  static_cast<int32_t>(shape.kernel_w),
          static_cast<int32_t>(shape.stride_h),  static_cast<int32_t>(shape.stride_w),
          static_cast<int32_t>(shape.padding_h), static_cast<int32_t>(shape.padding_w)};
}

void max_pool_forward_cuda(const char* op, const cpu::MaxPoolShape& shape, const Tensor& x,
                           const Tensor& y, const Tensor& argmax) {
  const Pixels input(x), output(y);
  const bool with_argmax = argmax.numel() > 0;
  const kernels::MaxPoolForwardParams params{
      .x = input.data,
      .y = output.data,
      .argmax = with_argmax ? static_cast<uint8_t*>(argmax.data_ptr()) : nullptr,
      .x_stride = pixel_strides(input, shape.h, shape.w),
      .y_stride = pixel_strides(output, shape.out_h, shape.out_w),
      .batch = shape.n,
      .channels = shape.c,
      .input_h = shape.h,
      .input_w = shape.w,
      .output_h = shape.out_h,
      .output_w = shape.out_w,
      .window = kernel_window(shape),
      .dtype = kernel_dtype(x.scalar_type())};
  launch_kernels(op, {{"x", x, Use::kRead}, {"y", y, Use::kWrite}, {"argmax", argmax, Use::kWrite}},
                 [&](cudaStream_t stream) { return kernels::max_pool_forward(params, stream); });
}

void max_pool_backward_cuda(const char* op, const cpu::MaxPoolShape& shape, const Tensor& grad,
                            const Tensor& argmax, const Tensor& dx) {
  const Pixels grad_y(grad), grad_x(dx);
  const kernels::MaxPoolBackwardParams params{
      .grad_y = grad_y.data,
      .argmax = static_cast<const uint8_t*>(argmax.data_ptr()),
      .grad_x = grad_x.data,
      .grad_y_stride = pixel_strides(grad_y, shape.out_h, shape.out_w),
      .grad_x_stride = pixel_strides(grad_x, shape.h, shape.w),
      .batch = shape.n,
      .channels = shape.c,
      .input_h = shape.h,
      .input_w = shape.w,
      .output_h = shape.out_h,
      .output_w = shape.out_w,
      .window = kernel_window(shape),
      .dtype = kernel_dtype(grad.scalar_type()),
      .accumulate = false};
  launch_kernels(
      op, {{"grad", grad, Use::kRead}, {"argmax", argmax, Use::kRead}, {"dx", dx, Use::kWrite}},
      [&](cudaStream_t stream) { return kernels::max_pool_backward(params, stream); });
}

#endif  // INCEPTION_EXT_CUDA_VERSION

// Where x and the window are checked, the shape of the pool with torch's output size.
cpu::MaxPoolShape checked_shape(const char* op, const Tensor& x, const Pair& kernel,
                                const Pair& stride, const Pair& padding, bool ceil_mode) {
  check_activation(op, "x", x);
  const MaxPoolWindow window{kernel, stride, padding, ceil_mode};
  window.check(op, on_cuda(x));
  return window.over(op, x.size(0), x.size(1), x.size(2), x.size(3));
}

// y, and argmax unless it is empty; x and y by pixels.
void max_pool_into(const char* op, const cpu::MaxPoolShape& shape, const Tensor& x, const Tensor& y,
                   const Tensor& argmax) {
#ifdef INCEPTION_EXT_CUDA_VERSION
  if (on_cuda(x)) {
    max_pool_forward_cuda(op, shape, x, y, argmax);
    return;
  }
#endif
  uint8_t* indices = argmax.numel() > 0 ? static_cast<uint8_t*>(argmax.data_ptr()) : nullptr;
  max_pool_pixels(shape, Pixels(x), Pixels(y), indices, x.scalar_type());
}

std::tuple<Tensor, Tensor> max_pool_forward(Tensor x, Pair kernel, Pair stride, Pair padding,
                                            bool ceil_mode, bool with_argmax) {
  static constexpr const char* op = "max_pool_forward";
  const auto shape = checked_shape(op, x, kernel, stride, padding, ceil_mode);
  Tensor y = empty_nhwc(x, shape.n, shape.c, shape.out_h, shape.out_w);
  Tensor argmax = with_argmax
                      ? empty_nhwc(x, shape.n, shape.c, shape.out_h, shape.out_w, ScalarType::Byte)
                      : empty_vector(x, 0, ScalarType::Byte);
  max_pool_into(op, shape, by_pixels(x), y, argmax);
  return {y, argmax};
}

void max_pool_out(Tensor x, Pair kernel, Pair stride, Pair padding, bool ceil_mode, Tensor y) {
  static constexpr const char* op = "max_pool_out";
  const auto shape = checked_shape(op, x, kernel, stride, padding, ceil_mode);
  Argument{op, "y", y}
      .is_dense_of(on_cuda(x))
      .has_shape({shape.n, shape.c, shape.out_h, shape.out_w})
      .has_dtype({x.scalar_type()});
  if (y.numel() == 0) return;
  if (!pixel_stride(y)) {
    fail(op, "y", "expected channels_last or a channel slice of it, got shape ", shape_text(y),
         " with strides ", strides_text(y));
  }
  max_pool_into(op, shape, by_pixels(x), y, empty_vector(x, 0, ScalarType::Byte));
}

Tensor max_pool_backward(Tensor grad, Tensor argmax, Pair input_size, Pair kernel, Pair stride,
                         Pair padding) {
  static constexpr const char* op = "max_pool_backward";
  check_activation(op, "grad", grad);
  check_pair(op, "input_size", input_size);
  MaxPoolWindow{kernel, stride, padding, /*ceil_mode=*/false}.check(op, on_cuda(grad));
  Argument{op, "argmax", argmax}
      .is_dense_of(on_cuda(grad))
      .has_shape({grad.size(0), grad.size(1), grad.size(2), grad.size(3)})
      .has_dtype({ScalarType::Byte});
  cpu::MaxPoolShape shape{.n = grad.size(0),
                          .h = input_size[0],
                          .w = input_size[1],
                          .c = grad.size(1),
                          .out_h = grad.size(2),
                          .out_w = grad.size(3),
                          .kernel_h = kernel[0],
                          .kernel_w = kernel[1],
                          .stride_h = stride[0],
                          .stride_w = stride[1],
                          .padding_h = padding[0],
                          .padding_w = padding[1]};
  for (int axis = 0; axis < 2; ++axis) {
    // Every window must reach the input, or it would have had no maximum.
    const int64_t last = (grad.size(2 + axis) - 1) * stride[axis] - padding[axis];
    if (input_size[axis] <= last) {
      fail(op, "input_size", "expected more than ", last, " for a gradient of shape ",
           shape_text(grad), ", got ", input_size[axis]);
    }
  }
  const Tensor gradient = by_pixels(grad);
  const Tensor indices = torch::stable::contiguous(argmax, MemoryFormat::ChannelsLast);
  Tensor dx = empty_nhwc(grad, shape.n, shape.c, shape.h, shape.w);
#ifdef INCEPTION_EXT_CUDA_VERSION
  if (on_cuda(grad)) {
    max_pool_backward_cuda(op, shape, gradient, indices, dx);
    return dx;
  }
#endif
  const auto* window_index = static_cast<const uint8_t*>(indices.data_ptr());
  max_pool_backward_pixels(shape, Pixels(gradient), window_index, Pixels(dx), /*accumulate=*/false,
                           grad.scalar_type());
  return dx;
}

}  // namespace

#ifdef INCEPTION_EXT_CUDA_VERSION
Tensor same_size_max_pool_cuda(const char* op, const Tensor& x) {
  const cpu::MaxPoolShape shape = same_size_pool(x);
  Tensor y = empty_nhwc(x, shape.n, shape.c, shape.out_h, shape.out_w);
  max_pool_forward_cuda(op, shape, x, y, empty_vector(x, 0, ScalarType::Byte));
  return y;
}
#endif

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CPU, m) {
  m.impl("max_pool_forward", TORCH_BOX(&max_pool_forward));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
  m.impl("max_pool_out", TORCH_BOX(&max_pool_out));
}

#ifdef INCEPTION_EXT_CUDA_VERSION
STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CUDA, m) {
  m.impl("max_pool_forward", TORCH_BOX(&max_pool_forward));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
  m.impl("max_pool_out", TORCH_BOX(&max_pool_out));
}
#endif

}  // namespace inception_ext
