// Max pooling, per ISA: part of kernels_impl.h. The rules are in max_pool.h.
#pragma once

#include <cstdint>

#include "max_pool.h"
#include "parallel.h"
#include "simd.h"

namespace inception_ext::cpu::INCEPTION_EXT_ISA {

constexpr int kMaxTaps = 255;

// ---- forward ------------------------------------------------------------------------------------

// The elements of one window: taps[i] points to channel 0 of a pixel, indices[i] is its
// kh * kernel_w + kw. Both ascend in row-major order.
template <typename T, int kCapacity>
struct Window {
  const T* taps[kCapacity];
  int32_t indices[kCapacity];
  int count;
  T* y;             // [C]
  uint8_t* argmax;  // [C], may be nullptr
};

// Any window: torch's rule, one tap after the other.
template <typename T, int kCapacity, typename Lanes>
INCEPTION_EXT_INLINE void pool_in_order(const Window<T, kCapacity>& window, int64_t c,
                                        Lanes lanes) {
  vfloat best = lanes.load(window.taps[0] + c);
  vint index = broadcast_int(window.indices[0]);
  for (int i = 1; i < window.count; ++i) {
    const vfloat v = lanes.load(window.taps[i] + c);
    const vmask wins = either(greater(v, best), unordered(v, v));
    best = select(wins, v, best);
    index = select(wins, broadcast_int(window.indices[i]), index);
  }
  lanes.store_exact(window.y + c, best);
  if (window.argmax != nullptr) lanes.store_bytes(window.argmax + c, index);
}

template <typename T>
struct PoolAny {
  const Window<T, kMaxTaps>& window;

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t, int64_t c, Lanes lanes) const {
    pool_in_order(window, c, lanes);
  }
};

// A known number of taps, unrolled: the maximum first, then the first tap that equals it. Taps may
// repeat.
template <typename T, int kTaps, bool kArgmax>
struct PoolUnrolled {
  const Window<T, kTaps>& window;

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t, int64_t c, Lanes lanes) const {
    vfloat v[kTaps];
    for (int i = 0; i < kTaps; ++i) v[i] = lanes.load(window.taps[i] + c);
    if (!kArgmax) {
      vfloat best = v[0];
      for (int i = 1; i < kTaps; ++i) best = max_or_nan(best, v[i]);
      lanes.store_exact(window.y + c, best);
      return;
    }
    vmask nan = unordered(v[0], v[kTaps - 1]);
    for (int i = 1; i + 1 < kTaps; i += 2) nan = either(nan, unordered(v[i], v[i + 1]));
    if (__builtin_expect(any(nan), 0)) {
      pool_in_order(window, c, lanes);
      return;
    }
    vfloat best = v[0];
    for (int i = 1; i < kTaps; ++i) best = max(best, v[i]);
    vint index = broadcast_int(window.indices[kTaps - 1]);
    for (int i = kTaps - 2; i >= 0; --i) {
      index = select(equal(v[i], best), broadcast_int(window.indices[i]), index);
    }
    lanes.store_exact(window.y + c, best);
    lanes.store_bytes(window.argmax + c, index);
  }
};

// Where window (oh, ow) of output row `row` = n * out_h + oh starts.
struct WindowOrigin {
  INCEPTION_EXT_INLINE WindowOrigin(const MaxPoolShape& s, int64_t row, int64_t ow)
      : image_row(row / s.out_h * s.h),
        ih(row % s.out_h * s.stride_h - s.padding_h),
        iw(ow * s.stride_w - s.padding_w) {}

  int64_t image_row;  // n * h
  int64_t ih;
  int64_t iw;
};

INCEPTION_EXT_INLINE int64_t clamp(int64_t value, int64_t size) {
  return value < 0 ? 0 : value < size ? value : size - 1;
}

// Taps outside the input are replaced by their nearest neighbour inside, which is in the window as
// well: it changes no maximum, and every window has the same number of taps.
template <typename T, int kKernelH, int kKernelW, bool kArgmax>
void pool_rows_unrolled(const MaxPoolForwardParams& params, int64_t begin, int64_t end) {
  constexpr int kTaps = kKernelH * kKernelW;
  const MaxPoolShape& s = params.shape;
  const T* x = static_cast<const T*>(params.x);
  Window<T, kTaps> window;
  window.count = kTaps;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      const WindowOrigin origin(s, row, ow);
      for (int kh = 0; kh < kKernelH; ++kh) {
        const int64_t ih = clamp(origin.ih + kh, s.h);
        for (int kw = 0; kw < kKernelW; ++kw) {
          const int64_t iw = clamp(origin.iw + kw, s.w);
          const int tap = kh * kKernelW + kw;
          window.taps[tap] = x + ((origin.image_row + ih) * s.w + iw) * params.x_stride;
          window.indices[tap] = (int32_t)((ih - origin.ih) * kKernelW + (iw - origin.iw));
        }
      }
      const int64_t pixel = row * s.out_w + ow;
      window.y = static_cast<T*>(params.y) + pixel * params.y_stride;
      window.argmax = kArgmax ? params.argmax + pixel * s.c : nullptr;
      for_each_vector<1>(PoolUnrolled<T, kTaps, kArgmax>{window}, pixel, s.c);
    }
  }
}

template <typename T>
void pool_rows_any(const MaxPoolForwardParams& params, int64_t begin, int64_t end) {
  const MaxPoolShape& s = params.shape;
  const T* x = static_cast<const T*>(params.x);
  Window<T, kMaxTaps> window;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      const WindowOrigin origin(s, row, ow);
      window.count = 0;
      for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
        const int64_t ih = origin.ih + kh;
        if (ih < 0 || ih >= s.h) continue;
        for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
          const int64_t iw = origin.iw + kw;
          if (iw < 0 || iw >= s.w) continue;
          window.taps[window.count] = x + ((origin.image_row + ih) * s.w + iw) * params.x_stride;
          window.indices[window.count] = (int32_t)(kh * s.kernel_w + kw);
          ++window.count;
        }
      }
      const int64_t pixel = row * s.out_w + ow;
      window.y = static_cast<T*>(params.y) + pixel * params.y_stride;
      window.argmax = params.argmax == nullptr ? nullptr : params.argmax + pixel * s.c;
      for_each_vector<1>(PoolAny<T>{window}, pixel, s.c);
    }
  }
}

template <typename T>
void pool_rows(const MaxPoolForwardParams& params, int64_t begin, int64_t end) {
  const int64_t kernel_h = params.shape.kernel_h;
  const int64_t kernel_w = params.shape.kernel_w;
  const bool argmax = params.argmax != nullptr;
  if (kernel_h == 3 && kernel_w == 3) {
    return argmax ? pool_rows_unrolled<T, 3, 3, true>(params, begin, end)
                  : pool_rows_unrolled<T, 3, 3, false>(params, begin, end);
  }
  if (kernel_h == 2 && kernel_w == 2) {
    return argmax ? pool_rows_unrolled<T, 2, 2, true>(params, begin, end)
                  : pool_rows_unrolled<T, 2, 2, false>(params, begin, end);
  }
  pool_rows_any<T>(params, begin, end);
}

// Rows of `row_pixels` pixels that make a part worth a thread.
INCEPTION_EXT_INLINE int64_t row_grain(int64_t row_pixels, int64_t channels) {
  return larger(1, pixel_grain(channels) / 4 / row_pixels);
}

inline void max_pool_forward(const MaxPoolForwardParams& params) {
  const MaxPoolShape& s = params.shape;
  if (s.n <= 0 || s.c <= 0 || s.out_h <= 0 || s.out_w <= 0) return;
  parallel_for(params.parallel, 0, s.n * s.out_h, row_grain(s.out_w, s.c),
               [&](int64_t begin, int64_t end) {
                 if (params.dtype == DType::kBFloat16) {
                   pool_rows<bf16>(params, begin, end);
                 } else {
                   pool_rows<float>(params, begin, end);
                 }
               });
}

// ---- backward -----------------------------------------------------------------------------------

// The windows that cover one input pixel, in row-major order.
template <typename T>
struct Cover {
  const T* dy[kMaxTaps];            // [C] of the window's output pixel
  const uint8_t* argmax[kMaxTaps];  // [C] likewise
  uint8_t index[kMaxTaps];          // of this input pixel in the window
  int count;
  T* dx;  // [C]
};

template <typename T, int kCount, bool kAccumulate>
struct GatherGradient {
  const Cover<T>& cover;

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t, int64_t c, Lanes lanes) const {
    const int count = kCount > 0 ? kCount : cover.count;
    vfloat sum{};
    for (int i = 0; i < count; ++i) {
      const vmask mine = lanes.bytes_equal(cover.argmax[i] + c, cover.index[i]);
      sum += value_or_zero(mine, lanes.load(cover.dy[i] + c));
    }
    if (kAccumulate) sum += lanes.load(cover.dx + c);
    lanes.store(cover.dx + c, sum);
  }
};

template <typename T, bool kAccumulate>
INCEPTION_EXT_INLINE void gather_gradient(const Cover<T>& cover, int64_t channels) {
  switch (cover.count) {
    case 1:
      return for_each_vector<1>(GatherGradient<T, 1, kAccumulate>{cover}, 0, channels);
    case 2:
      return for_each_vector<1>(GatherGradient<T, 2, kAccumulate>{cover}, 0, channels);
    case 4:
      return for_each_vector<1>(GatherGradient<T, 4, kAccumulate>{cover}, 0, channels);
    case 6:
      return for_each_vector<1>(GatherGradient<T, 6, kAccumulate>{cover}, 0, channels);
    case 9:
      return for_each_vector<1>(GatherGradient<T, 9, kAccumulate>{cover}, 0, channels);
    default:
      return for_each_vector<1>(GatherGradient<T, 0, kAccumulate>{cover}, 0, channels);
  }
}

// The windows [first, last) along one axis that cover input position `i`.
struct WindowRange {
  INCEPTION_EXT_INLINE WindowRange(int64_t i, int64_t kernel, int64_t stride, int64_t padding,
                                   int64_t windows)
      : first(i + padding < kernel ? 0 : (i + padding - kernel) / stride + 1),
        last(smaller((i + padding) / stride + 1, windows)) {}

  int64_t first;
  int64_t last;
};

// Input rows [begin, end) of n * h + ih.
template <typename T, bool kAccumulate>
void gather_rows(const MaxPoolBackwardParams& params, int64_t begin, int64_t end) {
  const MaxPoolShape& s = params.shape;
  Cover<T> cover;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t ih = row % s.h;
    const int64_t first_output_row = row / s.h * s.out_h;
    const WindowRange rows(ih, s.kernel_h, s.stride_h, s.padding_h, s.out_h);
    for (int64_t iw = 0; iw < s.w; ++iw) {
      const WindowRange columns(iw, s.kernel_w, s.stride_w, s.padding_w, s.out_w);
      cover.count = 0;
      for (int64_t oh = rows.first; oh < rows.last; ++oh) {
        const int64_t kh = ih + s.padding_h - oh * s.stride_h;
        for (int64_t ow = columns.first; ow < columns.last; ++ow) {
          const int64_t kw = iw + s.padding_w - ow * s.stride_w;
          const int64_t pixel = (first_output_row + oh) * s.out_w + ow;
          cover.dy[cover.count] = static_cast<const T*>(params.dy) + pixel * params.dy_stride;
          cover.argmax[cover.count] = params.argmax + pixel * s.c;
          cover.index[cover.count] = (uint8_t)(kh * s.kernel_w + kw);
          ++cover.count;
        }
      }
      cover.dx = static_cast<T*>(params.dx) + (row * s.w + iw) * params.dx_stride;
      gather_gradient<T, kAccumulate>(cover, s.c);
    }
  }
}

template <typename T>
void gather_rows(const MaxPoolBackwardParams& params, int64_t begin, int64_t end) {
  if (params.accumulate) {
    gather_rows<T, true>(params, begin, end);
  } else {
    gather_rows<T, false>(params, begin, end);
  }
}

inline void max_pool_backward(const MaxPoolBackwardParams& params) {
  const MaxPoolShape& s = params.shape;
  if (s.n <= 0 || s.c <= 0 || s.h <= 0 || s.w <= 0) return;
  parallel_for(params.parallel, 0, s.n * s.h, row_grain(s.w, s.c), [&](int64_t begin, int64_t end) {
    if (params.dtype == DType::kBFloat16) {
      gather_rows<bf16>(params, begin, end);
    } else {
      gather_rows<float>(params, begin, end);
    }
  });
}

}  // namespace inception_ext::cpu::INCEPTION_EXT_ISA
