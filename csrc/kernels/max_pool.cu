// NHWC max pool with a uint8 argmax, and its backward by gather.
//
//   window (oh, ow) covers h = oh * stride_h - padding_h + kh, kh in [0, kernel_h), w likewise
//   y[n, oh, ow, c]      = max over the window's pixels inside the input of x[n, h, w, c]
//   argmax[n, oh, ow, c] = kh * kernel_w + kw of that maximum
//   grad_x[n, h, w, c]   = sum of grad_y[n, oh, ow, c] over the windows whose argmax is (h, w)
//
// Torch's rule decides which pixel is the maximum: it walks the window in row-major order and takes
// a value that is greater than the best so far, or NaN. So the first of equal maxima wins, and the
// last NaN. That walk is associative as long as its order is kept: a window row may be reduced on
// its own, and the row results combined from top to bottom. Hence a thread owns one column of the
// output and a vector of channels, and walks down: neighbouring windows share whole row results
// (two of three for 3x3 stride 1, one of three for stride 2). Along the output row they would share
// columns, whose results do not combine in torch's order. Neighbouring threads hold neighbouring
// channels, then pixels, so every access of a warp is contiguous.
//
// The backward is the same walk with the roles swapped: a thread owns one column of the input,
// reads each window of it once and keeps the sums of the kernel_h input rows that the windows
// reach.
//
// A thread computes a 64-bit base address once per image and adds to it, so that one instantiation
// serves tensors of any size; a second one with 32-bit offsets would only save those few
// instructions.
#include <cstdint>

#include "device/global.cuh"
#include "device/max_pool_walk.cuh"
#include "device/sync.cuh"
#include "device/types.cuh"
#include "launch.h"
#include "max_pool.h"
#include "max_pool_launch.h"

namespace inception_ext::kernels {
namespace {

// The input as it is.
struct PlainValue {
  __device__ __forceinline__ PlainValue(const MaxPoolForwardParams& /*p*/, int32_t /*c*/) {}

  template <typename T>
  __device__ __forceinline__ float operator()(int /*i*/, T value) const {
    return to_float(value);
  }
};

template <typename T, int kVec, int kKernelH, int kStrideH, bool kArgmax>
__global__ void __launch_bounds__(kPoolThreads, kPoolMinBlocks)
    max_pool_forward_kernel(const __grid_constant__ MaxPoolForwardParams p,
                            int32_t rows_per_thread) {
  wait_for_previous_kernel();
  allow_next_kernel();
  max_pool_walk<T, kVec, kKernelH, kStrideH, kArgmax, PlainValue>(p, rows_per_thread, p);
}

// Grid: x over W * C / kVec, y over chunks of steps_per_thread window rows, z over N. Step t adds
// window row t and then writes the stride_h input rows that no later window reaches: h + padding_h
// in [t * stride_h, (t + 1) * stride_h).
template <typename T, int kVec, int kKernelH, int kStrideH>
__global__ void __launch_bounds__(kPoolThreads, kPoolMinBlocks)
    max_pool_backward_kernel(const __grid_constant__ MaxPoolBackwardParams p,
                             int32_t steps_per_thread) {
  constexpr int kLead = (kKernelH - 1) / kStrideH;  // earlier window rows that reach a step's rows
  const int32_t vectors = static_cast<int32_t>(p.channels) / kVec;
  const int32_t column = blockIdx.x * kPoolThreads + threadIdx.x;
  const int32_t w = column / vectors;
  const int32_t c = column % vectors * kVec;
  if (w >= p.input_w) return;
  const int32_t input_h = static_cast<int32_t>(p.input_h);
  const int32_t output_h = static_cast<int32_t>(p.output_h);
  const int32_t steps = (input_h + p.window.padding_h + kStrideH - 1) / kStrideH;

  // The column in each window that holds it, from left to right. kNoWindow: no such window; it
  // stays negative when kh * kernel_w is added, so that no argmax equals it.
  constexpr int32_t kNoWindow = -kKernelH * kMaxKernelW;
  const int32_t last_ow = (w + p.window.padding_w) / p.window.stride_w;
  int32_t kw[kMaxKernelW];
#pragma unroll
  for (int j = 0; j < kMaxKernelW; ++j) {
    const int32_t ow = last_ow - (kMaxKernelW - 1) + j;
    kw[j] = w + p.window.padding_w - ow * p.window.stride_w;
    if (ow < 0 || ow >= p.output_w || kw[j] >= p.window.kernel_w) kw[j] = kNoWindow;
  }

  const T* grad_y = static_cast<const T*>(p.grad_y);
  for (int64_t n = blockIdx.z; n < p.batch; n += gridDim.z) {
    const int64_t first_ow = last_ow - (kMaxKernelW - 1);
    const int64_t grad_y_offset = n * p.grad_y_stride.n + first_ow * p.grad_y_stride.w + c;
    const int64_t argmax_offset = (n * output_h * p.output_w + first_ow) * p.channels + c;
    T* grad_x = static_cast<T*>(p.grad_x) + n * p.grad_x_stride.n + w * p.grad_x_stride.w + c;

    for (int32_t begin = blockIdx.y * steps_per_thread; begin < steps;
         begin += gridDim.y * steps_per_thread) {
      const int32_t end = begin + steps_per_thread < steps ? begin + steps_per_thread : steps;
      float sum[kKernelH][kVec] = {};  // of input rows h + padding_h = t * stride_h + kh
#pragma unroll 1
      for (int32_t t = begin > kLead ? begin - kLead : 0; t < end; ++t) {
        if (t < output_h) {
          Vector<T, kVec> grad[kMaxKernelW];
          Vector<uint8_t, kVec> index[kMaxKernelW];
#pragma unroll
          for (int j = 0; j < kMaxKernelW; ++j) {
            grad[j] = {};
            index[j] = {};
            if (kw[j] < 0) continue;
            grad[j] = load_global<kVec>(grad_y + grad_y_offset + t * p.grad_y_stride.h +
                                        j * p.grad_y_stride.w);
            index[j] =
                load_global<kVec>(p.argmax + argmax_offset + (t * p.output_w + j) * p.channels);
          }
#pragma unroll
          for (int j = 0; j < kMaxKernelW; ++j) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
              const float value = to_float(grad[j].data[i]);
#pragma unroll
              for (int kh = 0; kh < kKernelH; ++kh) {
                if (index[j].data[i] == kh * p.window.kernel_w + kw[j]) sum[kh][i] += value;
              }
            }
          }
        }
#pragma unroll
        for (int s = 0; s < kStrideH; ++s) {
          const int32_t h = t * kStrideH + s - p.window.padding_h;
          if (t < begin || h < 0 || h >= input_h) continue;
          T* pointer = grad_x + h * p.grad_x_stride.h;
          Vector<T, kVec> result;
          if (p.accumulate) result = load_global<kVec>(pointer);
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float old = p.accumulate ? to_float(result.data[i]) : 0.0f;
            result.data[i] = from_float<T>(old + sum[s][i]);
          }
          store_global(pointer, result);
        }
#pragma unroll
        for (int kh = 0; kh < kKernelH; ++kh) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            sum[kh][i] = kh + kStrideH < kKernelH ? sum[(kh + kStrideH) % kKernelH][i] : 0.0f;
          }
        }
      }
    }
  }
}

template <typename T, int kVec>
cudaError_t launch_forward(const MaxPoolForwardParams& p, cudaStream_t stream) {
  return with_window(p.window, [&](auto kernel_h, auto stride_h) {
    constexpr int kKernelH = decltype(kernel_h)::value;
    constexpr int kStrideH = decltype(stride_h)::value;
    const PoolPlan geometry = plan_pool(p.output_w * p.channels / kVec, p.output_h, p.batch);
    const auto kernel = p.argmax != nullptr
                            ? max_pool_forward_kernel<T, kVec, kKernelH, kStrideH, true>
                            : max_pool_forward_kernel<T, kVec, kKernelH, kStrideH, false>;
    return launch_dependent(kernel, geometry.grid, dim3(kPoolThreads), 0, stream, p,
                            geometry.rows_per_thread);
  });
}

template <typename T>
cudaError_t dispatch_forward(const MaxPoolForwardParams& p, cudaStream_t stream) {
  const bool vectors =
      is_image_vectorizable<T>(p.x, p.x_stride, p.batch, p.input_h, p.input_w, p.channels) &&
      is_image_vectorizable<T>(p.y, p.y_stride, p.batch, p.output_h, p.output_w, p.channels) &&
      is_aligned(p.argmax, kVectorSize<T>);
  return vectors ? launch_forward<T, kVectorSize<T>>(p, stream) : launch_forward<T, 1>(p, stream);
}

template <typename T, int kVec>
cudaError_t launch_backward(const MaxPoolBackwardParams& p, cudaStream_t stream) {
  return with_window(p.window, [&](auto kernel_h, auto stride_h) {
    constexpr int kKernelH = decltype(kernel_h)::value;
    constexpr int kStrideH = decltype(stride_h)::value;
    const int64_t steps = (p.input_h + p.window.padding_h + kStrideH - 1) / kStrideH;
    const PoolPlan geometry = plan_pool(p.input_w * p.channels / kVec, steps, p.batch);
    return launch(max_pool_backward_kernel<T, kVec, kKernelH, kStrideH>, geometry.grid,
                  dim3(kPoolThreads), 0, stream, p, geometry.rows_per_thread);
  });
}

template <typename T>
cudaError_t dispatch_backward(const MaxPoolBackwardParams& p, cudaStream_t stream) {
  const bool vectors = is_image_vectorizable<T>(p.grad_y, p.grad_y_stride, p.batch, p.output_h,
                                                p.output_w, p.channels) &&
                       is_image_vectorizable<T>(p.grad_x, p.grad_x_stride, p.batch, p.input_h,
                                                p.input_w, p.channels) &&
                       is_aligned(p.argmax, kVectorSize<T>);
  return vectors ? launch_backward<T, kVectorSize<T>>(p, stream) : launch_backward<T, 1>(p, stream);
}

}  // namespace

cudaError_t max_pool_forward(const MaxPoolForwardParams& p, cudaStream_t stream) {
  if (!takes_pool(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.channels == 0 || p.output_h == 0 || p.output_w == 0) return cudaSuccess;
  if (p.x == nullptr || p.y == nullptr) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat16:
      return dispatch_forward<__half>(p, stream);
    case DType::kBFloat16:
      return dispatch_forward<__nv_bfloat16>(p, stream);
    case DType::kFloat32:
      return dispatch_forward<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t max_pool_backward(const MaxPoolBackwardParams& p, cudaStream_t stream) {
  if (!takes_pool(p)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.channels == 0 || p.input_h == 0 || p.input_w == 0) return cudaSuccess;
  const bool has_output = p.output_h != 0 && p.output_w != 0;  // without one the gradient is zero
  if (p.grad_x == nullptr || (has_output && (p.grad_y == nullptr || p.argmax == nullptr))) {
    return cudaErrorInvalidValue;
  }
  switch (p.dtype) {
    case DType::kFloat16:
      return dispatch_backward<__half>(p, stream);
    case DType::kBFloat16:
      return dispatch_backward<__nv_bfloat16>(p, stream);
    case DType::kFloat32:
      return dispatch_backward<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace inception_ext::kernels
