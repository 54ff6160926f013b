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
#include <type_traits>

#include "device/global.cuh"
#include "device/sync.cuh"
#include "device/types.cuh"
#include "launch.h"
#include "max_pool.h"

namespace inception_ext::kernels {
namespace {

constexpr int kThreads = 128;
// Blocks a multiprocessor, that is at most 128 registers a thread. Left to choose, ptxas spills a
// few bytes in some instantiations to fit one block more.
constexpr int kMinBlocks = 4;
constexpr int kMaxKernelW = 3;

__device__ __forceinline__ int32_t clamp(int32_t value, int32_t low, int32_t high) {
  return value < low ? low : (value > high ? high : value);
}

// The best of a run of pixels for each channel of a vector. index is the column kw in the window
// for a row, the window index for a whole window.
template <int kVec>
struct Best {
  float value[kVec];
  int32_t index[kVec];
};

template <bool kArgmax>
__device__ __forceinline__ void take(float& best, int32_t& best_index, float value, int32_t index) {
  const bool wins = value > best || value != value;
  best = wins ? value : best;
  if (kArgmax) best_index = wins ? index : best_index;
}

// The pixels of one window row. A column outside the input is replaced by the nearest one inside,
// which the window holds as well: a pixel that comes a second time changes neither the maximum nor,
// with the index of where it was read, the argmax.
struct Columns {
  int64_t offset[kMaxKernelW];  // elements from the start of the row
  int32_t kw[kMaxKernelW];
};

__device__ __forceinline__ Columns window_columns(const MaxPoolForwardParams& p, int32_t ow) {
  Columns columns;
  const int32_t first = ow * p.window.stride_w - p.window.padding_w;
#pragma unroll
  for (int j = 0; j < kMaxKernelW; ++j) {
    const int32_t kw = j < p.window.kernel_w ? j : p.window.kernel_w - 1;
    const int32_t w = clamp(first + kw, 0, static_cast<int32_t>(p.input_w) - 1);
    columns.offset[j] = w * p.x_stride.w;
    columns.kw[j] = w - first;
  }
  return columns;
}

// Reduces one window row: x [C] at (n, h, 0, c).
template <int kVec, bool kArgmax, typename T>
__device__ __forceinline__ Best<kVec> reduce_row(const T* x, const Columns& columns) {
  Vector<T, kVec> pixel[kMaxKernelW];
#pragma unroll
  for (int j = 0; j < kMaxKernelW; ++j) pixel[j] = load_global<kVec>(x + columns.offset[j]);
  Best<kVec> best;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    best.value[i] = to_float(pixel[0].data[i]);
    best.index[i] = columns.kw[0];
#pragma unroll
    for (int j = 1; j < kMaxKernelW; ++j) {
      take<kArgmax>(best.value[i], best.index[i], to_float(pixel[j].data[i]), columns.kw[j]);
    }
  }
  return best;
}

// Grid: x over OW * C / kVec, y over chunks of rows_per_thread output rows, z over N.
template <typename T, int kVec, int kKernelH, int kStrideH, bool kArgmax>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    max_pool_forward_kernel(const __grid_constant__ MaxPoolForwardParams p,
                            int32_t rows_per_thread) {
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kShared = kKernelH - kStrideH;  // rows that a window shares with the next
  const int32_t vectors = static_cast<int32_t>(p.channels) / kVec;
  const int32_t column = blockIdx.x * kThreads + threadIdx.x;
  const int32_t ow = column / vectors;
  const int32_t c = column % vectors * kVec;
  if (ow >= p.output_w) return;
  const Columns columns = window_columns(p, ow);
  const int32_t output_h = static_cast<int32_t>(p.output_h);
  const int32_t last_h = static_cast<int32_t>(p.input_h) - 1;

  for (int64_t n = blockIdx.z; n < p.batch; n += gridDim.z) {
    const T* x = static_cast<const T*>(p.x) + n * p.x_stride.n + c;
    T* y = static_cast<T*>(p.y) + n * p.y_stride.n + ow * p.y_stride.w + c;
    const int64_t argmax_offset = (n * output_h * p.output_w + ow) * p.channels + c;

    for (int32_t begin = blockIdx.y * rows_per_thread; begin < output_h;
         begin += gridDim.y * rows_per_thread) {
      const int32_t end = begin + rows_per_thread < output_h ? begin + rows_per_thread : output_h;
      int32_t h0 = begin * kStrideH - p.window.padding_h;
      Best<kVec> row[kKernelH];
#pragma unroll
      for (int kh = 0; kh < kShared; ++kh) {
        row[kh] = reduce_row<kVec, kArgmax>(x + clamp(h0 + kh, 0, last_h) * p.x_stride.h, columns);
      }
#pragma unroll 1
      for (int32_t oh = begin; oh < end; ++oh, h0 += kStrideH) {
#pragma unroll
        for (int kh = kShared; kh < kKernelH; ++kh) {
          row[kh] =
              reduce_row<kVec, kArgmax>(x + clamp(h0 + kh, 0, last_h) * p.x_stride.h, columns);
        }
        Vector<T, kVec> maximum;
        Vector<uint8_t, kVec> index;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          float best = row[0].value[i];
          int32_t best_index = row[0].index[i] + (clamp(h0, 0, last_h) - h0) * p.window.kernel_w;
#pragma unroll
          for (int kh = 1; kh < kKernelH; ++kh) {
            const int32_t first = (clamp(h0 + kh, 0, last_h) - h0) * p.window.kernel_w;
            take<kArgmax>(best, best_index, row[kh].value[i], row[kh].index[i] + first);
          }
          maximum.data[i] = from_float<T>(best);
          index.data[i] = static_cast<uint8_t>(best_index);
        }
        store_global(y + oh * p.y_stride.h, maximum);
        if (kArgmax) {
          store_global(p.argmax + argmax_offset + oh * p.output_w * p.channels, index);
        }
#pragma unroll
        for (int kh = 0; kh < kShared; ++kh) row[kh] = row[kh + kStrideH];
      }
    }
  }
}

// Grid: x over W * C / kVec, y over chunks of steps_per_thread window rows, z over N. Step t adds
// window row t and then writes the stride_h input rows that no later window reaches: h + padding_h
// in [t * stride_h, (t + 1) * stride_h).
template <typename T, int kVec, int kKernelH, int kStrideH>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    max_pool_backward_kernel(const __grid_constant__ MaxPoolBackwardParams p,
                             int32_t steps_per_thread) {
  constexpr int kLead = (kKernelH - 1) / kStrideH;  // earlier window rows that reach a step's rows
  const int32_t vectors = static_cast<int32_t>(p.channels) / kVec;
  const int32_t column = blockIdx.x * kThreads + threadIdx.x;
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

// Launch geometry: `columns` threads for each of `rows` steps down.
struct Plan {
  dim3 grid;
  int32_t rows_per_thread;
};

Plan plan(int64_t columns, int64_t rows, int64_t batch) {
  // Walking further saves loads and compares as long as enough threads are left to fill the device:
  // 1024 on each of 128 multiprocessors. Past 16 rows the first ones of a chunk, which the chunk
  // above reads too, are few already.
  constexpr int64_t kFill = 1 << 17;
  constexpr int64_t kMaxWalk = 16;
  constexpr int64_t kMaxGridYZ = 65535;
  int64_t walk = 1;
  while (walk < kMaxWalk && columns * rows / (2 * walk) >= kFill / batch + 1) walk *= 2;
  int64_t chunks = (rows + walk - 1) / walk;
  walk = (rows + chunks - 1) / chunks;  // chunks of even length
  const dim3 grid(static_cast<unsigned>((columns + kThreads - 1) / kThreads),
                  static_cast<unsigned>(chunks < kMaxGridYZ ? chunks : kMaxGridYZ),
                  static_cast<unsigned>(batch < kMaxGridYZ ? batch : kMaxGridYZ));
  return {grid, static_cast<int32_t>(walk)};
}

// H, W, W * C and the like: what a thread holds in 32 bits, with room for a grid stride.
constexpr int64_t kMaxExtent = 1 << 30;

bool takes_axis(int64_t input, int64_t output, int32_t kernel, int32_t stride, int32_t padding) {
  return input >= 0 && input <= kMaxExtent && output >= 0 && output <= kMaxExtent &&
         (kernel == 2 || kernel == 3) && (stride == 1 || stride == 2) && padding >= 0 &&
         padding <= kernel / 2 && (output == 0 || (output - 1) * stride - padding < input);
}

template <typename Params>
bool takes(const Params& p) {
  const PoolWindow& window = p.window;
  return (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16 ||
          p.dtype == DType::kFloat32) &&
         p.batch >= 0 && p.channels >= 0 &&
         takes_axis(p.input_h, p.output_h, window.kernel_h, window.stride_h, window.padding_h) &&
         takes_axis(p.input_w, p.output_w, window.kernel_w, window.stride_w, window.padding_w) &&
         p.channels <= kMaxExtent && p.input_w * p.channels <= kMaxExtent &&
         p.output_w * p.channels <= kMaxExtent;
}

// Can [N, H, W, C] with these strides be moved in vectors of `size` elements? The stride of an axis
// of one entry is never used and may be anything.
template <typename T>
bool is_vectorizable(const void* data, const PixelStrides& stride, int64_t n, int64_t h, int64_t w,
                     int64_t c) {
  constexpr int64_t kSize = kVectorSize<T>;
  return is_aligned(data, kSize * sizeof(T)) && c % kSize == 0 &&
         (n <= 1 || stride.n % kSize == 0) && (h <= 1 || stride.h % kSize == 0) &&
         (w <= 1 || stride.w % kSize == 0);
}

// Calls function(kernel_h, stride_h) with both as compile-time constants.
template <typename Function>
cudaError_t with_window(const PoolWindow& window, const Function& function) {
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  if (window.kernel_h == 2) {
    return window.stride_h == 1 ? function(Two(), One()) : function(Two(), Two());
  }
  return window.stride_h == 1 ? function(Three(), One()) : function(Three(), Two());
}

template <typename T, int kVec>
cudaError_t launch_forward(const MaxPoolForwardParams& p, cudaStream_t stream) {
  return with_window(p.window, [&](auto kernel_h, auto stride_h) {
    constexpr int kKernelH = decltype(kernel_h)::value;
    constexpr int kStrideH = decltype(stride_h)::value;
    const Plan geometry = plan(p.output_w * p.channels / kVec, p.output_h, p.batch);
    const auto kernel = p.argmax != nullptr
                            ? max_pool_forward_kernel<T, kVec, kKernelH, kStrideH, true>
                            : max_pool_forward_kernel<T, kVec, kKernelH, kStrideH, false>;
    return launch_dependent(kernel, geometry.grid, dim3(kThreads), 0, stream, p,
                            geometry.rows_per_thread);
  });
}

template <typename T>
cudaError_t dispatch_forward(const MaxPoolForwardParams& p, cudaStream_t stream) {
  const bool vectors =
      is_vectorizable<T>(p.x, p.x_stride, p.batch, p.input_h, p.input_w, p.channels) &&
      is_vectorizable<T>(p.y, p.y_stride, p.batch, p.output_h, p.output_w, p.channels) &&
      is_aligned(p.argmax, kVectorSize<T>);
  return vectors ? launch_forward<T, kVectorSize<T>>(p, stream) : launch_forward<T, 1>(p, stream);
}

template <typename T, int kVec>
cudaError_t launch_backward(const MaxPoolBackwardParams& p, cudaStream_t stream) {
  return with_window(p.window, [&](auto kernel_h, auto stride_h) {
    constexpr int kKernelH = decltype(kernel_h)::value;
    constexpr int kStrideH = decltype(stride_h)::value;
    const int64_t steps = (p.input_h + p.window.padding_h + kStrideH - 1) / kStrideH;
    const Plan geometry = plan(p.input_w * p.channels / kVec, steps, p.batch);
    return launch(max_pool_backward_kernel<T, kVec, kKernelH, kStrideH>, geometry.grid,
                  dim3(kThreads), 0, stream, p, geometry.rows_per_thread);
  });
}

template <typename T>
cudaError_t dispatch_backward(const MaxPoolBackwardParams& p, cudaStream_t stream) {
  const bool vectors =
      is_vectorizable<T>(p.grad_y, p.grad_y_stride, p.batch, p.output_h, p.output_w, p.channels) &&
      is_vectorizable<T>(p.grad_x, p.grad_x_stride, p.batch, p.input_h, p.input_w, p.channels) &&
      is_aligned(p.argmax, kVectorSize<T>);
  return vectors ? launch_backward<T, kVectorSize<T>>(p, stream) : launch_backward<T, 1>(p, stream);
}

}  // namespace

cudaError_t max_pool_forward(const MaxPoolForwardParams& p, cudaStream_t stream) {
  if (!takes(p)) return cudaErrorInvalidValue;
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
  if (!takes(p)) return cudaErrorInvalidValue;
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
