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

  // The same, and which pixel of its window each maximum was: kh * 3 + kw, into argmax [m_end,
  // channels]. Torch's rule: the first of equal maxima, the last of several NaNs. `first_m`, `c`:
  // of the tile and of the thread's chunk.
  __device__ __forceinline__ void reduce(const char* raw, char* pooled, uint8_t* argmax,
                                         int32_t first_m, int32_t m_end, int32_t channels,
                                         int32_t c) const {
    if (run() >= kTileRows / kRun) return;
    Ranked left = ranked_column(raw, 0), middle = ranked_column(raw, 1);
#pragma unroll 1
    for (int i = 0; i < kRun; ++i) {
      const Ranked right = ranked_column(raw, i + 2);
      Ranked best = middle;
      shift(best, 1);
      if (masks_ & kLeft << (i + 1)) take(best, left);
      if (masks_ & kRight << (i + 1)) {
        Ranked other = right;
        shift(other, 2);
        take(best, other);
      }
      const int32_t row = run() * kRun + i;
      store_shared<kVec>(reinterpret_cast<T*>(pooled + chunk_offset(row, chunk())), best.value);
      if (first_m + row < m_end) {
        uint8_t* to = argmax + (int64_t{first_m} + row) * channels + c;
        if (channels % kVec == 0) {
          if (c < channels) store_global<kVec>(to, best.index);
        } else {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            if (c + e < channels) store_global(to + e, best.index.data[e]);
          }
        }
      }
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

  // A value of each channel, and its place in the window.
  struct Ranked {
    Pixel value;
    Vector<uint8_t, kVec> index;
  };

  // As column, with kh * 3.
  __device__ __forceinline__ Ranked ranked_column(const char* raw, int j) const {
    const int32_t up = run() * kRun + j;
    Ranked above{load(raw, up), {}}, below{load(raw, up + 2 * width_), {}};
    Ranked best{load(raw, up + width_), {}};
    shift(best, 3);
    shift(below, 6);
    if (masks_ & kUp << j) take(best, above);
    if (masks_ & kDown << j) take(best, below);
    return best;
  }

  static __device__ __forceinline__ void shift(Ranked& ranked, int by) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) ranked.index.data[i] += by;
  }

  // In whatever order they come, the result is that of torch's walk over the window.
  static __device__ __forceinline__ void take(Ranked& best, const Ranked& other) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float a = to_float(other.value.data[i]), b = to_float(best.value.data[i]);
      const bool earlier = other.index.data[i] < best.index.data[i];
      const bool wins = a != a ? b == b || !earlier : a > b || (a == b && earlier);
      if (wins) {
        best.value.data[i] = other.value.data[i];
        best.index.data[i] = other.index.data[i];
      }
    }
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
