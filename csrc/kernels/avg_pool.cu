// NHWC average pool (adaptive, global, or with a kernel and a stride) and its backward by gather.
//
//   y[n, p, q, c]      = mean of x[n, h, w, c] over the rows h of window p and columns w of window
//   q grad_x[n, h, w, c] = sum of grad_y[n, p, q, c] / pixels of (p, q) over the windows that hold
//                        (h, w)
//
// Forward a block takes one window: a lane owns a vector of channels, the warps share the pixels,
// warp w adds pixels w, w + kWarps and so on, and warp 0 adds up the warps. Backward a thread owns
// a vector of channels of one pixel and walks over the windows that hold it: one or two a side
// where windows overlap, more where they are smaller than a pixel. Sums are float32, in an order
// that depends on the shape alone, without atomics.
#include <cstdint>

#include "avg_pool.h"
#include "device/global.cuh"
#include "device/shared.cuh"
#include "device/sync.cuh"
#include "device/types.cuh"
#include "launch.h"

namespace inception_ext::kernels {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBackwardThreads = 128;

// Indices from `begin` up to and without `end`.
struct Range {
  int32_t begin;
  int32_t end;
  __device__ __forceinline__ int32_t size() const { return end - begin; }
};

// What window i covers.
__device__ __forceinline__ Range window(const AvgPoolAxis& axis, int32_t i) {
  return {i * axis.step / axis.parts, (i * axis.step + axis.length + axis.parts - 1) / axis.parts};
}

// The windows that hold x: those that end behind it and do not begin behind it.
__device__ __forceinline__ Range windows_around(const AvgPoolAxis& axis, int32_t x) {
  const int32_t passed = x * axis.parts - axis.length;
  const int32_t end = (x * axis.parts + axis.parts - 1) / axis.step + 1;
  return {passed < 0 ? 0 : passed / axis.step + 1, end < axis.output ? end : axis.output};
}

// Grid: x over N * P * Q * groups of 32 vectors of channels.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    avg_pool_forward_kernel(const __grid_constant__ AvgPoolParams p, int32_t groups) {
  wait_for_previous_kernel();
  allow_next_kernel();
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [kWarps][kVec][32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t cell = blockIdx.x / groups;  // (n * P + p) * Q + q
  const int64_t n = cell / p.w.output / p.h.output;
  const Range rows = window(p.h, cell / p.w.output % p.h.output);
  const Range columns = window(p.w, cell % p.w.output);
  const int32_t pixels = rows.size() * columns.size();
  const int64_t c = (int64_t{blockIdx.x % groups} * 32 + lane) * kVec;
  const bool inside = c < p.channels;

  float sum[kVec] = {};
  if (inside) {
    const int64_t first = (n * p.h.input + rows.begin) * p.w.input + columns.begin;
    const T* x = static_cast<const T*>(p.from) + first * p.from_stride + c;
#pragma unroll 4
    for (int32_t i = warp; i < pixels; i += kWarps) {
      const int64_t pixel = int64_t{i / columns.size()} * p.w.input + i % columns.size();
      const Vector<T, kVec> values = load_global<kVec>(x + pixel * p.from_stride);
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] += to_float(values.data[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kVec; ++j) store_shared(shared + (warp * kVec + j) * 32 + lane, sum[j]);
  __syncthreads();
  if (warp != 0 || !inside) return;

  Vector<T, kVec> mean;
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum[j] += load_shared(shared + (w * kVec + j) * 32 + lane);
    mean.data[j] = from_float<T>(sum[j] / static_cast<float>(pixels));
  }
  store_global(static_cast<T*>(p.to) + cell * p.to_stride + c, mean);
}

// Grid: x over W * vectors of channels, y over N * H.
template <typename T, int kVec>
__global__ void __launch_bounds__(kBackwardThreads)
    avg_pool_backward_kernel(const __grid_constant__ AvgPoolParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int32_t vectors = static_cast<int32_t>(p.channels) / kVec;
  const int32_t column = blockIdx.x * kBackwardThreads + threadIdx.x;
  const int32_t w = column / vectors, c = column % vectors * kVec;
  if (w >= p.w.input) return;
  const Range across = windows_around(p.w, w);
  const T* grad_y = static_cast<const T*>(p.from) + c;
  T* grad_x = static_cast<T*>(p.to) + c;

  const int32_t rows = static_cast<int32_t>(p.batch) * p.h.input;
  for (int32_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int64_t n = row / p.h.input;
    const Range down = windows_around(p.h, row % p.h.input);
    float sum[kVec] = {};
    for (int32_t i = down.begin; i < down.end; ++i) {
      for (int32_t j = across.begin; j < across.end; ++j) {
        const float share =
            1.0f / static_cast<float>(window(p.h, i).size() * window(p.w, j).size());
        const int64_t cell = (n * p.h.output + i) * p.w.output + j;
        const Vector<T, kVec> grad = load_global<kVec>(grad_y + cell * p.from_stride);
#pragma unroll
        for (int k = 0; k < kVec; ++k) sum[k] += to_float(grad.data[k]) * share;
      }
    }
    Vector<T, kVec> result;
#pragma unroll
    for (int k = 0; k < kVec; ++k) result.data[k] = from_float<T>(sum[k]);
    store_global(grad_x + (int64_t{row} * p.w.input + w) * p.to_stride, result);
  }
}

template <typename T, int kVec>
cudaError_t launch_forward(const AvgPoolParams& p, cudaStream_t stream) {
  const int64_t groups = (p.channels / kVec + 31) / 32;
  const int64_t blocks = p.batch * p.h.output * p.w.output * groups;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(avg_pool_forward_kernel<T, kVec>, dim3(static_cast<unsigned>(blocks)),
                          dim3(kThreads), sizeof(float) * kThreads * kVec, stream, p,
                          static_cast<int32_t>(groups));
}

template <typename T, int kVec>
cudaError_t launch_backward(const AvgPoolParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t threads = p.w.input * p.channels / kVec, rows = p.batch * p.h.input;
  const dim3 grid(static_cast<unsigned>((threads + kBackwardThreads - 1) / kBackwardThreads),
                  static_cast<unsigned>(rows < kMaxGridY ? rows : kMaxGridY));
  return launch_dependent(avg_pool_backward_kernel<T, kVec>, grid, dim3(kBackwardThreads), 0,
                          stream, p);
}

// What a thread holds in 32 bits, with room for a grid stride.
constexpr int64_t kMaxExtent = 1 << 30;

bool takes_axis(const AvgPoolAxis& axis) {
  if (axis.input < 1 || axis.output < 1 || axis.step < 1 || axis.parts < 1 || axis.length < 1) {
    return false;
  }
  const int64_t last = int64_t{axis.output - 1} * axis.step + axis.length;  // in parts
  return last <= int64_t{axis.input} * axis.parts &&
         (int64_t{axis.input} + 1) * axis.parts <= kMaxExtent;
}

bool takes(const AvgPoolParams& p) {
  return p.batch >= 0 && p.channels >= 0 && takes_axis(p.h) && takes_axis(p.w) &&
         int64_t{p.h.input} * p.w.input <= kMaxExtent && p.batch * p.h.input <= kMaxExtent &&
         p.w.input * p.channels <= kMaxExtent;
}

template <bool kForward, typename T, int kVec>
cudaError_t launch_vectors(const AvgPoolParams& p, cudaStream_t stream) {
  return kForward ? launch_forward<T, kVec>(p, stream) : launch_backward<T, kVec>(p, stream);
}

template <bool kForward, typename T>
cudaError_t dispatch_vectors(const AvgPoolParams& p, cudaStream_t stream) {
  constexpr int kVec = kVectorSize<T>;
  const bool vectors = is_aligned(p.from, 16) && is_aligned(p.to, 16) && p.channels % kVec == 0 &&
                       p.from_stride % kVec == 0 && p.to_stride % kVec == 0;
  return vectors ? launch_vectors<kForward, T, kVec>(p, stream)
                 : launch_vectors<kForward, T, 1>(p, stream);
}

template <bool kForward>
cudaError_t dispatch(const AvgPoolParams& p, cudaStream_t stream) {
  if (!takes(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.channels == 0) return cudaSuccess;
  if (p.from == nullptr || p.to == nullptr) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat16:
      return dispatch_vectors<kForward, __half>(p, stream);
    case DType::kBFloat16:
      return dispatch_vectors<kForward, __nv_bfloat16>(p, stream);
    case DType::kFloat32:
      return dispatch_vectors<kForward, float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t avg_pool_forward(const AvgPoolParams& p, cudaStream_t stream) {
  return dispatch<true>(p, stream);
}

cudaError_t avg_pool_backward(const AvgPoolParams& p, cudaStream_t stream) {
  return dispatch<false>(p, stream);
}

}  // namespace inception_ext::kernels
