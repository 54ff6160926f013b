// The 3x3 max pool (stride 1, padding 1) of a tile's pixels, between the copy to shared memory and
// the products: pooled[i] = max over the window around pixel first_m + i.
//
// Raw pixels first_m - W - 1 ... lie in shared memory, so that a pixel's upper and lower neighbours
// are W rows away. Four threads take the chunks of a run of four pixels: they reduce six columns
// vertically, then these horizontally, 18 reads for four windows of nine.
#pragma once

#include <cstdint>

#include "../params.h"
#include "shared.cuh"
#include "tile.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

template <typename T, int kTileRows>
class PoolPrologue {
 public:
  __device__ __forceinline__ PoolPrologue(const ConvProblem& p, int32_t first_m)
      : width_(p.input_w) {
    const int32_t pixels = p.input_h * p.input_w, m_end = p.batch * pixels;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int32_t m = first_m + run() * kRun + j - 1;
      const int32_t pixel = m % pixels;
      const int32_t h = pixel / width_, w = pixel % width_;
      const bool exists = m >= 0 && m < m_end;
      if (exists && h > 0) masks_ |= kUp << j;
      if (exists && h + 1 < p.input_h) masks_ |= kDown << j;
      if (exists && w > 0) masks_ |= kLeft << j;
      if (exists && w + 1 < width_) masks_ |= kRight << j;
    }
  }

  __device__ __forceinline__ void reduce(const char* raw, char* pooled) const {
    if (run() >= kTileRows / kRun) return;
    Pixel left = column(raw, 0), middle = column(raw, 1);
#pragma unroll 1
    for (int i = 0; i < kRun; ++i) {
      const Pixel right = column(raw, i + 2);
      Pixel best = middle;
      if (masks_ & kLeft << (i + 1)) take(best, left);
      if (masks_ & kRight << (i + 1)) take(best, right);
      store_shared<kVec>(reinterpret_cast<T*>(pooled + chunk_offset(run() * kRun + i, chunk())),
                         best);
      left = middle;
      middle = right;
    }
  }

 private:
  static constexpr int kVec = kVectorSize<T>;
  static constexpr int kRun = 4;
  static constexpr int kColumns = kRun + 2;
  // Which neighbours column j has: bit j of each group of eight.
  static constexpr uint32_t kUp = 1, kDown = 1 << 8, kLeft = 1 << 16, kRight = 1 << 24;
  using Pixel = Vector<T, kVec>;

  static __device__ __forceinline__ int32_t run() { return threadIdx.x / kRowChunks; }
  static __device__ __forceinline__ int32_t chunk() { return threadIdx.x % kRowChunks; }

  static __device__ __forceinline__ Pixel load(const char* raw, int32_t row,
                                               Place place = Place::current()) {
    return load_shared<kVec>(reinterpret_cast<const T*>(raw + chunk_offset(row, chunk())), place);
  }

  // The maximum of column j's pixel and its upper and lower neighbours.
  __device__ __forceinline__ Pixel column(const char* raw, int j) const {
    const int32_t up = run() * kRun + j;  // row of the pixel above
    const Pixel above = load(raw, up), below = load(raw, up + 2 * width_);
    Pixel best = load(raw, up + width_);
    if (masks_ & kUp << j) take(best, above);
    if (masks_ & kDown << j) take(best, below);
    return best;
  }

  // NaN wins.
  static __device__ __forceinline__ void take(Pixel& best, const Pixel& value) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float old = to_float(best.data[i]), other = to_float(value.data[i]);
      if (other > old || other != other) best.data[i] = value.data[i];
    }
  }

  int32_t width_;
  uint32_t masks_ = 0;
};

}  // namespace inception_ext::kernels
