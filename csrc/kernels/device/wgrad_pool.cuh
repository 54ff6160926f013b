// The 3x3 max pool (stride 1, padding 1) of x as the operand of a weight gradient.
//
// A block walks over its pixels in order, and so do their neighbours a row above and below: raw
// pixels go through a ring in shared memory, each read once from global memory. For every step a
// thread reduces one chunk of a run of pixels, first the columns of the windows, then across these.
#pragma once

#include <cstdint>

#include "../conv_wgrad.h"
#include "../wgrad_plan.h"
#include "async_copy.cuh"
#include "global.cuh"
#include "pixel_tile.cuh"
#include "shared.cuh"
#include "types.cuh"
#include "wgrad_loader.cuh"

namespace inception_ext::kernels {

// An x operand as TapOperand is one.
template <typename Math, int kChannels>
class PoolOperand {
  using T = typename Math::Element;
  using Share = PixelShare<T, kChannels>;
  static constexpr int kVec = Share::kVec;
  using Pixel = Vector<T, kVec>;

 public:
  // Channels [first_c, first_c + channels), pixels from first_m on. `shared`: two tiles, then the
  // ring.
  __device__ __forceinline__ PoolOperand(const WgradProblem& p, int32_t first_c, int32_t channels,
                                         int32_t first_m, char* shared)
      : p_(p),
        shared_(shared),
        c_(first_c + Share::channel()),
        c_end_(smaller(first_c + channels, p.channels)),
        pixels_(p.batch * p.input_h * p.input_w - first_m),
        first_m_(first_m),
        m_(Share::row() - p.input_w - 1),
        ring_rows_(pool_ring_rows(p.input_w, kStepPixels<T>)),
        row_(Share::row()),
        run_row_(Share::row() * kRun),
        step_(PixelPosition::of(kStepPixels<T>, p.input_h, p.input_w)) {
    // The pixel to the left of the run. That of pixel 0 is nobody's neighbour.
    const int32_t run = first_m + Share::row() * kRun;
    left_ = PixelPosition::of(run > 0 ? run - 1 : p.input_h * p.input_w - 1, p.input_h, p.input_w);
  }

  __device__ __forceinline__ bool prepares() const { return true; }
  __device__ __forceinline__ char* tile(int32_t step) const {
    return shared_ + step % 2 * kTileBytes;
  }

  // Copies the pixels that the step needs and those before it did not.
  __device__ __forceinline__ void load(int32_t step) {
    if (c_ >= c_end_) return;
    const bool whole = has_whole_chunks<T>(p_);
    const int32_t end = (step + 1) * kStepPixels<T> + p_.input_w + 1;
#pragma unroll 1
    for (; m_ < end; m_ += Share::kRows) {
      char* to = at(row_);
      const bool inside = first_m_ + m_ >= 0 && m_ < pixels_;
      const T* from =
          static_cast<const T*>(p_.x) + (inside ? (first_m_ + m_) * p_.x_stride + c_ : 0);
      if (whole) {
        copy_async<kChunkBytes>(to, from, inside ? kChunkBytes : 0);
      } else {
#pragma unroll 1
        for (int e = 0; e < kVec && c_ + e < c_end_; ++e) {
          const T value = inside ? load_global(from + e) : from_float<T>(0);
          store_shared(reinterpret_cast<T*>(to) + e, value);
        }
      }
      row_ = wrapped(row_ + Share::kRows);
    }
  }

  // Pools a step; zeros behind the last pixel.
  __device__ __forceinline__ void prepare(int32_t step) {
    if (c_ < c_end_) {
      const int32_t first = step * kStepPixels<T> + Share::row() * kRun;
      PixelPosition position = left_;
      Pixel left = column(0, position, first - 1);
      move_right(position);
      Pixel middle = column(1, position, first);
#pragma unroll 1
      for (int i = 0; i < kRun; ++i) {
        const bool exists = first + i < pixels_;
        const bool has_left = position.w > 0, has_right = position.w + 1 < p_.input_w;
        move_right(position);
        const Pixel right = column(i + 2, position, first + i + 1);
        Pixel best = middle;
        if (exists && has_left) take(best, left);
        if (exists && has_right) take(best, right);
        char* to = tile(step) + pixel_chunk_offset<Math>(kStepPixels<T>, Share::row() * kRun + i,
                                                         Share::chunk());
        store_shared<kVec>(reinterpret_cast<T*>(to), best);
        left = middle;
        middle = right;
      }
    }
    run_row_ = wrapped(run_row_ + kStepPixels<T>);
    left_.advance(step_, p_.input_h, p_.input_w);
  }

 private:
  static constexpr int kRun = Share::kPixels;
  static constexpr int kTileBytes = kChannels * kTileRowBytes;

  __device__ __forceinline__ int32_t wrapped(int32_t row) const {
    return row >= ring_rows_ ? row - ring_rows_ : row;
  }
  __device__ __forceinline__ char* at(int32_t row) const {
    return shared_ + 2 * kTileBytes + pixel_chunk_offset<Math>(ring_rows_, row, Share::chunk());
  }
  __device__ __forceinline__ Pixel raw(int32_t row, Place place = Place::current()) const {
    return load_shared<kVec>(reinterpret_cast<const T*>(at(wrapped(row))), place);
  }
  __device__ __forceinline__ void move_right(PixelPosition& position) const {
    position.advance({0, 0, 1}, p_.input_h, p_.input_w);
  }

  // The maximum of pixel m, j - 1 to the right of the run's first, and its upper and lower
  // neighbours.
  __device__ __forceinline__ Pixel column(int j, const PixelPosition& position, int32_t m) const {
    const bool exists = m < pixels_;
    const int32_t up = run_row_ + j;  // row of the pixel above
    const Pixel above = raw(up), below = raw(up + 2 * p_.input_w);
    Pixel best = raw(up + p_.input_w);
    if (exists && position.h > 0) take(best, above);
    if (exists && position.h + 1 < p_.input_h) take(best, below);
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

  const WgradProblem& p_;
  char* shared_;
  int32_t c_;
  int32_t c_end_;
  int32_t pixels_;  // from first_m_ on; so are these counted:
  int32_t first_m_;
  int32_t m_;  // the next pixel to copy
  int32_t ring_rows_;
  int32_t row_;         // of m_ in the ring
  int32_t run_row_;     // of the pixel left of the one above the run
  PixelPosition left_;  // of the run
  PixelPosition step_;
};

}  // namespace inception_ext::kernels
