// NHWC global average pool.
//
//   y[n, c] = sum over the pixels of x[n, pixel, c] / pixels
//
// A lane owns a vector of channels, the warps of a block share the pixels: warp w adds pixels w,
// w + kWarps and so on, and warp 0 adds up the warps. Sums are float32, in an order that depends on
// the shape alone.
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

// Grid: x over N * groups of 32 vectors of channels.
template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    global_avg_pool_kernel(const __grid_constant__ GlobalAvgPoolParams p, int32_t groups) {
  wait_for_previous_kernel();
  allow_next_kernel();
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [kWarps][kVec][32]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.x / groups;
  const int64_t c = (int64_t{blockIdx.x % groups} * 32 + lane) * kVec;
  const bool inside = c < p.channels;

  float sum[kVec] = {};
  if (inside) {
    const T* x = static_cast<const T*>(p.x) + n * p.pixels * p.x_stride + c;
#pragma unroll 4
    for (int64_t pixel = warp; pixel < p.pixels; pixel += kWarps) {
      const Vector<T, kVec> values = load_global<kVec>(x + pixel * p.x_stride);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += to_float(values.data[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) store_shared(shared + (warp * kVec + i) * 32 + lane, sum[i]);
  __syncthreads();
  if (warp != 0 || !inside) return;

  Vector<T, kVec> mean;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum[i] += load_shared(shared + (w * kVec + i) * 32 + lane);
    mean.data[i] = from_float<T>(sum[i] / static_cast<float>(p.pixels));
  }
  store_global(static_cast<T*>(p.y) + n * p.y_stride + c, mean);
}

template <typename T, int kVec>
cudaError_t launch_vectors(const GlobalAvgPoolParams& p, cudaStream_t stream) {
  const int64_t groups = (p.channels / kVec + 31) / 32;
  const int64_t blocks = p.batch * groups;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch_dependent(global_avg_pool_kernel<T, kVec>, dim3(static_cast<unsigned>(blocks)),
                          dim3(kThreads), sizeof(float) * kThreads * kVec, stream, p,
                          static_cast<int32_t>(groups));
}

template <typename T>
cudaError_t dispatch(const GlobalAvgPoolParams& p, cudaStream_t stream) {
  constexpr int kVec = kVectorSize<T>;
  const bool vectors = is_aligned(p.x, 16) && is_aligned(p.y, 16) && p.channels % kVec == 0 &&
                       p.x_stride % kVec == 0 && p.y_stride % kVec == 0;
  return vectors ? launch_vectors<T, kVec>(p, stream) : launch_vectors<T, 1>(p, stream);
}

}  // namespace

cudaError_t global_avg_pool(const GlobalAvgPoolParams& p, cudaStream_t stream) {
  if (p.batch < 0 || p.channels < 0 || p.pixels < 1) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.channels == 0) return cudaSuccess;
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
