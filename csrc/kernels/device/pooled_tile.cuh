// The end of both stem kernels: bias, ReLU, and the 3x3 max pool of stride 2 (stem_plan.h).
//
// A warp's sums are c[fragment][8 columns][C registers]. The columns are the filters in an order
// that gives a lane a whole 16-byte vector of neighbouring channels: filter_of_column.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../stem_plan.h"
#include "global.cuh"
#include "shared.cuh"
#include "tile.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

// Whether launchers choose these tiles on the architecture that is compiled for: sm_75 has not the
// shared memory for four rows.
template <typename Math, int kRows>
constexpr bool kHasStem =
    Math::kExists && (kRows == 2 || kArchitecture == 0 || kArchitecture >= 800);

// Blocks on a multiprocessor that registers are left for: shared memory of 100 KiB holds one of
// four rows.
template <int kRows>
constexpr int kResidentBlocks =
    kRows == 4 && (kArchitecture == 860 || kArchitecture == 890 || kArchitecture == 1200)
        ? 1
        : kStemBlocks;

// Column 8 * j + 2 * t + e of C, which lane t of four holds, is element 2 * j + e of vector t.
template <typename T>
__device__ __forceinline__ int filter_of_column(int column) {
  constexpr int kVec = kVectorSize<T>;  // four vectors make a group of columns
  const int in_group = column % (4 * kVec);
  return column - in_group + in_group % 8 / 2 * kVec + in_group / 8 * 2 + in_group % 2;
}

// Sums start as the bias [64], which lies in shared memory.
template <typename T, int kCount>
__device__ __forceinline__ void start_sums(float (&c)[kCount][8][4], const float* bias) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Vector<float, 2> pair = load_shared<2>(bias + filter_of_column<T>(8 * j + 2 * t));
#pragma unroll
    for (int f = 0; f < kCount; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[f][j][i] = pair.data[i % 2];
    }
  }
}

template <int kCount>
__device__ __forceinline__ void add_sums(float (&c)[kCount][8][4],
                                         const float (&other)[kCount][8][4]) {
#pragma unroll
  for (int i = 0; i < kCount * 32; ++i)
    c[i / 32][i / 4 % 8][i % 4] += other[i / 32][i / 4 % 8][i % 4];
}

// Zero where negative; NaN stays.
__device__ __forceinline__ float relu(float value) { return value <= 0.0f ? 0.0f : value; }

// Row g (half 0) or g + 8 of a fragment in vectors: vector t of each group of columns.
template <typename T, typename Store>
__device__ __forceinline__ void for_each_vector(const float (&c)[8][4], int half,
                                                const Store& store) {
  constexpr int kVec = kVectorSize<T>;
#pragma unroll
  for (int group = 0; group < kStemFilters / (4 * kVec); ++group) {
    Vector<T, kVec> vector;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      vector.data[i] = from_float<T>(relu(c[group * kVec / 2 + i / 2][half * 2 + i % 2]));
    }
    store(group, vector);
  }
}

// The pooled pixels that a block computes.
struct PooledOrigin {
  int64_t n;
  int32_t row;  // the first
  int32_t column;
};

template <int kRows>
__device__ __forceinline__ PooledOrigin pooled_origin(int32_t tile, int32_t output_h,
                                                      int32_t output_w) {
  const int32_t tiles_w = (output_w + kPooledColumns - 1) / kPooledColumns;
  const int32_t tiles_h = (output_h + kRows - 1) / kRows;
  const int32_t row = tile / tiles_w;
  return {row / tiles_h, row % tiles_h * kRows, tile % tiles_w * kPooledColumns};
}

// Where fragment f of a warp starts: what depends on f is a constant.
template <int kRows>
__device__ __forceinline__ int fragment_row(int f) {
  const int warp = threadIdx.x / 32;
  return kRows == 4 ? warp / 2 + 3 * f : warp;
}
template <int kRows>
__device__ __forceinline__ int fragment_column(int f) {
  return (kRows == 4 ? threadIdx.x / 32 % 2 : f) * 16;
}

// The convolution's pixels in shared memory, [2 * kRows + 1][32][64], in chunks of 16 bytes. Odd
// pixels swap the halves of 128 bytes: what eight lanes write, four chunks of two neighbours, and
// what they read, eight chunks of one pixel, is free of bank conflicts.
template <typename T, int kRows>
class ConvTile {
 public:
  static constexpr int kVec = kVectorSize<T>;
  static constexpr int kChunks = kStemFilters / kVec;

  explicit __device__ __forceinline__ ConvTile(char* memory)
      : memory_(reinterpret_cast<T*>(memory)) {}

  // Fragment f of the warp.
  __device__ __forceinline__ void store(const float (&c)[8][4], int f) const {
    const int lane = threadIdx.x % 32, row = fragment_row<kRows>(f);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = fragment_column<kRows>(f) + half * 8 + lane / 4;
      for_each_vector<T>(c, half, [&](int group, const Vector<T, kVec>& vector) {
        store_shared<kVec>(at(row, column, group * 4 + lane % 4), vector);
      });
    }
  }

  // y: channel 0 of pooled pixel (0, 0) of the image. conv_h, conv_w: what exists of the
  // convolution from the tile's first pixel on.
  __device__ __forceinline__ void pool(T* y, int64_t stride, bool vectors,
                                       const PooledOrigin& origin, int32_t conv_h, int32_t conv_w,
                                       int32_t output_h, int32_t output_w) const {
    for (int i = threadIdx.x; i < kRows * kPooledColumns * kChunks;
         i += StemTile<kRows, sizeof(T)>::kThreads) {
      const int chunk = i % kChunks, pixel = i / kChunks;
      const int row = pixel / kPooledColumns, column = pixel % kPooledColumns;
      const int32_t p = origin.row + row, q = origin.column + column;
      if (p >= output_h || q >= output_w) continue;
      Vector<T, kVec> best = load(2 * row, 2 * column, chunk);
#pragma unroll
      for (int k = 1; k < 9; ++k) {
        // A window that reaches past the end takes the last pixel once more.
        const int h = 2 * row + k / 3, w = 2 * column + k % 3;
        take(best, load(h < conv_h ? h : conv_h - 1, w < conv_w ? w : conv_w - 1, chunk));
      }
      T* pointer = y + (int64_t{p} * output_w + q) * stride + chunk * kVec;
      if (vectors) {
        store_global(pointer, best);
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e) store_global(pointer + e, best.data[e]);
      }
    }
  }

 private:
  __device__ __forceinline__ T* at(int row, int column, int chunk) const {
    const int pixel = row * kFragmentColumns + column;
    return memory_ + pixel * kStemFilters + (chunk ^ (pixel & 1) << 2) * kVec;
  }

  __device__ __forceinline__ Vector<T, kVec> load(int row, int column, int chunk) const {
    return load_shared<kVec>(at(row, column, chunk));
  }

  // NaN wins. Other values are not negative, so that their bits are in order as integers.
  static __device__ __forceinline__ void take(Vector<T, kVec>& best, const Vector<T, kVec>& value) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        uint32_t old, other;
        memcpy(&old, &best.data[i], 4);
        memcpy(&other, &value.data[i], 4);
        old = other > old ? other : old;
        memcpy(&best.data[i], &old, 4);
      }
    } else {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
      for (int i = 0; i < kVec; i += 2) {
        Pair old(best.data[i], best.data[i + 1]);
        old = __hmax2_nan(old, Pair(value.data[i], value.data[i + 1]));
        best.data[i] = old.x;
        best.data[i + 1] = old.y;
      }
    }
  }

  T* memory_;
};

}  // namespace inception_ext::kernels
