// The layers before the first Inception module, on CUDA.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include "kernels/stem.h"

#include <vector>

#include "torch/cuda_launch.h"
#include "torch/kernel_params.h"
#include "torch/library.h"

namespace inception_ext {
namespace {

constexpr int64_t kLargestSide = 1 << 28;

kernels::ImageDType image_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return kernels::ImageDType::kUint8;
    case ScalarType::Half:
      return kernels::ImageDType::kFloat16;
    case ScalarType::BFloat16:
      return kernels::ImageDType::kBFloat16;
    default:
      return kernels::ImageDType::kFloat32;
  }
}

void check_images(const char* op, const Tensor& x, int64_t channels) {
  Argument{op, "x", x}.has_shape({x.size(0), channels, x.size(2), x.size(3)});
  for (int d : {2, 3}) {
    if (x.size(d) < 1 || x.size(d) > kLargestSide) {
      fail(op, "x", "expected 1 to ", kLargestSide, " pixels a side, got shape ", shape_text(x));
    }
  }
}

void check_parameter(const char* op, const char* name, const Tensor& tensor,
                     std::initializer_list<int64_t> shape, ScalarType dtype) {
  Argument{op, name, tensor}.is_dense_of(/*cuda=*/true).has_shape(shape).has_dtype({dtype});
  if (!tensor.is_contiguous() || reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 != 0) {
    fail(op, name, "expected a contiguous tensor at a multiple of 16 bytes");
  }
}

// Of the max pool 3x3, stride 2, in ceil mode.
int64_t pooled_size(const char* op, const char* axis, int64_t size) {
  if (size < 2) fail(op, "x", "Output size is too small: the pool's ", axis, " is ", size);
  return size / 2;
}

const float* floats(const Tensor& x) { return static_cast<const float*>(x.data_ptr()); }

void stem_conv_pool(Tensor x, Tensor weight, Tensor bias, std::vector<double> scale,
                    std::vector<double> shift, bool exact, Tensor y) {
  static constexpr const char* op = "stem_conv_pool";
  Argument{op, "x", x}
      .is_dense_of(/*cuda=*/true)
      .has_dim(4)
      .has_dtype({ScalarType::Byte, ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
  check_images(op, x, 3);
  Argument{op, "weight", weight}.has_dtype(
      {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
  check_parameter(op, "weight", weight, {64, 152}, weight.scalar_type());
  check_parameter(op, "bias", bias, {64}, ScalarType::Float);
  if (scale.size() != 3 || shift.size() != 3) {
    fail(op, "scale and shift", "expected 3 values each, got ", scale.size(), " and ",
         shift.size());
  }
  const int64_t conv_h = (x.size(2) + 1) / 2, conv_w = (x.size(3) + 1) / 2;
  const int64_t p = pooled_size(op, "height", conv_h), q = pooled_size(op, "width", conv_w);
  check_cuda_output(op, weight, y, {x.size(0), 64, p, q});
  kernels::StemConvPoolParams params{
      .x = x.data_ptr(),
      .weight = weight.data_ptr(),
      .bias = floats(bias),
      .y = y.data_ptr(),
      .x_stride = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
      .y_stride = Pixels(y).stride,
      .scale = {},
      .shift = {},
      .batch = x.size(0),
      .input_h = static_cast<int32_t>(x.size(2)),
      .input_w = static_cast<int32_t>(x.size(3)),
      .conv_h = static_cast<int32_t>(conv_h),
      .conv_w = static_cast<int32_t>(conv_w),
      .output_h = static_cast<int32_t>(p),
      .output_w = static_cast<int32_t>(q),
      .x_dtype = image_dtype(x.scalar_type()),
      .dtype = kernel_dtype(weight.scalar_type()),
      .exact = exact};
  for (int c = 0; c < 3; ++c) {
    params.scale[c] = static_cast<float>(scale[c]);
    params.shift[c] = static_cast<float>(shift[c]);
  }
  launch_kernels(op,
                 {{"x", x, Use::kRead},
                  {"weight", weight, Use::kRead},
                  {"bias", bias, Use::kRead},
                  {"y", y, Use::kWrite}},
                 [&](cudaStream_t stream) { return kernels::stem_conv_pool(params, stream); });
}

void stem_conv_conv_pool(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,
                         bool exact, Tensor y) {
  static constexpr const char* op = "stem_conv_conv_pool";
  check_cuda_activation({op, "x", x});
  check_images(op, x, 64);
  check_parameter(op, "weight1", weight1, {64, 64}, x.scalar_type());
  check_parameter(op, "bias1", bias1, {64}, ScalarType::Float);
  check_parameter(op, "weight2", weight2, {192, 576}, x.scalar_type());
  check_parameter(op, "bias2", bias2, {192}, ScalarType::Float);
  const int64_t p = pooled_size(op, "height", x.size(2)), q = pooled_size(op, "width", x.size(3));
  check_cuda_output(op, x, y, {x.size(0), 192, p, q});
  const Tensor input = by_pixels(x);
  const Pixels from(input), to(y);
  const kernels::StemConvConvPoolParams params{.x = from.data,
                                               .weight1 = weight1.data_ptr(),
                                               .bias1 = floats(bias1),
                                               .weight2 = weight2.data_ptr(),
                                               .bias2 = floats(bias2),
                                               .y = to.data,
                                               .x_stride = from.stride,
                                               .y_stride = to.stride,
                                               .batch = x.size(0),
                                               .input_h = static_cast<int32_t>(x.size(2)),
                                               .input_w = static_cast<int32_t>(x.size(3)),
                                               .output_h = static_cast<int32_t>(p),
                                               .output_w = static_cast<int32_t>(q),
                                               .dtype = kernel_dtype(x.scalar_type()),
                                               .exact = exact};
  launch_kernels(op,
                 {{"x", input, Use::kRead},
                  {"weight1", weight1, Use::kRead},
                  {"bias1", bias1, Use::kRead},
                  {"weight2", weight2, Use::kRead},
                  {"bias2", bias2, Use::kRead},
                  {"y", y, Use::kWrite}},
                 [&](cudaStream_t stream) { return kernels::stem_conv_conv_pool(params, stream); });
}

bool stem_fits(Tensor weight) {
  static constexpr const char* op = "stem_fits";
  Argument{op, "weight", weight}
      .is_dense_of(/*cuda=*/true)
      .has_dtype({ScalarType::Half, ScalarType::BFloat16, ScalarType::Float});
  const OnDeviceOf guard(weight);
  bool fits = false;
  const cudaError_t error = kernels::stem_fits(kernel_dtype(weight.scalar_type()), fits);
  if (error != cudaSuccess) fail(op, "device", "cudaError_t ", static_cast<int>(error));
  return fits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("stem_conv_pool", TORCH_BOX(&stem_conv_pool));
  m.impl("stem_conv_conv_pool", TORCH_BOX(&stem_conv_conv_pool));
  m.impl("stem_fits", TORCH_BOX(&stem_fits));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
