// Max pooling, per ISA: part of kernels_impl.h. The rules are in max_pool.h.
#pragma once

#include <cstdint>

#include "max_pool.h"
#include "parallel.h"
#include "simd.h"
#include "slices.h"

namespace inception_ext::cpu::INCEPTION_EXT_ISA {

constexpr int kMaxTaps = 255;

INCEPTION_EXT_INLINE int64_t clamp(int64_t value, int64_t size) {
  return value < 0 ? 0 : value < size ? value : size - 1;
}

// Rows of `row_pixels` pixels that make a part worth a thread.
INCEPTION_EXT_INLINE int64_t row_grain(int64_t row_pixels, int64_t channels) {
  return larger(1, pixel_grain(channels) / 4 / row_pixels);
}

// What of a window lies inside the input, along one axis: positions [begin, end).
struct Span {
  INCEPTION_EXT_INLINE Span(int64_t origin, int64_t kernel, int64_t size)
      : begin(larger(0, origin)), end(smaller(origin + kernel, size)) {}

  int64_t begin;
  int64_t end;
};

// ---- forward without argmax ---------------------------------------------------------------------
//
// Separable: first the maximum over the rows of the windows, for a strip of input columns and
// channels that stays in the cache (on the stack, 64 KiB), then over the columns.

constexpr int64_t kStripFloats = 16384;

// strip[column][c] = max over kRowCount input rows (0: over `rows`), row_stride apart.
template <typename T, int kFixedRows>
struct MaxOfRows {
  const T* x;  // first row and column of the strip
  int64_t x_stride;
  int64_t row_stride;
  int64_t rows;
  float* strip;
  int64_t strip_stride;

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t column, int64_t c, Lanes lanes) const {
    const int64_t count = kFixedRows > 0 ? kFixedRows : rows;
    const T* from = x + column * x_stride + c;
    // The other rows were read for the windows above.
    prefetch(from + (count - 1) * row_stride, kAhead);
    vfloat best = lanes.load(from);
    INCEPTION_EXT_UNROLL
    for (int64_t row = 1; row < count; ++row) {
      best = max_or_nan(best, lanes.load(from + row * row_stride));
    }
    AllLanes{}.store(strip + column * strip_stride + c, best);
  }
};

// y[c] = max over kFixedColumns columns of the strip (0: over `columns`).
template <typename T, int kFixedColumns>
struct MaxOfColumns {
  const float* strip;  // first column
  int64_t strip_stride;
  int64_t columns;
  T* y;

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t, int64_t c, Lanes lanes) const {
    const AllLanes all;
    const int64_t count = kFixedColumns > 0 ? kFixedColumns : columns;
    vfloat best = all.load(strip + c);
    INCEPTION_EXT_UNROLL
    for (int64_t column = 1; column < count; ++column) {
      best = max_or_nan(best, all.load(strip + column * strip_stride + c));
    }
    prefetch(y + c, kAhead);
    lanes.store_exact(y + c, best);
  }
};

template <typename T, int kFixedRows>
INCEPTION_EXT_INLINE void max_of_rows(const MaxOfRows<T, 0>& op, int64_t columns,
                                      int64_t channels) {
  const MaxOfRows<T, kFixedRows> fixed{op.x,    op.x_stride, op.row_stride,
                                       op.rows, op.strip,    op.strip_stride};
  for (int64_t column = 0; column < columns; ++column) {
    for_each_vector<1>(fixed, column, channels);
  }
}

template <typename T>
void pool_rows_values(const MaxPoolForwardParams& params, int64_t begin, int64_t end) {
  const MaxPoolShape& s = params.shape;
  const T* x = static_cast<const T*>(params.x);
  T* y = static_cast<T*>(params.y);
  alignas(64) float strip[kStripFloats];
  // Channels at a time, in whole vectors of any ISA, and output columns at a time.
  const int64_t all_channels = (s.c + 15) / 16 * 16;
  const int64_t width = larger(16, smaller(all_channels, kStripFloats / s.w / 16 * 16));
  const int64_t columns = larger(1, (kStripFloats / width - s.kernel_w) / s.stride_w + 1);
  for (int64_t row = begin; row < end; ++row) {
    const Span ih(row % s.out_h * s.stride_h - s.padding_h, s.kernel_h, s.h);
    const int64_t first_row = row / s.out_h * s.h + ih.begin;
    for (int64_t c = 0; c < s.c; c += width) {
      const int64_t channels = smaller(width, s.c - c);
      for (int64_t ow_begin = 0; ow_begin < s.out_w; ow_begin += columns) {
        const int64_t ow_end = smaller(ow_begin + columns, s.out_w);
        const int64_t iw_begin = larger(0, ow_begin * s.stride_w - s.padding_w);
        const int64_t iw_end = smaller((ow_end - 1) * s.stride_w - s.padding_w + s.kernel_w, s.w);
        const MaxOfRows<T, 0> op{x + (first_row * s.w + iw_begin) * params.x_stride + c,
                                 params.x_stride,
                                 s.w * params.x_stride,
                                 ih.end - ih.begin,
                                 strip,
                                 width};
        switch (op.rows) {
          case 2:
            max_of_rows<T, 2>(op, iw_end - iw_begin, channels);
            break;
          case 3:
            max_of_rows<T, 3>(op, iw_end - iw_begin, channels);
            break;
          default:
            max_of_rows<T, 0>(op, iw_end - iw_begin, channels);
        }
        for (int64_t ow = ow_begin; ow < ow_end; ++ow) {
          const Span iw(ow * s.stride_w - s.padding_w, s.kernel_w, s.w);
          const float* from = strip + (iw.begin - iw_begin) * width;
          const int64_t count = iw.end - iw.begin;
          T* to = y + (row * s.out_w + ow) * params.y_stride + c;
          if (count == 3) {
            for_each_vector<1>(MaxOfColumns<T, 3>{from, width, count, to}, 0, channels);
          } else {
            for_each_vector<1>(MaxOfColumns<T, 0>{from, width, count, to}, 0, channels);
          }
        }
      }
    }
  }
}

// ---- forward with argmax ------------------------------------------------------------------------

// A window of kKernelH * kKernelW taps. Taps outside the input are replaced by their nearest
// neighbour inside, which is in the window as well: it changes no maximum, and every window has
// the same number of taps. Rows and columns, and so the indices, ascend.
template <typename T, int kKernelH, int kKernelW>
struct PoolFixedWindow {
  static constexpr int kTaps = kKernelH * kKernelW;

  const T* rows[kKernelH];    // channel 0 of column 0
  int64_t columns[kKernelW];  // elements from there
  vint indices[kTaps];        // kh * kernel_w + kw of the tap that was taken
  T* y;                       // [C]
  uint8_t* argmax;            // [C]

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t, int64_t c, Lanes lanes) const {
    vfloat v[kTaps];
    INCEPTION_EXT_UNROLL
    for (int kh = 0; kh < kKernelH; ++kh) {
      const T* row = rows[kh] + c;
      INCEPTION_EXT_UNROLL
      for (int kw = 0; kw < kKernelW; ++kw) v[kh * kKernelW + kw] = lanes.load(row + columns[kw]);
    }
    prefetch(rows[kKernelH - 1] + columns[kKernelW - 1] + c, kAhead);
    vmask nan = unordered(v[0], v[kTaps - 1]);
    INCEPTION_EXT_UNROLL
    for (int i = 1; i + 1 < kTaps; i += 2) nan = either(nan, unordered(v[i], v[i + 1]));
    vfloat best = v[0];
    vint index = indices[0];
    if (__builtin_expect(any(nan), 0)) {
      for (int i = 1; i < kTaps; ++i) {
        const vmask wins = either(greater(v[i], best), unordered(v[i], v[i]));
        best = select(wins, v[i], best);
        index = select(wins, indices[i], index);
      }
    } else {
      INCEPTION_EXT_UNROLL
      for (int i = 1; i < kTaps; ++i) {
        index = select(greater(v[i], best), indices[i], index);
        best = max(best, v[i]);
      }
    }
    prefetch(y + c, kAhead);
    lanes.store_exact(y + c, best);
    lanes.store_bytes(argmax + c, index);
  }
};

template <typename T, int kKernelH, int kKernelW>
void pool_rows_fixed(const MaxPoolForwardParams& params, int64_t begin, int64_t end) {
  const MaxPoolShape& s = params.shape;
  PoolFixedWindow<T, kKernelH, kKernelW> op;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t ih_origin = row % s.out_h * s.stride_h - s.padding_h;
    int64_t taken_kh[kKernelH];
    for (int kh = 0; kh < kKernelH; ++kh) {
      const int64_t ih = clamp(ih_origin + kh, s.h);
      taken_kh[kh] = ih - ih_origin;
      op.rows[kh] =
          static_cast<const T*>(params.x) + (row / s.out_h * s.h + ih) * s.w * params.x_stride;
    }
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      const int64_t iw_origin = ow * s.stride_w - s.padding_w;
      for (int kw = 0; kw < kKernelW; ++kw) {
        const int64_t iw = clamp(iw_origin + kw, s.w);
        op.columns[kw] = iw * params.x_stride;
        for (int kh = 0; kh < kKernelH; ++kh) {
          op.indices[kh * kKernelW + kw] =
              broadcast_int((int32_t)(taken_kh[kh] * kKernelW + iw - iw_origin));
        }
      }
      const int64_t pixel = row * s.out_w + ow;
      op.y = static_cast<T*>(params.y) + pixel * params.y_stride;
      op.argmax = params.argmax + pixel * s.c;
      for_each_vector<1>(op, 0, s.c);
    }
  }
}

// Any window, one tap after the other.
template <typename T>
struct PoolAnyWindow {
  const T* const* taps;    // [count] channel 0 of a pixel, in row-major order
  const int32_t* indices;  // [count] its kh * kernel_w + kw
  int count;
  T* y;             // [C]
  uint8_t* argmax;  // [C]

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t, int64_t c, Lanes lanes) const {
    vfloat best = lanes.load(taps[0] + c);
    vint index = broadcast_int(indices[0]);
    for (int i = 1; i < count; ++i) {
      const vfloat v = lanes.load(taps[i] + c);
      const vmask wins = either(greater(v, best), unordered(v, v));
      best = select(wins, v, best);
      index = select(wins, broadcast_int(indices[i]), index);
    }
    prefetch(y + c, kAhead);
    lanes.store_exact(y + c, best);
    lanes.store_bytes(argmax + c, index);
  }
};

template <typename T>
void pool_rows_any(const MaxPoolForwardParams& params, int64_t begin, int64_t end) {
  const MaxPoolShape& s = params.shape;
  const T* taps[kMaxTaps];
  int32_t indices[kMaxTaps];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t ih_origin = row % s.out_h * s.stride_h - s.padding_h;
    const int64_t image_row = row / s.out_h * s.h;
    const Span ih(ih_origin, s.kernel_h, s.h);
    for (int64_t ow = 0; ow < s.out_w; ++ow) {
      const int64_t iw_origin = ow * s.stride_w - s.padding_w;
      const Span iw(iw_origin, s.kernel_w, s.w);
      int count = 0;
      for (int64_t h = ih.begin; h < ih.end; ++h) {
        for (int64_t w = iw.begin; w < iw.end; ++w) {
          taps[count] =
              static_cast<const T*>(params.x) + ((image_row + h) * s.w + w) * params.x_stride;
          indices[count] = (int32_t)((h - ih_origin) * s.kernel_w + w - iw_origin);
          ++count;
        }
      }
      const int64_t pixel = row * s.out_w + ow;
      T* y = static_cast<T*>(params.y) + pixel * params.y_stride;
      for_each_vector<1>(PoolAnyWindow<T>{taps, indices, count, y, params.argmax + pixel * s.c}, 0,
                         s.c);
    }
  }
}

// ---- forward ------------------------------------------------------------------------------------

template <typename T>
void pool_rows(const MaxPoolForwardParams& params, int64_t begin, int64_t end) {
  const int64_t kernel_h = params.shape.kernel_h;
  const int64_t kernel_w = params.shape.kernel_w;
  if (params.argmax == nullptr) return pool_rows_values<T>(params, begin, end);
  if (kernel_h == 3 && kernel_w == 3) return pool_rows_fixed<T, 3, 3>(params, begin, end);
  if (kernel_h == 2 && kernel_w == 2) return pool_rows_fixed<T, 2, 2>(params, begin, end);
  pool_rows_any<T>(params, begin, end);
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

// The windows [first, last) along one axis that cover an input position.
struct Cover {
  int64_t first;
  int64_t last;

  // From the cover of one position to that of the next.
  INCEPTION_EXT_INLINE void advance(int64_t i, int64_t kernel, int64_t stride, int64_t padding,
                                    int64_t windows) {
    while (last < windows && last * stride - padding <= i) ++last;
    while (first < last && first * stride - padding + kernel <= i) ++first;
  }
};

INCEPTION_EXT_INLINE Cover cover_of(int64_t i, int64_t kernel, int64_t stride, int64_t padding,
                                    int64_t windows) {
  const int64_t last = smaller((i + padding) / stride + 1, windows);
  const int64_t first = i + padding < kernel ? 0 : (i + padding - kernel) / stride + 1;
  return {smaller(first, last), last};
}

// The windows that cover one input pixel: rows x columns of output pixels around `dy` and
// `argmax`, the first of them. Its index falls by index_step_h from one window to the one below,
// and by index_step_w to the one on the right.
template <typename T>
struct PixelCover {
  const T* dy;
  int64_t dy_row;    // elements
  int64_t dy_pixel;  // elements
  const uint8_t* argmax;
  int64_t argmax_row;
  int64_t argmax_pixel;
  int64_t rows;
  int64_t columns;
  int64_t index;
  int64_t index_step_h;
  int64_t index_step_w;
  T* dx;
};

template <typename T, int kFixedRows, int kFixedColumns, bool kAccumulate>
struct GatherGradient {
  PixelCover<T> cover;

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t, int64_t c, Lanes lanes) const {
    const int64_t rows = kFixedRows > 0 ? kFixedRows : cover.rows;
    const int64_t columns = kFixedColumns > 0 ? kFixedColumns : cover.columns;
    vfloat sum{};
    INCEPTION_EXT_UNROLL
    for (int64_t row = 0; row < rows; ++row) {
      const T* dy = cover.dy + row * cover.dy_row + c;
      const uint8_t* argmax = cover.argmax + row * cover.argmax_row + c;
      const int64_t index = cover.index - row * cover.index_step_h;
      INCEPTION_EXT_UNROLL
      for (int64_t column = 0; column < columns; ++column) {
        const vmask mine = lanes.bytes_equal(argmax + column * cover.argmax_pixel,
                                             (uint8_t)(index - column * cover.index_step_w));
        sum = add_where(mine, sum, lanes.load(dy + column * cover.dy_pixel));
      }
    }
    if (rows > 0) {
      const int64_t last = (rows - 1) * cover.dy_row + (columns - 1) * cover.dy_pixel + c;
      prefetch(cover.dy + last, kAhead);
    }
    if (kAccumulate) sum += lanes.load(cover.dx + c);
    prefetch(cover.dx + c, kAhead);
    lanes.store(cover.dx + c, sum);
  }
};

template <typename T, bool kAccumulate>
INCEPTION_EXT_INLINE void gather_gradient(const PixelCover<T>& cover, int64_t channels) {
  const int64_t shape = cover.rows * 16 + cover.columns;
  if (shape == 0x33) {
    for_each_vector<1>(GatherGradient<T, 3, 3, kAccumulate>{cover}, 0, channels);
  } else if (shape == 0x22) {
    for_each_vector<1>(GatherGradient<T, 2, 2, kAccumulate>{cover}, 0, channels);
  } else if (shape == 0x11) {
    for_each_vector<1>(GatherGradient<T, 1, 1, kAccumulate>{cover}, 0, channels);
  } else {
    for_each_vector<1>(GatherGradient<T, 0, 0, kAccumulate>{cover}, 0, channels);
  }
}

// Input rows [begin, end) of n * h + ih.
template <typename T, bool kAccumulate>
void gather_rows(const MaxPoolBackwardParams& params, int64_t begin, int64_t end) {
  const MaxPoolShape& s = params.shape;
  PixelCover<T> cover;
  cover.dy_row = s.out_w * params.dy_stride;
  cover.dy_pixel = params.dy_stride;
  cover.argmax_row = s.out_w * s.c;
  cover.argmax_pixel = s.c;
  cover.index_step_h = s.stride_h * s.kernel_w;
  cover.index_step_w = s.stride_w;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t ih = row % s.h;
    const Cover oh = cover_of(ih, s.kernel_h, s.stride_h, s.padding_h, s.out_h);
    Cover ow = {0, 0};
    cover.rows = oh.last - oh.first;
    const int64_t kh = ih + s.padding_h - oh.first * s.stride_h;
    const int64_t first_pixel = (row / s.h * s.out_h + oh.first) * s.out_w;
    for (int64_t iw = 0; iw < s.w; ++iw) {
      ow.advance(iw, s.kernel_w, s.stride_w, s.padding_w, s.out_w);
      cover.columns = ow.last - ow.first;
      cover.index = kh * s.kernel_w + iw + s.padding_w - ow.first * s.stride_w;
      cover.dy = static_cast<const T*>(params.dy) + (first_pixel + ow.first) * params.dy_stride;
      cover.argmax = params.argmax + (first_pixel + ow.first) * s.c;
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
