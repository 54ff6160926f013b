// NHWC local response normalisation across channels (Krizhevsky et al. 2012, in torch's scaling).
//
//   y[c] = x[c] / (k + alpha / size * sum of x[i]^2) ^ beta
//   over the channels i in [c - size / 2, c + (size - 1) / 2] that exist
//
// It moves each value once and computes little, so that memory sets its time. A thread owns a
// vector of channels and reads two more on either side, which the L1 cache has: windows of 5, those
// of the 2014 paper. Any other size, and what is not aligned, goes channel by channel.
#include <cmath>
#include <cstdint>

#include "device/global.cuh"
#include "device/sync.cuh"
#include "device/types.cuh"
#include "launch.h"
#include "lrn.h"

namespace inception_ext::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kSide = 2;  // channels on either side in a window of 5

__device__ __forceinline__ float normalise(const LrnParams& p, float value, float squares) {
  return value / powf(p.k + p.alpha / static_cast<float>(p.size) * squares, p.beta);
}

// Windows of 5. Grid: x over pixels * vectors of channels.
template <typename T>
__global__ void __launch_bounds__(kThreads) lrn_vector_kernel(const __grid_constant__ LrnParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kVec = kVectorSize<T>;
  const int64_t vectors = p.channels / kVec;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pixel = index / vectors, c = index % vectors * kVec;
  if (pixel >= p.pixels) return;
  const T* x = static_cast<const T*>(p.x) + pixel * p.x_stride + c;

  const Vector<T, kVec> own = load_global<kVec>(x);
  Vector<T, kSide> before = {}, after = {};
  if (c > 0) before = load_global<kSide>(x - kSide);
  if (c + kVec < p.channels) after = load_global<kSide>(x + kVec);
  float square[kVec + 2 * kSide];
#pragma unroll
  for (int i = 0; i < kVec + 2 * kSide; ++i) {
    const T value = i < kSide          ? before.data[i % kSide]
                    : i < kSide + kVec ? own.data[(i - kSide) % kVec]
                                       : after.data[(i - kSide - kVec) % kSide];
    square[i] = to_float(value) * to_float(value);
  }
  Vector<T, kVec> result;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float squares = square[i];
#pragma unroll
    for (int j = 1; j <= 2 * kSide; ++j) squares += square[i + j];
    result.data[i] = from_float<T>(normalise(p, to_float(own.data[i]), squares));
  }
  store_global(static_cast<T*>(p.y) + pixel * p.y_stride + c, result);
}

// Windows of any size. Grid: x over pixels * channels.
template <typename T>
__global__ void __launch_bounds__(kThreads) lrn_kernel(const __grid_constant__ LrnParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pixel = index / p.channels, c = index % p.channels;
  if (pixel >= p.pixels) return;
  const T* x = static_cast<const T*>(p.x) + pixel * p.x_stride;

  const int64_t first = c - p.size / 2, last = c + (p.size - 1) / 2;
  const int64_t begin = first > 0 ? first : 0;
  const int64_t end = last < p.channels ? last + 1 : p.channels;
  float squares = 0;
  for (int64_t i = begin; i < end; ++i) {
    const float value = to_float(load_global(x + i));
    squares += value * value;
  }
  const float result = normalise(p, to_float(load_global(x + c)), squares);
  store_global(static_cast<T*>(p.y) + pixel * p.y_stride + c, from_float<T>(result));
}

template <typename T>
cudaError_t dispatch(const LrnParams& p, cudaStream_t stream) {
  constexpr int kVec = kVectorSize<T>;
  const bool vectors = p.size == 2 * kSide + 1 && is_aligned(p.x, 16) && is_aligned(p.y, 16) &&
                       p.channels % kVec == 0 && p.x_stride % kVec == 0 && p.y_stride % kVec == 0;
  const int64_t threads = p.pixels * (vectors ? p.channels / kVec : p.channels);
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = vectors ? lrn_vector_kernel<T> : lrn_kernel<T>;
  return launch_dependent(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                          p);
}

}  // namespace

cudaError_t lrn_forward(const LrnParams& p, cudaStream_t stream) {
  if (p.pixels < 0 || p.channels < 0 || p.size < 1) return cudaErrorInvalidValue;
  if (p.pixels == 0 || p.channels == 0) return cudaSuccess;
  if (p.x == nullptr || p.y == nullptr) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat16:
      return dispatch<__half>(p, stream);
    case DType::kBFloat16:
      return dispatch<__nv_bfloat16>(p, stream);
    case DType::kFloat32:
      return dispatch<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace inception_ext::kernels
