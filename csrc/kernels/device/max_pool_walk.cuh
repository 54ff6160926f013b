// The walk of the max pool's forward; see max_pool.cu for the idea. What is pooled is a functor, so
// that an activation function may come before the pool without being written.
#pragma once

#include <cstdint>

#include "../params.h"
#include "global.cuh"
#include "platform.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

constexpr int kPoolThreads = 128;
// Blocks a multiprocessor, that is at most 128 registers a thread. Left to choose, ptxas spills a
// few bytes in some instantiations to fit one block more.
constexpr int kPoolMinBlocks = 4;
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

// Reduces one window row: x [C] at (n, h, 0, c), of which read(i, value) makes channel i's float.
template <int kVec, bool kArgmax, typename T, typename Read>
__device__ __forceinline__ Best<kVec> reduce_row(const T* x, const Columns& columns,
                                                 const Read& read) {
  Vector<T, kVec> pixel[kMaxKernelW];
#pragma unroll
  for (int j = 0; j < kMaxKernelW; ++j) pixel[j] = load_global<kVec>(x + columns.offset[j]);
  Best<kVec> best;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    best.value[i] = read(i, pixel[0].data[i]);
    best.index[i] = columns.kw[0];
#pragma unroll
    for (int j = 1; j < kMaxKernelW; ++j) {
      take<kArgmax>(best.value[i], best.index[i], read(i, pixel[j].data[i]), columns.kw[j]);
    }
  }
  return best;
}

// What a thread of the forward does. Grid: x over OW * C / kVec, y over chunks of rows_per_thread
// output rows, z over N.
//
// Read(read_params, c) says what is pooled: read(i, value) of channel c + i in the place of value.
template <typename T, int kVec, int kKernelH, int kStrideH, bool kArgmax, typename Read,
          typename ReadParams>
__device__ __forceinline__ void max_pool_walk(const MaxPoolForwardParams& p,
                                              int32_t rows_per_thread,
                                              const ReadParams& read_params) {
  constexpr int kShared = kKernelH - kStrideH;  // rows that a window shares with the next
  const int32_t vectors = static_cast<int32_t>(p.channels) / kVec;
  const int32_t column = blockIdx.x * kPoolThreads + threadIdx.x;
  const int32_t ow = column / vectors;
  const int32_t c = column % vectors * kVec;
  if (ow >= p.output_w) return;
  const Read read(read_params, c);
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
        row[kh] =
            reduce_row<kVec, kArgmax>(x + clamp(h0 + kh, 0, last_h) * p.x_stride.h, columns, read);
      }
#pragma unroll 1
      for (int32_t oh = begin; oh < end; ++oh, h0 += kStrideH) {
#pragma unroll
        for (int kh = kShared; kh < kKernelH; ++kh) {
          row[kh] = reduce_row<kVec, kArgmax>(x + clamp(h0 + kh, 0, last_h) * p.x_stride.h, columns,
                                              read);
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

}  // namespace inception_ext::kernels
