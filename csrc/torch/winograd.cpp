#include "torch/winograd.h"

#include <algorithm>
#include <array>

#include "cpu/winograd.h"
#include "torch/cpu_kernels.h"
#include "torch/nhwc.h"

namespace inception_ext {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kPositions = cpu::kWinogradPositions;

// Tiles that go through at a time: operands that stay in the caches, with rows enough for products
// at full speed.
constexpr int64_t kLargestChunk = 192;

// Below this many channels the products are too small to be efficient.
constexpr int64_t kLeastChannels = 32;

// What transforming a pair of filter and channel costs, in multiply-accumulates of a product.
constexpr int64_t kWeightCost = 4000;

struct Filters {
  Tensor u;  // [36, C, K]
  int64_t outputs;
};

// For a convolution, or for the gradient of its input: filters flipped, channels exchanged.
Filters transform(const Tensor& weight, bool for_input_gradient) {
  const int outer = for_input_gradient ? 1 : 0, inner = 1 - outer;
  const int64_t k = weight.size(outer), c = weight.size(inner);
  const int64_t shape[] = {kPositions, c, k};
  Tensor u = torch::stable::empty({shape, 3}, ScalarType::Float, std::nullopt, weight.device());
  cpu::winograd_weight(
      {.weight = static_cast<const float*>(weight.data_ptr()),
       .stride = {weight.stride(outer), weight.stride(inner), weight.stride(2), weight.stride(3)},
       .u = static_cast<float*>(u.data_ptr()),
       .k = k,
       .c = c,
       .flipped = for_input_gradient,
       .parallel = torch_threads});
  return {u, k};
}

Tensor batched_product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{from(a), from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor convolve(const Tensor& x, const Filters& filters) {
  const Tensor input = by_pixels(x);
  const Pixels from_pixels(input);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), k = filters.outputs;
  Tensor y = empty_nhwc(x, n, k, h, w);
  const Pixels to_pixels(y);
  const int64_t tiles = cpu::winograd_tiles(n, h, w);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks = (tiles + kLargestChunk - 1) / kLargestChunk;
  const int64_t size = (tiles + chunks - 1) / chunks;
  const auto run = [&](int64_t chunk) {
    const int64_t first = chunk * size, count = std::min(size, tiles - first);
    if (count <= 0) return;
    const int64_t shape[] = {kPositions, count, c};
    Tensor v = torch::stable::empty({shape, 3}, ScalarType::Float, std::nullopt, x.device());
    cpu::winograd_input({.x = from_pixels.data,
                         .x_stride = from_pixels.stride,
                         .v = static_cast<float*>(v.data_ptr()),
                         .v_layout = {c, count * c},
                         .dtype = cpu::DType::kFloat32,
                         .h = h,
                         .w = w,
                         .c = c,
                         .first_tile = first,
                         .tiles = count,
                         .relu = false,
                         .parallel = torch_threads});
    const Tensor m = batched_product(v, filters.u);
    cpu::winograd_output({.m = static_cast<const float*>(m.data_ptr()),
                          .m_layout = {k, count * k},
                          .bias = nullptr,
                          .y = to_pixels.data,
                          .y_stride = to_pixels.stride,
                          .dtype = cpu::DType::kFloat32,
                          .h = h,
                          .w = w,
                          .k = k,
                          .first_tile = first,
                          .tiles = count,
                          .parallel = torch_threads});
  };
  if (chunks >= threads) {
    run_tasks(chunks, run);  // a chunk a thread
  } else {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run(chunk);
  }
  return y;
}

}  // namespace

bool winograd_pays(const Tensor& weight, int64_t n, int64_t h, int64_t w) {
  return weight.scalar_type() == ScalarType::Float && weight.size(2) == 3 && weight.size(3) == 3 &&
         std::min(weight.size(0), weight.size(1)) >= kLeastChannels &&
         9 * n * h * w > kPositions * cpu::winograd_tiles(n, h, w) + kWeightCost;
}

Tensor winograd_convolution(const Tensor& x, const Tensor& weight) {
  return convolve(x, transform(weight, /*for_input_gradient=*/false));
}

Tensor winograd_dgrad(const Tensor& grad, const Tensor& weight) {
  return convolve(grad, transform(weight, /*for_input_gradient=*/true));
}

}  // namespace inception_ext
