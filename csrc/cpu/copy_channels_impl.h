// Copies and image conversion, per ISA: part of kernels_impl.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "copy_channels.h"
#include "parallel.h"
#include "simd.h"
#include "slices.h"

namespace inception_ext::cpu::INCEPTION_EXT_ISA {

// ---- copy_channels ------------------------------------------------------------------------------

INCEPTION_EXT_INLINE int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 ? 2 : 1;
}

// A memcpy that does not call for short rows: whole vectors, the last one overlapping.
INCEPTION_EXT_INLINE void copy_row(uint8_t* to, const uint8_t* from, int64_t bytes) {
  constexpr int64_t kStep = sizeof(vfloat);
  if (bytes < kStep || bytes > 4096) {
    __builtin_memcpy(to, from, (std::size_t)bytes);
    return;
  }
  const vfloat last = load_bytes_as<vfloat>(from + bytes - kStep);
  for (int64_t i = 0; i + kStep < bytes; i += kStep) {
    const vfloat v = load_bytes_as<vfloat>(from + i);
    __builtin_memcpy(to + i, &v, sizeof v);
  }
  __builtin_memcpy(to + bytes - kStep, &last, sizeof last);
}

inline void copy_pixels(const CopyChannelsParams& params, int64_t begin, int64_t end) {
  const int64_t size = element_size(params.dtype);
  const int64_t bytes = params.channels * size;
  const int64_t from_step = params.x_stride * size;
  const int64_t to_step = params.y_stride * size;
  const uint8_t* from = static_cast<const uint8_t*>(params.x) + begin * from_step;
  uint8_t* to = static_cast<uint8_t*>(params.y) + begin * to_step;
  if (from_step == bytes && to_step == bytes) {
    __builtin_memcpy(to, from, (std::size_t)((end - begin) * bytes));
    return;
  }
  for (int64_t pixel = begin; pixel < end; ++pixel, from += from_step, to += to_step) {
    copy_row(to, from, bytes);
  }
}

inline void copy_channels(const CopyChannelsParams& params) {
  if (params.channels <= 0) return;
  parallel_for(params.parallel, 0, params.pixels, pixel_grain(params.channels),
               [&](int64_t begin, int64_t end) { copy_pixels(params, begin, end); });
}

// ---- relu_channels ------------------------------------------------------------------------------

template <typename T>
struct ReluOp {
  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t pixel, int64_t c, Lanes lanes) const {
    INCEPTION_EXT_UNROLL
    for (int row = 0; row < kRowCount; ++row) {
      y.store(pixel + row, c, lanes, relu(x.load(pixel + row, c, lanes)));
    }
  }

  Source<T> x;
  Target<T> y;
};

template <typename T>
void relu_pixels(const CopyChannelsParams& params) {
  const ReluOp<T> op = {Source<T>(params.x, params.x_stride, params.channels, kAhead),
                        Target<T>(params.y, params.y_stride)};
  parallel_for(
      params.parallel, 0, params.pixels, pixel_grain(params.channels),
      [&](int64_t begin, int64_t end) { for_each_pixel(op, begin, end, params.channels); });
}

inline void relu_channels(const CopyChannelsParams& params) {
  if (params.channels <= 0) return;
  if (params.dtype == DType::kBFloat16) {
    relu_pixels<bf16>(params);
  } else {
    relu_pixels<float>(params);
  }
}

// ---- image_to_nhwc ------------------------------------------------------------------------------

// Columns of one channel that are converted before they are spread over the pixels.
constexpr int64_t kColumns = 64;

// x[0, count) of one channel, x_stride apart -> y[0, count), y_stride apart.
template <typename From, typename To>
INCEPTION_EXT_INLINE void convert_columns(const From* x, int64_t x_stride, To* y, int64_t y_stride,
                                          int64_t count, float scale, float shift) {
  alignas(64) From gathered[kColumns];
  alignas(64) To columns[kColumns];
  if (x_stride != 1 || count < kColumns) {
    for (int64_t i = 0; i < count; ++i) gathered[i] = x[i * x_stride];
    for (int64_t i = count; i < kColumns; ++i) gathered[i] = From{};
    x = gathered;
  }
  const AllLanes all;
  const vfloat scales = broadcast(scale);
  const vfloat shifts = broadcast(shift);
  for (int64_t i = 0; i < count; i += kLanes) {
    all.store(columns + i, all.load(x + i) * scales + shifts);
  }
  for (int64_t i = 0; i < count; ++i) y[i * y_stride] = columns[i];
}

// Rows [begin, end) of n * h + ih.
template <typename From, typename To>
void convert_rows(const ImageToNhwcParams& params, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const From* x = static_cast<const From*>(params.x) + row / params.h * params.x_stride_n +
                    row % params.h * params.x_stride_h;
    To* y = static_cast<To*>(params.y) + row * params.w * params.y_stride;
    for (int64_t w = 0; w < params.w; w += kColumns) {
      const int64_t count = smaller(kColumns, params.w - w);
      for (int64_t c = 0; c < params.c; ++c) {
        convert_columns(x + w * params.x_stride_w + c * params.x_stride_c, params.x_stride_w,
                        y + w * params.y_stride + c, params.y_stride, count,
                        params.scale == nullptr ? 1.0f : params.scale[c],
                        params.shift == nullptr ? 0.0f : params.shift[c]);
      }
    }
  }
}

template <typename From>
void convert_rows(const ImageToNhwcParams& params, int64_t begin, int64_t end) {
  if (params.y_dtype == DType::kBFloat16) {
    convert_rows<From, bf16>(params, begin, end);
  } else {
    convert_rows<From, float>(params, begin, end);
  }
}

inline void image_to_nhwc(const ImageToNhwcParams& params) {
  if (params.n <= 0 || params.c <= 0 || params.h <= 0 || params.w <= 0) return;
  const int64_t grain = larger(1, pixel_grain(params.c) / params.w);
  parallel_for(params.parallel, 0, params.n * params.h, grain, [&](int64_t begin, int64_t end) {
    switch (params.x_dtype) {
      case DType::kFloat32:
        return convert_rows<float>(params, begin, end);
      case DType::kBFloat16:
        return convert_rows<bf16>(params, begin, end);
      case DType::kUInt8:
        return convert_rows<uint8_t>(params, begin, end);
    }
  });
}

}  // namespace inception_ext::cpu::INCEPTION_EXT_ISA
