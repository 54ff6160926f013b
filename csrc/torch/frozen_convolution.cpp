#include "torch/frozen_convolution.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/copy_channels.h"
#include "cpu/winograd.h"
#include "torch/cpu_kernels.h"

namespace inception_ext {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kPositions = cpu::kWinogradPositions;

// Tiles go through in chunks, whose operands stay in a cache. From 64 rows on, oneDNN may want the
// weights in another layout than below: one packing has to serve every chunk.
constexpr int64_t kLargestChunk = 56;

std::vector<int64_t> list(const std::array<int64_t, 2>& pair) { return {pair[0], pair[1]}; }

// oneDNN's convolution, without its ReLU, which makes 0 of NaN.
Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::array<int64_t, 2>& stride, const std::array<int64_t, 2>& padding,
                   int64_t groups) {
  std::array<StableIValue, 10> stack{from(x),
                                     from(weight),
                                     from(bias),
                                     from(list(padding)),
                                     from(list(stride)),
                                     from(std::vector<int64_t>{1, 1}),
                                     from(groups),
                                     from(std::string("none")),
                                     from(std::vector<int64_t>{}),
                                     from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("mkldnn::_convolution_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return by_pixels(to<Tensor>(stack[0]));
}

}  // namespace

Feature::Feature(const Tensor& x, bool lacks_relu)
    : tensor(x), pixels(x), n(x.size(0)), h(x.size(2)), w(x.size(3)), lacks_relu(lacks_relu) {}

Feature Feature::slice(int64_t first, int64_t size) const {
  Feature part = *this;
  part.pixels = pixels.slice(first, size);
  return part;
}

void copy(const Feature& x, const Feature& y) {
  const cpu::CopyChannelsParams params{.x = x.pixels.data,
                                       .x_stride = x.pixels.stride,
                                       .y = y.pixels.data,
                                       .y_stride = y.pixels.stride,
                                       .dtype = cpu_dtype(x.tensor),
                                       .pixels = x.pixels.count,
                                       .channels = x.pixels.channels,
                                       .parallel = torch_threads};
  if (x.lacks_relu) {
    cpu::relu_channels(params);
  } else if (params.x != params.y) {
    cpu::copy_channels(params);
  }
}

Tensor dense(const Feature& x) {
  const bool is_whole = x.pixels.channels == x.tensor.size(1);
  if (is_whole && x.pixels.stride == x.pixels.channels) {
    copy(x, x);
    return x.tensor;
  }
  const Feature y(empty_nhwc(x.tensor, x.n, x.pixels.channels, x.h, x.w));
  copy(x, y);
  return y.tensor;
}

std::array<int64_t, 2> FrozenConvolution::output_size(int64_t h, int64_t w) const {
  return {(h + 2 * padding[0] - weight.size(2)) / stride[0] + 1,
          (w + 2 * padding[1] - weight.size(3)) / stride[1] + 1};
}

void FrozenConvolution::run_winograd(const Feature& x, const Feature& y) const {
  const int64_t c = x.pixels.channels, k = y.pixels.channels;
  const int64_t tiles = cpu::winograd_tiles(x.n, x.h, x.w);
  const int64_t chunks = (tiles + kLargestChunk - 1) / kLargestChunk;
  const int64_t size = (tiles + chunks - 1) / chunks;
  Tensor scratch = empty_nhwc(x.tensor, 1, kPositions * c, size, 1, ScalarType::Float);
  for (int64_t first = 0; first < tiles; first += size) {
    const int64_t count = std::min(size, tiles - first);
    const Tensor v = count == size ? scratch : torch::stable::narrow(scratch, 2, 0, count);
    cpu::winograd_input({.x = x.pixels.data,
                         .x_stride = x.pixels.stride,
                         .v = static_cast<float*>(v.data_ptr()),
                         .v_layout = {kPositions * c, c},
                         .dtype = cpu_dtype(x.tensor),
                         .h = x.h,
                         .w = x.w,
                         .c = c,
                         .first_tile = first,
                         .tiles = count,
                         .relu = x.lacks_relu,
                         .parallel = torch_threads});
    const Tensor m = convolution(v, *winograd, std::nullopt, {1, 1}, {0, 0}, kPositions);
    cpu::winograd_output({.m = static_cast<const float*>(m.data_ptr()),
                          .m_layout = {kPositions * k, k},
                          .bias = bias.data_ptr(),
                          .y = y.pixels.data,
                          .y_stride = y.pixels.stride,
                          .dtype = cpu_dtype(y.tensor),
                          .h = x.h,
                          .w = x.w,
                          .k = k,
                          .first_tile = first,
                          .tiles = count,
                          .parallel = torch_threads});
  }
}

Feature FrozenConvolution::run(const Feature& x, const std::optional<Feature>& out) const {
  // The batch has no say: it is not to change an image's result.
  if (winograd && cpu::winograd_tiles(1, x.h, x.w) >= least_tiles) {
    const Feature y = out ? *out : Feature(empty_nhwc(x.tensor, x.n, weight.size(0), x.h, x.w));
    run_winograd(x, y);
    return y;
  }
  const Feature raw(convolution(dense(x), weight, bias, stride, padding, 1), /*lacks_relu=*/true);
  if (!out) return raw;
  copy(raw, *out);
  return *out;
}

}  // namespace inception_ext
