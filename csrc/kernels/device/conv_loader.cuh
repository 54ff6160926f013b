// From global memory into the operand tiles (tile.cuh) of an implicit GEMM, one step of K at a
// time.
//
// K runs over (r, s, c) without a gap: for every 16-byte chunk of it a thread works out filter tap
// and channel, so that no channel count wastes more than a part of the last chunk. Thread i of the
// block takes chunk i % 4 of rows i / 4, i / 4 + 32 and so on.
#pragma once

#include <cstdint>

#include "../params.h"
#include "../tile_plan.h"
#include "async_copy.cuh"
#include "global.cuh"
#include "shared.cuh"
#include "tile.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

constexpr int kLoadRows = kTileThreads / kRowChunks;  // that the block copies at once

// A position in K.
struct FilterTap {
  int32_t r;
  int32_t s;
  int32_t c;

  __device__ __forceinline__ void advance(const ConvProblem& p, int32_t k) {
    c += k;
    while (c >= p.channels) {
      c -= p.channels;
      if (++s == p.kernel_w) {
        s = 0;
        ++r;
      }
    }
  }
};

// Of the calling thread's chunk in step k_begin.
template <typename T>
__device__ __forceinline__ FilterTap first_tap(const ConvProblem& p, int32_t k_begin) {
  FilterTap tap{0, 0, 0};
  tap.advance(p, (k_begin * kRowChunks + threadIdx.x % kRowChunks) * kVectorSize<T>);
  return tap;
}

// Whether chunks of x can be copied whole: none holds two taps, and all are aligned.
template <typename T>
__device__ __forceinline__ bool has_whole_chunks(const ConvProblem& p) {
  constexpr int kVec = kVectorSize<T>;
  return p.channels % kVec == 0 && p.x_stride % kVec == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % kChunkBytes == 0;
}

// Rows m, m + 1, ... of the GEMM: the pixels that each output pixel's window covers.
template <typename T, int kTileRows>
class WindowLoader {
 public:
  __device__ __forceinline__ WindowLoader(const ConvProblem& p, int32_t first_m, int32_t k_begin)
      : p_(p), whole_(has_whole_chunks<T>(p)), tap_(first_tap<T>(p, k_begin)) {
    const int32_t pixels = p.output_h * p.output_w;
    const int32_t m_end = p.batch * pixels;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int32_t m = first_m + threadIdx.x / kRowChunks + i * kLoadRows;
      const int32_t n = m / pixels, pixel = m % pixels;
      const int32_t h = pixel / p.output_w * p.stride_h - p.padding_h;
      const int32_t w = pixel % p.output_w * p.stride_w - p.padding_w;
      first_pixel_[i] = (n * p.input_h + h) * p.input_w + w;
      h_[i] = static_cast<int16_t>(m < m_end ? h : kOutside);
      w_[i] = static_cast<int16_t>(w);
    }
  }

  __device__ __forceinline__ bool is_whole() const { return whole_; }

  // Whether a filter tap of the thread's i-th row lies in the image.
  __device__ __forceinline__ bool is_inside(int i, const FilterTap& tap) const {
    return tap.r < p_.kernel_h &&
           static_cast<uint32_t>(h_[i] + tap.r) < static_cast<uint32_t>(p_.input_h) &&
           static_cast<uint32_t>(w_[i] + tap.s) < static_cast<uint32_t>(p_.input_w);
  }

  // The next step of K into rows of a tile.
  __device__ __forceinline__ void load(char* tile) {
    char* to = tile + chunk_offset(threadIdx.x / kRowChunks, threadIdx.x % kRowChunks);
    if (whole_) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool inside = is_inside(i, tap_);
        const T* from = inside ? address(i, tap_) : static_cast<const T*>(p_.x);
        // Other taps of the window, and so the next steps, read most of these pixels again.
        copy_async<kChunkBytes, true>(to + i * kLoadRows * kRowBytes, from,
                                      inside ? kChunkBytes : 0);
      }
    } else {
      FilterTap tap = tap_;
#pragma unroll 1
      for (int e = 0; e < kVec; ++e) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          T value = from_float<T>(0);
          if (is_inside(i, tap)) value = load_global(address(i, tap));
          store_shared(reinterpret_cast<T*>(to + i * kLoadRows * kRowBytes) + e, value);
        }
        tap.advance(p_, 1);
      }
    }
    tap_.advance(p_, kRowChunks * kVec);
  }

 private:
  static constexpr int kVec = kVectorSize<T>;
  static constexpr int kRows = kTileRows / kLoadRows;
  static constexpr int32_t kOutside = -kMaxConvSide;  // plus any r is still negative

  __device__ __forceinline__ const T* address(int i, const FilterTap& tap) const {
    const int32_t pixel = first_pixel_[i] + tap.r * p_.input_w + tap.s;
    return static_cast<const T*>(p_.x) + pixel * p_.x_stride + tap.c;
  }
  const ConvProblem& p_;
  bool whole_;
  FilterTap tap_;
  // Of each row's window, the first pixel: its number in x, which may lie outside of the image, and
  // its place in the image. Few registers: the accumulators want them.
  int32_t first_pixel_[kRows];
  int16_t h_[kRows];
  int16_t w_[kRows];
};

// Pixels m, m + 1, ... of x [N * H * W, C] as they are, zeros outside: what the max pool prologue
// reads. The number of rows is up to the images' width.
template <typename T>
class PixelLoader {
 public:
  __device__ __forceinline__ PixelLoader(const ConvProblem& p, int32_t first_m, int32_t rows)
      : p_(p), whole_(has_whole_chunks<T>(p)), first_m_(first_m), rows_(rows) {}

  __device__ __forceinline__ void load(char* tile, int32_t step) const {
    const int32_t c = (step * kRowChunks + threadIdx.x % kRowChunks) * kVec;
    const int32_t m_end = p_.batch * p_.input_h * p_.input_w;
#pragma unroll 1
    for (int32_t row = threadIdx.x / kRowChunks; row < rows_; row += kLoadRows) {
      const int32_t m = first_m_ + row;
      char* to = tile + chunk_offset(row, threadIdx.x % kRowChunks);
      const bool inside = m >= 0 && m < m_end;
      const T* from = static_cast<const T*>(p_.x) + (inside ? m * p_.x_stride : 0);
      if (whole_) {
        const bool has_channels = inside && c < p_.channels;
        copy_async<kChunkBytes>(to, has_channels ? from + c : from, has_channels ? kChunkBytes : 0);
      } else {
#pragma unroll 1
        for (int e = 0; e < kVec; ++e) {
          T value = from_float<T>(0);
          if (inside && c + e < p_.channels) value = load_global(from + c + e);
          store_shared(reinterpret_cast<T*>(to) + e, value);
        }
      }
    }
  }

 private:
  static constexpr int kVec = kVectorSize<T>;

  const ConvProblem& p_;
  bool whole_;
  int32_t first_m_;
  int32_t rows_;
};

// Filters k, k + 1, ...: rows of the packed weights.
template <typename T, int kTileRows>
class FilterLoader {
 public:
  // `filters`: rows to load; the tile gets eight more, of zeros where there is none, so that
  // fragments may be read in pairs.
  __device__ __forceinline__ FilterLoader(const ConvProblem& p, int32_t first_k, int32_t filters)
      : row_elements_((p.kernel_h * p.kernel_w * p.channels + 7) / 8 * 8),
        filters_(filters),
        from_(static_cast<const T*>(p.weight) +
              int64_t{first_k + static_cast<int32_t>(threadIdx.x) / kRowChunks} * row_elements_) {}

  __device__ __forceinline__ void load(char* tile, int32_t step) const {
    const int32_t element = (step * kRowChunks + threadIdx.x % kRowChunks) * kVectorSize<T>;
    const int32_t first = threadIdx.x / kRowChunks;
    char* to = tile + chunk_offset(first, threadIdx.x % kRowChunks);
#pragma unroll
    for (int i = 0; i < kTileRows / kLoadRows; ++i) {
      const int32_t row = first + i * kLoadRows;
      if (row >= filters_ + 8) break;
      const bool inside = row < filters_ && element < row_elements_;
      const T* from = inside ? from_ + int64_t{i * kLoadRows} * row_elements_ + element : from_;
      copy_async<kChunkBytes>(to + i * kLoadRows * kRowBytes, from, inside ? kChunkBytes : 0);
    }
  }

 private:
  int32_t row_elements_;
  int32_t filters_;
  const T* from_;
};

}  // namespace inception_ext::kernels
