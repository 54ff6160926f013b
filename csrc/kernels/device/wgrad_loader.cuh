// From global memory into the operand tiles (pixel_tile.cuh) of a weight gradient, one step of
// pixels at a time: dy as it is, and what each filter tap reads of x.
//
// A thread copies the same chunk of every step, so that its tap (r, s, c) is worked out once; its
// pixels move on by the size of a step, without a division.
#pragma once

#include <cstdint>

#include "../conv_wgrad.h"
#include "../tile_plan.h"
#include "async_copy.cuh"
#include "global.cuh"
#include "pixel_tile.cuh"
#include "shared.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

// Whether chunks of pixels, from a multiple of 16 bytes on, can be copied whole.
template <typename T>
__device__ __forceinline__ bool is_chunked(const void* pointer, int64_t pixel_stride) {
  return pixel_stride % kVectorSize<T> == 0 &&
         reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0;
}

// Whether no chunk of (r, s, c) holds two taps.
template <typename T>
__device__ __forceinline__ bool has_whole_chunks(const WgradProblem& p) {
  return p.channels % kVectorSize<T> == 0 && is_chunked<T>(p.x, p.x_stride);
}

// A pixel (n, h, w) of images of one size, pixels counted through all of them.
struct PixelPosition {
  int32_t n;
  int32_t h;
  int32_t w;

  static __device__ __forceinline__ PixelPosition of(int32_t pixel, int32_t height, int32_t width) {
    const int32_t row = pixel / width;
    return {row / height, row % height, pixel % width};
  }

  // `step`: the position of the pixel that many behind the first.
  __device__ __forceinline__ void advance(const PixelPosition& step, int32_t height,
                                          int32_t width) {
    n += step.n;
    h += step.h;
    w += step.w;
    if (w >= width) {
      w -= width;
      ++h;
    }
    if (h >= height) {
      h -= height;
      ++n;
    }
  }
};

// A position in R * S * C.
struct WgradTap {
  int32_t r;
  int32_t s;
  int32_t c;

  static __device__ __forceinline__ WgradTap of(const WgradProblem& p, int32_t row) {
    const int32_t tap = row / p.channels;
    return {tap / p.kernel_w, tap % p.kernel_w, row % p.channels};
  }
};

template <typename T>
__device__ __forceinline__ T batch_norm_relu(T x, float mean, float scale, float beta) {
  const float y = fmaf(to_float(x) - mean, scale, beta);
  return from_float<T>(y < 0 ? 0 : y);  // keeps NaN
}

// Rows [first_row, first_row + rows) of R * S * C for tiles of kChannels, pixels from first_m on.
//
// The interface of the x operands: load(step) starts the copies of a step, in turn from 0 on;
// prepare(step), where prepares(), follows one step before the products, when copies and barrier
// are past; tile(step) is what the products read.
template <typename Math, int kChannels>
class TapOperand {
  using T = typename Math::Element;
  using Share = PixelShare<T, kChannels>;
  static constexpr int kVec = Share::kVec;

 public:
  // `shared`: kTileStages tiles, then the vectors of batch_norm_relu.
  __device__ __forceinline__ TapOperand(const WgradProblem& p, int32_t first_row, int32_t rows,
                                        int32_t first_m, char* shared)
      : p_(p),
        shared_(shared),
        row_(first_row + Share::channel()),
        row_end_(smaller(first_row + rows, p.kernel_h * p.kernel_w * p.channels)),
        whole_(has_whole_chunks<T>(p)),
        tap_(WgradTap::of(p, row_)),
        position_(PixelPosition::of(first_m + Share::row(), p.output_h, p.output_w)),
        step_(PixelPosition::of(Share::kRows, p.output_h, p.output_w)) {
    if (prepares() && Share::row() == 0 && row_ < row_end_) {
#pragma unroll
      for (int first = 0; first < kVec; first += 4) {
        Vector<float, 4> mean, scale, beta;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t c = tap_.c + first + e;
          mean.data[e] = load_global(p.mean + c);
          scale.data[e] = load_global(p.gamma + c) * load_global(p.rstd + c);
          beta.data[e] = load_global(p.beta + c);
        }
        store_shared<4>(vector(0, first), mean);
        store_shared<4>(vector(1, first), scale);
        store_shared<4>(vector(2, first), beta);
      }
    }
  }

  __device__ __forceinline__ bool prepares() const {
    return p_.prologue == WgradPrologue::kBatchNormRelu && whole_;
  }
  __device__ __forceinline__ char* tile(int32_t step) const {
    return shared_ + step % kTileStages * kTileBytes;
  }

  __device__ __forceinline__ void load(int32_t step) {
#pragma unroll
    for (int i = 0; i < Share::kPixels; ++i) {
      if (row_ < row_end_) {
        if (whole_) {
          copy_chunk(step, i);
        } else {
          copy_elements(step, i);
        }
      }
      position_.advance(step_, p_.output_h, p_.output_w);
    }
  }

  // batch_norm_relu of what the thread has copied itself. Padding and what lies behind the last
  // pixel stay zero.
  __device__ __forceinline__ void prepare(int32_t step) const {
    const uint32_t inside = inside_ >> flag(step, 0);
    float mean[kVec], scale[kVec], beta[kVec];
    load_vector(mean, 0);
    load_vector(scale, 1);
    load_vector(beta, 2);
#pragma unroll
    for (int i = 0; i < Share::kPixels; ++i) {
      if (!(inside >> i & 1)) continue;
      T* chunk = chunk_of(step, i);
      Vector<T, kVec> values = load_shared<kVec>(chunk);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        values.data[e] = batch_norm_relu(values.data[e], mean[e], scale[e], beta[e]);
      }
      store_shared<kVec>(chunk, values);
    }
  }

 private:
  static constexpr int kTileBytes = kChannels * kTileRowBytes;

  // The bit of inside_ that belongs to a copy.
  static __device__ __forceinline__ int flag(int32_t step, int i) {
    return step % kTileStages * Share::kPixels + i;
  }
  __device__ __forceinline__ T* chunk_of(int32_t step, int i) const {
    return reinterpret_cast<T*>(
        tile(step) +
        pixel_chunk_offset<Math>(kStepPixels<T>, Share::row() + i * Share::kRows, Share::chunk()));
  }

  // Four floats of vector i (mean, gamma * rstd, beta) for the thread's channels from `first` on,
  // a multiple of 4; those of all chunks lie side by side.
  __device__ __forceinline__ float* vector(int i, int first) const {
    return reinterpret_cast<float*>(shared_ + kTileStages * kTileBytes) +
           ((i * kVec + first) / 4 * Share::kChunks + Share::chunk()) * 4;
  }
  __device__ __forceinline__ void load_vector(float (&values)[kVec], int i) const {
#pragma unroll
    for (int first = 0; first < kVec; first += 4) {
      const Vector<float, 4> part = load_shared<4>(vector(i, first));
#pragma unroll
      for (int e = 0; e < 4; ++e) values[first + e] = part.data[e];
    }
  }

  // What a tap reads; nullptr in the padding and behind the last pixel.
  __device__ __forceinline__ const T* address(const WgradTap& tap) const {
    const int32_t h = position_.h * p_.stride_h - p_.padding_h + tap.r;
    const int32_t w = position_.w * p_.stride_w - p_.padding_w + tap.s;
    if (position_.n >= p_.batch || static_cast<uint32_t>(h) >= static_cast<uint32_t>(p_.input_h) ||
        static_cast<uint32_t>(w) >= static_cast<uint32_t>(p_.input_w)) {
      return nullptr;
    }
    const int32_t pixel = (position_.n * p_.input_h + h) * p_.input_w + w;
    return static_cast<const T*>(p_.x) + pixel * p_.x_stride + tap.c;
  }

  __device__ __forceinline__ void copy_chunk(int32_t step, int i) {
    const T* from = address(tap_);
    const uint32_t bit = 1u << flag(step, i);
    inside_ = from ? inside_ | bit : inside_ & ~bit;
    // Other taps, and so other lanes and steps, read most of these pixels again.
    copy_async<kChunkBytes, true>(chunk_of(step, i), from ? from : static_cast<const T*>(p_.x),
                                  from ? kChunkBytes : 0);
  }

  __device__ __forceinline__ void copy_elements(int32_t step, int i) const {
#pragma unroll 1
    for (int e = 0; e < kVec && row_ + e < row_end_; ++e) {
      const WgradTap tap = WgradTap::of(p_, row_ + e);
      const T* from = address(tap);
      T value = from_float<T>(0);
      if (from) value = load_global(from);
      if (from && p_.prologue == WgradPrologue::kBatchNormRelu) {
        const float scale = load_global(p_.gamma + tap.c) * load_global(p_.rstd + tap.c);
        value = batch_norm_relu(value, load_global(p_.mean + tap.c), scale,
                                load_global(p_.beta + tap.c));
      }
      store_shared(chunk_of(step, i) + e, value);
    }
  }

  const WgradProblem& p_;
  char* shared_;
  int32_t row_;
  int32_t row_end_;
  bool whole_;
  WgradTap tap_;
  PixelPosition position_;  // of the next pixel to copy
  PixelPosition step_;      // between two of the thread's pixels
  uint32_t inside_ = 0;     // which copies of the steps under way lie in the image
};

// Filters [first_k, first_k + filters) of dy for a tile of kChannels, pixels from first_m on.
template <typename Math, int kChannels>
class GradLoader {
  using T = typename Math::Element;
  using Share = PixelShare<T, kChannels>;
  static constexpr int kVec = Share::kVec;

 public:
  __device__ __forceinline__ GradLoader(const WgradProblem& p, int32_t first_k, int32_t filters,
                                        int32_t first_m)
      : p_(p),
        filters_(smaller(filters, p.filters - first_k) - Share::channel()),
        pixels_(p.batch * p.output_h * p.output_w - first_m - Share::row()),
        whole_(is_chunked<T>(p.dy, p.dy_stride)),
        from_(static_cast<const T*>(p.dy) + (first_m + Share::row()) * p.dy_stride + first_k +
              Share::channel()) {}

  // The next step into a tile.
  __device__ __forceinline__ void load(char* tile) {
#pragma unroll
    for (int i = 0; i < Share::kPixels; ++i) {
      char* to = tile + pixel_chunk_offset<Math>(kStepPixels<T>, Share::row() + i * Share::kRows,
                                                 Share::chunk());
      if (filters_ > 0) copy(to);
      pixels_ -= Share::kRows;
      from_ += Share::kRows * p_.dy_stride;
    }
  }

 private:
  __device__ __forceinline__ void copy(char* to) const {
    const bool inside = pixels_ > 0;
    const T* from = inside ? from_ : static_cast<const T*>(p_.dy);
    const int32_t elements = smaller(kVec, filters_);
    if (whole_) {
      copy_async<kChunkBytes>(to, from, inside ? elements * static_cast<int>(sizeof(T)) : 0);
      return;
    }
#pragma unroll 1
    for (int e = 0; e < elements; ++e) {
      const T value = inside ? load_global(from + e) : from_float<T>(0);
      store_shared(reinterpret_cast<T*>(to) + e, value);
    }
  }

  const WgradProblem& p_;
  int32_t filters_;  // that are left from this thread's first on
  int32_t pixels_;   // likewise, from the next to copy on
  bool whole_;
  const T* from_;
};

}  // namespace inception_ext::kernels
