// NHWC local response normalisation across channels (Krizhevsky et al. 2012, in torch's scaling),
// and its backward.
//
//   d[c] = k + alpha / size * sum of x[i]^2 over the channels i of c's window that exist,
//          [c - size / 2, c + (size - 1) / 2]
//   y[c] = x[c] / d[c]^beta
//   grad_x[c] = grad_y[c] / d[c]^beta - 2 alpha beta / size * x[c]
//               * sum of grad_y[i] * x[i] / d[i]^(beta + 1) over the windows i that hold c,
//                 [c - (size - 1) / 2, c + size / 2]
//
// Both move each value once and compute little, so that memory sets their time. A thread owns a
// vector of channels and reads a few more on either side, which the L1 cache has: windows of 5,
// those of the 2014 paper. Any other size, and what is not aligned, goes channel by channel. The
// backward computes d anew, so that nothing is kept but x.
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

__device__ __forceinline__ float denominator(const LrnWindow& window, float squares) {
  return window.k + window.alpha / static_cast<float>(window.size) * squares;
}

__device__ __forceinline__ float slope(const LrnWindow& window) {
  return 2 * window.alpha * window.beta / static_cast<float>(window.size);
}

// The kHalo channels before a vector, the vector, and the kHalo channels after it, as far as they
// exist; 0 elsewhere.
template <int kVec, int kHalo, typename T>
__device__ __forceinline__ void load_around(const T* x, bool has_before, bool has_after,
                                            float (&values)[kVec + 2 * kHalo]) {
  const Vector<T, kVec> own = load_global<kVec>(x);
  Vector<T, kHalo> before = {}, after = {};
  if (has_before) before = load_global<kHalo>(x - kHalo);
  if (has_after) after = load_global<kHalo>(x + kVec);
#pragma unroll
  for (int i = 0; i < kHalo; ++i) {
    values[i] = to_float(before.data[i]);
    values[kHalo + kVec + i] = to_float(after.data[i]);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) values[kHalo + i] = to_float(own.data[i]);
}

__device__ __forceinline__ float square(float value) { return value * value; }

// Windows of 5. Grid: x over pixels * vectors of channels.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lrn_vector_kernel(const __grid_constant__ LrnForwardParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kVec = kVectorSize<T>;
  const int64_t vectors = p.channels / kVec;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pixel = index / vectors, c = index % vectors * kVec;
  if (pixel >= p.pixels) return;

  float x[kVec + 2 * kSide];
  load_around<kVec, kSide>(static_cast<const T*>(p.x) + pixel * p.x_stride + c, c > 0,
                           c + kVec < p.channels, x);
  Vector<T, kVec> result;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float squares = square(x[i]);
#pragma unroll
    for (int j = 1; j <= 2 * kSide; ++j) squares += square(x[i + j]);
    result.data[i] =
        from_float<T>(x[i + kSide] / powf(denominator(p.window, squares), p.window.beta));
  }
  store_global(static_cast<T*>(p.y) + pixel * p.y_stride + c, result);
}

// The same for the backward: the windows that hold one of the vector's channels belong to two more
// on either side, and reach over two more again.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lrn_backward_vector_kernel(const __grid_constant__ LrnBackwardParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kVec = kVectorSize<T>;
  const int64_t vectors = p.channels / kVec;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pixel = index / vectors, c = index % vectors * kVec;
  if (pixel >= p.pixels) return;
  const bool has_before = c > 0, has_after = c + kVec < p.channels;

  float x[kVec + 4 * kSide], grad[kVec + 2 * kSide];
  load_around<kVec, 2 * kSide>(static_cast<const T*>(p.x) + pixel * p.x_stride + c, has_before,
                               has_after, x);
  load_around<kVec, kSide>(static_cast<const T*>(p.grad_y) + pixel * p.grad_y_stride + c,
                           has_before, has_after, grad);
  float direct[kVec];            // grad_y / d^beta
  float term[kVec + 2 * kSide];  // grad_y * x / d^(beta + 1)
#pragma unroll
  for (int i = 0; i < kVec + 2 * kSide; ++i) {
    float squares = square(x[i]);
#pragma unroll
    for (int j = 1; j <= 2 * kSide; ++j) squares += square(x[i + j]);
    const float d = denominator(p.window, squares);
    const float normalised = grad[i] / powf(d, p.window.beta);
    const bool exists = i < kSide ? has_before : i < kSide + kVec ? true : has_after;
    term[i] = exists ? normalised * x[i + kSide] / d : 0.0f;
    if (i >= kSide && i < kSide + kVec) direct[(i - kSide) % kVec] = normalised;
  }
  Vector<T, kVec> result;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    float sum = term[i];
#pragma unroll
    for (int j = 1; j <= 2 * kSide; ++j) sum += term[i + j];
    result.data[i] = from_float<T>(direct[i] - slope(p.window) * x[i + 2 * kSide] * sum);
  }
  store_global(static_cast<T*>(p.grad_x) + pixel * p.grad_x_stride + c, result);
}

// d of channel c, of a pixel of x.
template <typename T>
__device__ __forceinline__ float denominator_of(const LrnWindow& window, const T* x,
                                                int64_t channels, int64_t c) {
  const int64_t first = c - window.size / 2, last = c + (window.size - 1) / 2;
  const int64_t begin = first > 0 ? first : 0;
  const int64_t end = last < channels ? last + 1 : channels;
  float squares = 0;
  for (int64_t i = begin; i < end; ++i) squares += square(to_float(load_global(x + i)));
  return denominator(window, squares);
}

// Windows of any size. Grid: x over pixels * channels.
template <typename T>
__global__ void __launch_bounds__(kThreads) lrn_kernel(const __grid_constant__ LrnForwardParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pixel = index / p.channels, c = index % p.channels;
  if (pixel >= p.pixels) return;
  const T* x = static_cast<const T*>(p.x) + pixel * p.x_stride;

  const float d = denominator_of(p.window, x, p.channels, c);
  const float result = to_float(load_global(x + c)) / powf(d, p.window.beta);
  store_global(static_cast<T*>(p.y) + pixel * p.y_stride + c, from_float<T>(result));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    lrn_backward_kernel(const __grid_constant__ LrnBackwardParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t pixel = index / p.channels, c = index % p.channels;
  if (pixel >= p.pixels) return;
  const T* x = static_cast<const T*>(p.x) + pixel * p.x_stride;
  const T* grad_y = static_cast<const T*>(p.grad_y) + pixel * p.grad_y_stride;

  const int64_t first = c - (p.window.size - 1) / 2, last = c + p.window.size / 2;
  const int64_t begin = first > 0 ? first : 0;
  const int64_t end = last < p.channels ? last + 1 : p.channels;
  float direct = 0, sum = 0;
  for (int64_t i = begin; i < end; ++i) {
    const float d = denominator_of(p.window, x, p.channels, i);
    const float normalised = to_float(load_global(grad_y + i)) / powf(d, p.window.beta);
    sum += normalised * to_float(load_global(x + i)) / d;
    if (i == c) direct = normalised;
  }
  const float result = direct - slope(p.window) * to_float(load_global(x + c)) * sum;
  store_global(static_cast<T*>(p.grad_x) + pixel * p.grad_x_stride + c, from_float<T>(result));
}

template <typename T>
bool is_vectorizable(const void* data, int64_t stride) {
  return is_aligned(data, 16) && stride % kVectorSize<T> == 0;
}

// Starts one of two kernels, a thread a vector or a channel.
template <typename T, typename Params>
cudaError_t launch_over(void (*vector_kernel)(Params), void (*kernel)(Params), bool vectors,
                        const Params& p, cudaStream_t stream) {
  vectors = vectors && p.window.size == 2 * kSide + 1 && p.channels % kVectorSize<T> == 0;
  const int64_t threads = p.pixels * (vectors ? p.channels / kVectorSize<T> : p.channels);
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(vectors ? vector_kernel : kernel, dim3(static_cast<unsigned>(blocks)),
                          dim3(kThreads), 0, stream, p);
}

template <typename T>
cudaError_t dispatch(const LrnForwardParams& p, cudaStream_t stream) {
  return launch_over<T>(lrn_vector_kernel<T>, lrn_kernel<T>,
                        is_vectorizable<T>(p.x, p.x_stride) && is_vectorizable<T>(p.y, p.y_stride),
                        p, stream);
}

template <typename T>
cudaError_t dispatch(const LrnBackwardParams& p, cudaStream_t stream) {
  return launch_over<T>(lrn_backward_vector_kernel<T>, lrn_backward_kernel<T>,
                        is_vectorizable<T>(p.grad_y, p.grad_y_stride) &&
                            is_vectorizable<T>(p.x, p.x_stride) &&
                            is_vectorizable<T>(p.grad_x, p.grad_x_stride),
                        p, stream);
}

template <typename Params>
cudaError_t dispatch_dtype(const Params& p, bool has_data, cudaStream_t stream) {
  if (p.pixels < 0 || p.channels < 0 || p.window.size < 1) return cudaErrorInvalidValue;
  if (p.pixels == 0 || p.channels == 0) return cudaSuccess;
  if (!has_data) return cudaErrorInvalidValue;
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

}  // namespace

cudaError_t lrn_forward(const LrnForwardParams& p, cudaStream_t stream) {
  return dispatch_dtype(p, p.x != nullptr && p.y != nullptr, stream);
}

cudaError_t lrn_backward(const LrnBackwardParams& p, cudaStream_t stream) {
  const bool has_data = p.grad_y != nullptr && p.x != nullptr && p.grad_x != nullptr;
  return dispatch_dtype(p, has_data, stream);
}

}  // namespace inception_ext::kernels
