// Batch norm + ReLU + max pool in one pass over the raw convolution: what is pooled is normalised
// as it is read, and rounded as if it had been written, so that the result is that of the two ops,
// ties included.
#include <cstdint>

#include "batch_norm.h"
#include "device/batch_norm_vectors.cuh"
#include "device/global.cuh"
#include "device/max_pool_walk.cuh"
#include "device/sync.cuh"
#include "device/types.cuh"
#include "launch.h"
#include "max_pool_launch.h"

namespace inception_ext::kernels {
namespace {

// relu(batch norm) of the input.
template <int kVec>
class NormalisedValue {
 public:
  __device__ __forceinline__ NormalisedValue(const BatchNormReluMaxPoolParams& p, int32_t c) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      mean_[i] = load_global(p.mean + c + i);
      scale_[i] = load_global(p.gamma + c + i) * load_global(p.rstd + c + i);
      beta_[i] = load_global(p.beta + c + i);
    }
  }

  template <typename T>
  __device__ __forceinline__ float operator()(int i, T value) const {
    const float y = relu((to_float(value) - mean_[i]) * scale_[i] + beta_[i]);
    return to_float(from_float<T>(y));
  }

 private:
  float mean_[kVec];
  float scale_[kVec];
  float beta_[kVec];
};

template <typename T, int kVec, int kKernelH, int kStrideH>
__global__ void __launch_bounds__(kPoolThreads, kPoolMinBlocks)
    batch_norm_relu_max_pool_kernel(const __grid_constant__ BatchNormReluMaxPoolParams p,
                                    int32_t rows_per_thread) {
  wait_for_previous_kernel();
  allow_next_kernel();
  max_pool_walk<T, kVec, kKernelH, kStrideH, true, NormalisedValue<kVec>>(p.pool, rows_per_thread,
                                                                          p);
}

template <typename T, int kVec>
cudaError_t launch_pool(const BatchNormReluMaxPoolParams& params, cudaStream_t stream) {
  const MaxPoolForwardParams& p = params.pool;
  return with_window(p.window, [&](auto kernel_h, auto stride_h) {
    constexpr int kKernelH = decltype(kernel_h)::value;
    constexpr int kStrideH = decltype(stride_h)::value;
    const PoolPlan geometry = plan_pool(p.output_w * p.channels / kVec, p.output_h, p.batch);
    return launch_dependent(batch_norm_relu_max_pool_kernel<T, kVec, kKernelH, kStrideH>,
                            geometry.grid, dim3(kPoolThreads), 0, stream, params,
                            geometry.rows_per_thread);
  });
}

template <typename T>
cudaError_t dispatch(const BatchNormReluMaxPoolParams& params, cudaStream_t stream) {
  const MaxPoolForwardParams& p = params.pool;
  const bool vectors =
      is_image_vectorizable<T>(p.x, p.x_stride, p.batch, p.input_h, p.input_w, p.channels) &&
      is_image_vectorizable<T>(p.y, p.y_stride, p.batch, p.output_h, p.output_w, p.channels) &&
      is_aligned(p.argmax, kVectorSize<T>);
  return vectors ? launch_pool<T, kVectorSize<T>>(params, stream)
                 : launch_pool<T, 1>(params, stream);
}

}  // namespace

cudaError_t batch_norm_relu_max_pool(const BatchNormReluMaxPoolParams& params,
                                     cudaStream_t stream) {
  const MaxPoolForwardParams& p = params.pool;
  if (!takes_pool(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.channels == 0 || p.output_h == 0 || p.output_w == 0) return cudaSuccess;
  if (p.x == nullptr || p.y == nullptr || p.argmax == nullptr || !has_vectors(params))
    return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat16:
      return dispatch<__half>(params, stream);
    case DType::kBFloat16:
      return dispatch<__nv_bfloat16>(params, stream);
    case DType::kFloat32:
      return dispatch<float>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace inception_ext::kernels
