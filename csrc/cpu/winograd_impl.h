// Winograd's transforms, per ISA: part of kernels_impl.h.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "simd.h"
#include "slices.h"
#include "winograd.h"

namespace inception_ext::cpu::INCEPTION_EXT_ISA {

constexpr int kTile = kWinogradTile;
constexpr int kPoints = kTile + 2;
constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kSqrtTwo = 1.41421356237309505f;

// B^T x, with points 0, +-sqrt(1/2), +-sqrt(2), infinity.
INCEPTION_EXT_INLINE void transform_input(const vfloat x[kPoints], vfloat out[kPoints]) {
  const vfloat half = broadcast(0.5f), two = broadcast(2.0f), minus = broadcast(-2.5f);
  const vfloat a = broadcast(kSqrtHalf), b = broadcast(kSqrtTwo);
  out[0] = fma(minus, x[2], x[0] + x[4]);
  out[5] = fma(minus, x[3], x[1] + x[5]);
  const vfloat even_a = fma(-two, x[2], x[4]), odd_a = fma(a, x[3], -b * x[1]);
  const vfloat even_b = fma(-half, x[2], x[4]), odd_b = fma(b, x[3], -a * x[1]);
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
}

// A^T m.
INCEPTION_EXT_INLINE void transform_output(const vfloat m[kPoints], vfloat out[kTile]) {
  const vfloat half = broadcast(0.5f), two = broadcast(2.0f);
  const vfloat a = broadcast(kSqrtHalf), b = broadcast(kSqrtTwo);
  const vfloat sum_a = m[1] + m[2], sum_b = m[3] + m[4];
  const vfloat difference_a = a * (m[1] - m[2]), difference_b = b * (m[3] - m[4]);
  out[0] = m[0] + (sum_a + sum_b);
  out[1] = difference_a + difference_b;
  out[2] = fma(two, sum_b, half * sum_a);
  out[3] = fma(two, difference_b, fma(half, difference_a, m[5]));
}

// G w.
INCEPTION_EXT_INLINE void transform_weight(const vfloat w[3], vfloat out[kPoints]) {
  const vfloat third = broadcast(1.0f / 3), sixth = broadcast(1.0f / 6);
  const vfloat even_a = fma(broadcast(-2.0f / 3), w[0], -third * w[2]);
  const vfloat odd_a = broadcast(-2.0f / 3 * kSqrtHalf) * w[1];
  const vfloat even_b = fma(sixth, w[0], third * w[2]);
  const vfloat odd_b = broadcast(kSqrtTwo / 6) * w[1];
  out[0] = w[0];
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = w[2];
}

// One vector of filters of one channel; `count` of its lanes exist.
template <typename Lanes>
INCEPTION_EXT_INLINE void weight_vector(const WinogradWeightParams& params, int64_t k, int64_t c,
                                        int64_t count, Lanes lanes) {
  const float* from = params.weight + k * params.stride[0] + c * params.stride[1];
  vfloat columns[3][kPoints];  // [column][transformed row]
  for (int s = 0; s < 3; ++s) {
    vfloat taps[3];
    for (int r = 0; r < 3; ++r) {
      const int64_t row = params.flipped ? 2 - r : r, column = params.flipped ? 2 - s : s;
      const float* tap = from + row * params.stride[2] + column * params.stride[3];
      float values[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) values[i] = tap[i * params.stride[0]];
      taps[r] = AllLanes{}.load(values);
    }
    transform_weight(taps, columns[s]);
  }
  INCEPTION_EXT_UNROLL
  for (int i = 0; i < kPoints; ++i) {
    const vfloat row[3] = {columns[0][i], columns[1][i], columns[2][i]};
    vfloat out[kPoints];
    transform_weight(row, out);
    INCEPTION_EXT_UNROLL
    for (int j = 0; j < kPoints; ++j) {
      lanes.store(params.u + ((i * kPoints + j) * params.c + c) * params.k + k, out[j]);
    }
  }
}

inline void winograd_weight(const WinogradWeightParams& params) {
  if (params.k <= 0) return;
  parallel_for(params.parallel, 0, params.c, larger(1, pixel_grain(params.k) / kWinogradPositions),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) {
                   int64_t k = 0;
                   for (; k + kLanes <= params.k; k += kLanes) {
                     weight_vector(params, k, c, kLanes, AllLanes{});
                   }
                   if (k < params.k) {
                     weight_vector(params, k, c, params.k - k, FirstLanes(params.k - k));
                   }
                 }
               });
}

// Where a tile lies: its first output pixel, and how much of it is inside.
struct TilePlace {
  INCEPTION_EXT_INLINE TilePlace(int64_t tile, int64_t h, int64_t w) {
    const int64_t across = (w + kTile - 1) / kTile;
    const int64_t down = (h + kTile - 1) / kTile;
    const int64_t image = tile / (across * down);
    row = tile / across % down * kTile;
    column = tile % across * kTile;
    pixel = (image * h + row) * w + column;
    rows = smaller(kTile, h - row);
    columns = smaller(kTile, w - column);
  }

  int64_t row, column;
  int64_t pixel;          // number of the first
  int64_t rows, columns;  // 1 to 4
};

// One vector of channels of one tile. kInside: all of the 6x6 pixels exist.
template <bool kInside, bool kRelu, typename T, typename Lanes>
INCEPTION_EXT_INLINE void input_vector(const WinogradInputParams& params, const TilePlace& place,
                                       const T* x, float* v, Lanes lanes) {
  vfloat columns[kPoints][kPoints];  // [column][transformed row]
  INCEPTION_EXT_UNROLL
  for (int j = 0; j < kPoints; ++j) {
    vfloat pixels[kPoints];
    const int64_t column = place.column + j - 1;
    const bool column_exists = kInside || (column >= 0 && column < params.w);
    INCEPTION_EXT_UNROLL
    for (int i = 0; i < kPoints; ++i) {
      const int64_t row = place.row + i - 1;
      const bool exists = kInside || (column_exists && row >= 0 && row < params.h);
      const T* from = x + ((i - 1) * params.w + (j - 1)) * params.x_stride;
      pixels[i] = exists ? lanes.load(from) : vfloat{};
      if (kRelu) pixels[i] = relu(pixels[i]);
    }
    transform_input(pixels, columns[j]);
  }
  INCEPTION_EXT_UNROLL
  for (int i = 0; i < kPoints; ++i) {
    vfloat rows[kPoints], out[kPoints];
    INCEPTION_EXT_UNROLL
    for (int j = 0; j < kPoints; ++j) rows[j] = columns[j][i];
    transform_input(rows, out);
    INCEPTION_EXT_UNROLL
    for (int j = 0; j < kPoints; ++j)
      lanes.store(v + (i * kPoints + j) * params.v_layout.position_stride, out[j]);
  }
}

template <typename T, bool kInside, bool kRelu>
INCEPTION_EXT_INLINE void input_tile(const WinogradInputParams& params, const TilePlace& place,
                                     float* v) {
  const T* x = static_cast<const T*>(params.x) + place.pixel * params.x_stride;
  int64_t c = 0;
  for (; c + kLanes <= params.c; c += kLanes) {
    input_vector<kInside, kRelu>(params, place, x + c, v + c, AllLanes{});
  }
  if (c < params.c) {
    input_vector<kInside, kRelu>(params, place, x + c, v + c, FirstLanes(params.c - c));
  }
}

template <typename T, bool kRelu>
void input_tiles(const WinogradInputParams& params, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePlace place(params.first_tile + tile, params.h, params.w);
    float* v = params.v + tile * params.v_layout.tile_stride;
    const bool inside = place.row > 0 && place.column > 0 && place.row + kTile < params.h &&
                        place.column + kTile < params.w;
    if (inside) {
      input_tile<T, true, kRelu>(params, place, v);
    } else {
      input_tile<T, false, kRelu>(params, place, v);
    }
  }
}

// Tiles that make a part worth a thread.
INCEPTION_EXT_INLINE int64_t tile_grain(int64_t channels) {
  return larger(1, pixel_grain(channels) / kWinogradPositions);
}

template <typename T>
void input_all(const WinogradInputParams& params) {
  parallel_for(params.parallel, 0, params.tiles, tile_grain(params.c),
               [&](int64_t begin, int64_t end) {
                 if (params.relu) {
                   input_tiles<T, true>(params, begin, end);
                 } else {
                   input_tiles<T, false>(params, begin, end);
                 }
               });
}

inline void winograd_input(const WinogradInputParams& params) {
  if (params.c <= 0) return;
  if (params.dtype == DType::kBFloat16) {
    input_all<bf16>(params);
  } else {
    input_all<float>(params);
  }
}

// kRelu: bias and ReLU.
template <bool kRelu, typename T, typename Lanes>
INCEPTION_EXT_INLINE void output_vector(const WinogradOutputParams& params, const TilePlace& place,
                                        const float* m, const T* bias, T* y, Lanes lanes) {
  vfloat columns[kPoints][kTile];  // [position][row]
  INCEPTION_EXT_UNROLL
  for (int j = 0; j < kPoints; ++j) {
    vfloat products[kPoints];
    INCEPTION_EXT_UNROLL
    for (int i = 0; i < kPoints; ++i) {
      products[i] = lanes.load(m + (i * kPoints + j) * params.m_layout.position_stride);
    }
    transform_output(products, columns[j]);
  }
  const vfloat biases = kRelu ? lanes.load(bias) : vfloat{};
  INCEPTION_EXT_UNROLL
  for (int i = 0; i < kTile; ++i) {
    if (i >= place.rows) break;
    vfloat row[kPoints], out[kTile];
    INCEPTION_EXT_UNROLL
    for (int j = 0; j < kPoints; ++j) row[j] = columns[j][i];
    transform_output(row, out);
    INCEPTION_EXT_UNROLL
    for (int j = 0; j < kTile; ++j) {
      if (j >= place.columns) break;
      const vfloat value = kRelu ? relu(out[j] + biases) : out[j];
      lanes.store(y + (i * params.w + j) * params.y_stride, value);
    }
  }
}

template <bool kRelu, typename T>
void output_tiles(const WinogradOutputParams& params, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(params.bias);
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePlace place(params.first_tile + tile, params.h, params.w);
    const float* m = params.m + tile * params.m_layout.tile_stride;
    T* y = static_cast<T*>(params.y) + place.pixel * params.y_stride;
    int64_t k = 0;
    for (; k + kLanes <= params.k; k += kLanes) {
      output_vector<kRelu>(params, place, m + k, bias + k, y + k, AllLanes{});
    }
    if (k < params.k) {
      output_vector<kRelu>(params, place, m + k, bias + k, y + k, FirstLanes(params.k - k));
    }
  }
}

template <typename T>
void output_all(const WinogradOutputParams& params) {
  parallel_for(params.parallel, 0, params.tiles, tile_grain(params.k),
               [&](int64_t begin, int64_t end) {
                 if (params.bias != nullptr) {
                   output_tiles<true, T>(params, begin, end);
                 } else {
                   output_tiles<false, T>(params, begin, end);
                 }
               });
}

inline void winograd_output(const WinogradOutputParams& params) {
  if (params.k <= 0) return;
  if (params.dtype == DType::kBFloat16) {
    output_all<bf16>(params);
  } else {
    output_all<float>(params);
  }
}

}  // namespace inception_ext::cpu::INCEPTION_EXT_ISA
