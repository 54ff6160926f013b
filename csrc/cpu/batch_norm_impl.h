// Batch normalisation + ReLU, per ISA: part of kernels_impl.h. The formulas are in batch_norm.h.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "batch_norm_plan.h"
#include "parallel.h"
#include "simd.h"
#include "slices.h"

namespace inception_ext::cpu::INCEPTION_EXT_ISA {

// Chunk results that make a part worth a thread.
constexpr int64_t kMergeGrain = 65536;

// ---- forward: statistics ------------------------------------------------------------------------
//
// One pass over memory, in three levels:
//   block of 64 pixels  sums of x - shift and of its square in float32, the shift being the mean of
//                       the block's first 8 pixels. m2 is at least 8 times the squared distance
//                       of that shift from the block's mean, so sum_squares - sum^2 / n loses 3
//                       bits at worst, and hardly any where the 8 pixels are like the rest.
//   chunk               blocks merged in order by Chan's formula, in double
//   tensor              chunks merged in order, in double: the mean first, then m2 around it

INCEPTION_EXT_INLINE vdouble load_double(const float* from) { return load_bytes_as<vdouble>(from); }
INCEPTION_EXT_INLINE void store_double(float* to, vdouble v) { __builtin_memcpy(to, &v, sizeof v); }
INCEPTION_EXT_INLINE vdouble load_as_double(const float* from) {
  return __builtin_convertvector(load_bytes_as<vfloat_half>(from), vdouble);
}

// A chunk's part of the workspace; C is padded_channels.
struct StatisticsScratch {
  INCEPTION_EXT_INLINE StatisticsScratch(float* workspace, int64_t chunk, int64_t padded)
      : mean(workspace + chunk * kStatisticsScratch * padded),
        m2(mean + 2 * padded),
        shift(m2 + 2 * padded),
        sum(shift + padded),
        sum_squares(sum + padded) {}

  float* mean;         // [C] double
  float* m2;           // [C] double
  float* shift;        // [C]
  float* sum;          // [C]
  float* sum_squares;  // [C]
};

template <typename T>
struct SetShift {
  Source<T> x;
  StatisticsScratch scratch;
  int64_t count;  // pixels of the mean

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t pixel, int64_t c, Lanes lanes) const {
    const AllLanes all;
    vfloat sum = x.load(pixel, c, lanes);
    for (int64_t i = 1; i < count; ++i) sum += x.load(pixel + i, c, lanes);
    all.store(scratch.shift + c, sum * (1.0f / (float)count));
    all.store(scratch.sum + c, vfloat{});
    all.store(scratch.sum_squares + c, vfloat{});
  }
};

template <typename T>
struct SumShifted {
  Source<T> x;
  StatisticsScratch scratch;

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t pixel, int64_t c, Lanes lanes) const {
    const AllLanes all;
    const vfloat shift = all.load(scratch.shift + c);
    vfloat sum{};
    vfloat sum_squares{};
    INCEPTION_EXT_UNROLL
    for (int row = 0; row < kRowCount; ++row) {
      const vfloat deviation = x.load(pixel + row, c, lanes) - shift;
      sum += deviation;
      sum_squares = fma(deviation, deviation, sum_squares);
    }
    all.store(scratch.sum + c, all.load(scratch.sum + c) + sum);
    all.store(scratch.sum_squares + c, all.load(scratch.sum_squares + c) + sum_squares);
  }
};

// Chan: (before, mean, m2) and the block (count, shift + sum / count, ...) -> (mean, m2).
inline void merge_block(const StatisticsScratch& scratch, int64_t before, int64_t count,
                        int64_t padded) {
  const double per_count = 1.0 / (double)count;
  const double share = (double)count / (double)(before + count);
  const double spread = (double)before * share;
  for (int64_t c = 0; c < padded; c += kLanes / 2) {
    const vdouble sum = load_as_double(scratch.sum + c);
    const vdouble block_mean = load_as_double(scratch.shift + c) + sum * per_count;
    const vdouble block_m2 = load_as_double(scratch.sum_squares + c) - sum * sum * per_count;
    const vdouble mean = before == 0 ? vdouble{} : load_double(scratch.mean + 2 * c);
    const vdouble m2 = before == 0 ? vdouble{} : load_double(scratch.m2 + 2 * c);
    const vdouble delta = block_mean - mean;
    store_double(scratch.mean + 2 * c, mean + delta * share);
    store_double(scratch.m2 + 2 * c, m2 + block_m2 + delta * delta * spread);
  }
}

template <typename T>
void statistics_of_chunk(const BatchNormStatisticsParams& params, int64_t chunk) {
  const int64_t padded = padded_channels(params.channels);
  const StatisticsScratch scratch(params.workspace, chunk, padded);
  const Source<T> x(params.x, params.x_stride, params.channels, kAheadAlone);
  const int64_t begin = chunk * chunk_pixels(params.channels);
  const int64_t end = smaller(begin + chunk_pixels(params.channels), params.pixels);
  // Padding channels that no vector covers are merged too, and must be defined.
  for (int64_t c = params.channels; c < padded; ++c) {
    scratch.shift[c] = scratch.sum[c] = scratch.sum_squares[c] = 0;
  }
  for (int64_t block = begin; block < end; block += kBlockPixels) {
    const int64_t block_end = smaller(block + kBlockPixels, end);
    const int64_t shift_pixels = smaller(kShiftPixels, block_end - block);
    for_each_vector<1>(SetShift<T>{x, scratch, shift_pixels}, block, params.channels);
    for_each_pixel(SumShifted<T>{x, scratch}, block, block_end, params.channels);
    merge_block(scratch, block - begin, block_end - block, padded);
  }
}

// [begin, end) in vectors of kLanes / 2 channels.
inline void merge_chunks(const BatchNormStatisticsParams& params, int64_t begin, int64_t end) {
  const int64_t padded = padded_channels(params.channels);
  const int64_t chunks = chunk_count(params.pixels, params.channels);
  const double per_pixel = params.pixels > 0 ? 1.0 / (double)params.pixels : 0.0;
  const int64_t size = chunk_pixels(params.channels);
  const auto count_of = [&](int64_t chunk) {
    return (double)smaller(size, params.pixels - chunk * size);
  };
  for (int64_t vector = begin; vector < end; ++vector) {
    const int64_t c = vector * (kLanes / 2);
    const vdouble first =
        chunks > 0 ? load_double(StatisticsScratch(params.workspace, 0, padded).mean + 2 * c)
                   : vdouble{};
    vdouble sum{};
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const StatisticsScratch scratch(params.workspace, chunk, padded);
      sum += (load_double(scratch.mean + 2 * c) - first) * count_of(chunk);
    }
    const vdouble mean = first + sum * per_pixel;
    vdouble m2{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const StatisticsScratch scratch(params.workspace, chunk, padded);
      const vdouble delta = load_double(scratch.mean + 2 * c) - mean;
      m2 += load_double(scratch.m2 + 2 * c) + delta * delta * count_of(chunk);
    }
    for (int lane = 0; lane < kLanes / 2 && c + lane < params.channels; ++lane) {
      params.mean[c + lane] = (float)mean[lane];
      // Rounding can leave a constant channel a little below 0.
      params.m2[c + lane] = m2[lane] < 0 ? 0.0f : (float)m2[lane];
    }
  }
}

inline void batch_norm_statistics(const BatchNormStatisticsParams& params) {
  if (params.channels <= 0) return;
  const int64_t chunks = chunk_count(params.pixels, params.channels);
  parallel_for(params.parallel, 0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (params.dtype == DType::kBFloat16) {
        statistics_of_chunk<bf16>(params, chunk);
      } else {
        statistics_of_chunk<float>(params, chunk);
      }
    }
  });
  const int64_t vectors = padded_channels(params.channels) / (kLanes / 2);
  const int64_t grain = kMergeGrain / (kLanes / 2 * (chunks + 1)) + 1;
  parallel_for(params.parallel, 0, vectors, grain,
               [&](int64_t begin, int64_t end) { merge_chunks(params, begin, end); });
}

// ---- forward: apply -----------------------------------------------------------------------------

// Per-channel values; gamma and beta may be nullptr.
struct ChannelValues {
  template <typename Params>
  INCEPTION_EXT_INLINE explicit ChannelValues(const Params& params)
      : mean(params.mean), rstd(params.rstd), gamma(params.gamma), beta(params.beta) {}

  const float* mean;
  const float* rstd;
  const float* gamma;
  const float* beta;
};

// Those of one vector, and y = relu(before_relu(x - mean)). Forward and backward share it, so that
// both see the same sign of y.
struct Normalization {
  template <typename Lanes>
  INCEPTION_EXT_INLINE Normalization(const ChannelValues& values, int64_t c, Lanes lanes)
      : mean(lanes.load(values.mean + c)),
        rstd(lanes.load(values.rstd + c)),
        scale(values.gamma == nullptr ? rstd : lanes.load(values.gamma + c) * rstd),
        beta(values.beta == nullptr ? vfloat{} : lanes.load(values.beta + c)) {}

  INCEPTION_EXT_INLINE vfloat before_relu(vfloat centered) const {
    return fma(centered, scale, beta);
  }

  vfloat mean;
  vfloat rstd;
  vfloat scale;
  vfloat beta;
};

template <typename T>
struct Apply {
  ChannelValues values;
  Source<T> x;
  Target<T> y;

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t pixel, int64_t c, Lanes lanes) const {
    const Normalization norm(values, c, lanes);
    INCEPTION_EXT_UNROLL
    for (int row = 0; row < kRowCount; ++row) {
      const vfloat centered = x.load(pixel + row, c, lanes) - norm.mean;
      y.store(pixel + row, c, lanes, relu(norm.before_relu(centered)));
    }
  }
};

template <typename T>
void apply_to_pixels(const BatchNormReluApplyParams& params, int64_t begin, int64_t end) {
  const Apply<T> op{ChannelValues(params),
                    Source<T>(params.x, params.x_stride, params.channels, kAhead),
                    Target<T>(params.y, params.y_stride)};
  for_each_pixel(op, begin, end, params.channels);
}

inline void batch_norm_relu_apply(const BatchNormReluApplyParams& params) {
  if (params.channels <= 0) return;
  parallel_for(params.parallel, 0, params.pixels, pixel_grain(params.channels),
               [&](int64_t begin, int64_t end) {
                 if (params.dtype == DType::kBFloat16) {
                   apply_to_pixels<bf16>(params, begin, end);
                 } else {
                   apply_to_pixels<float>(params, begin, end);
                 }
               });
}

// ---- backward: reduce ---------------------------------------------------------------------------

// dy where the ReLU let y through.
INCEPTION_EXT_INLINE vfloat relu_backward(vfloat dy, vfloat y) {
  return value_or_zero(not_less_equal(y, vfloat{}), dy);
}

template <typename T>
struct BackwardReduce {
  ChannelValues values;
  Source<T> x;
  Source<T> dy;
  float* sum_dy;           // [C] of the chunk
  float* sum_dy_centered;  // [C] of the chunk: sum dy' * (x - mean)

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t pixel, int64_t c, Lanes lanes) const {
    const AllLanes all;
    const Normalization norm(values, c, lanes);
    vfloat sum{};
    vfloat sum_centered{};
    INCEPTION_EXT_UNROLL
    for (int row = 0; row < kRowCount; ++row) {
      const vfloat centered = x.load(pixel + row, c, lanes) - norm.mean;
      const vfloat gradient =
          relu_backward(dy.load(pixel + row, c, lanes), norm.before_relu(centered));
      sum += gradient;
      sum_centered = fma(gradient, centered, sum_centered);
    }
    all.store(sum_dy + c, all.load(sum_dy + c) + sum);
    all.store(sum_dy_centered + c, all.load(sum_dy_centered + c) + sum_centered);
  }
};

template <typename T>
void backward_reduce_chunk(const BatchNormReluBackwardParams& params, int64_t chunk) {
  const int64_t padded = padded_channels(params.channels);
  float* sum_dy = params.workspace + chunk * kBackwardScratch * padded;
  float* sum_dy_centered = sum_dy + padded;
  const int64_t begin = chunk * chunk_pixels(params.channels);
  const int64_t end = smaller(begin + chunk_pixels(params.channels), params.pixels);
  for (int64_t c = 0; c < padded; ++c) sum_dy[c] = sum_dy_centered[c] = 0;
  const BackwardReduce<T> op{
      ChannelValues(params), Source<T>(params.x, params.x_stride, params.channels, kAhead),
      Source<T>(params.dy, params.dy_stride, params.channels, kAhead), sum_dy, sum_dy_centered};
  for_each_pixel(op, begin, end, params.channels);
}

// [begin, end) in vectors of kLanes / 2 channels.
inline void merge_backward_chunks(const BatchNormReluBackwardParams& params, int64_t begin,
                                  int64_t end) {
  const int64_t padded = padded_channels(params.channels);
  const int64_t chunks = chunk_count(params.pixels, params.channels);
  for (int64_t vector = begin; vector < end; ++vector) {
    const int64_t c = vector * (kLanes / 2);
    vdouble sum_dy{};
    vdouble sum_dy_centered{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* from = params.workspace + chunk * kBackwardScratch * padded + c;
      sum_dy += load_as_double(from);
      sum_dy_centered += load_as_double(from + padded);
    }
    for (int lane = 0; lane < kLanes / 2 && c + lane < params.channels; ++lane) {
      params.sum_dy[c + lane] = (float)sum_dy[lane];
      params.sum_dy_xhat[c + lane] = (float)(sum_dy_centered[lane] * (double)params.rstd[c + lane]);
    }
  }
}

inline void batch_norm_relu_backward_reduce(const BatchNormReluBackwardParams& params) {
  if (params.channels <= 0) return;
  const int64_t chunks = chunk_count(params.pixels, params.channels);
  parallel_for(params.parallel, 0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (params.dtype == DType::kBFloat16) {
        backward_reduce_chunk<bf16>(params, chunk);
      } else {
        backward_reduce_chunk<float>(params, chunk);
      }
    }
  });
  const int64_t vectors = padded_channels(params.channels) / (kLanes / 2);
  const int64_t grain = kMergeGrain / (kLanes / 2 * (chunks + 1)) + 1;
  parallel_for(params.parallel, 0, vectors, grain,
               [&](int64_t begin, int64_t end) { merge_backward_chunks(params, begin, end); });
}

// ---- backward: apply ----------------------------------------------------------------------------

template <typename T, bool kBatchStatistics>
struct BackwardApply {
  ChannelValues values;
  Source<T> x;
  Source<T> dy;
  Target<T> dx;
  const float* sum_dy;
  const float* sum_dy_xhat;
  float per_pixel;  // 1 / P

  template <int kRowCount, typename Lanes>
  INCEPTION_EXT_INLINE void run(int64_t pixel, int64_t c, Lanes lanes) const {
    const Normalization norm(values, c, lanes);
    vfloat mean_dy{};
    vfloat slope{};  // of the projection on xhat, per unit of x - mean
    if (kBatchStatistics) {
      mean_dy = lanes.load(sum_dy + c) * per_pixel;
      slope = lanes.load(sum_dy_xhat + c) * per_pixel * norm.rstd;
    }
    INCEPTION_EXT_UNROLL
    for (int row = 0; row < kRowCount; ++row) {
      const vfloat centered = x.load(pixel + row, c, lanes) - norm.mean;
      vfloat gradient = relu_backward(dy.load(pixel + row, c, lanes), norm.before_relu(centered));
      if (kBatchStatistics) gradient = fma(-centered, slope, gradient - mean_dy);
      dx.store(pixel + row, c, lanes, gradient * norm.scale);
    }
  }
};

template <typename T, bool kBatchStatistics>
void backward_apply_to_pixels(const BatchNormReluBackwardParams& params, int64_t begin,
                              int64_t end) {
  const float per_pixel = (float)(1.0 / (double)params.pixels);
  const BackwardApply<T, kBatchStatistics> op{
      ChannelValues(params),
      Source<T>(params.x, params.x_stride, params.channels, kAhead),
      Source<T>(params.dy, params.dy_stride, params.channels, kAhead),
      Target<T>(params.dx, params.dx_stride),
      params.sum_dy,
      params.sum_dy_xhat,
      per_pixel};
  for_each_pixel(op, begin, end, params.channels);
}

template <typename T>
void backward_apply_to_pixels(const BatchNormReluBackwardParams& params, int64_t begin,
                              int64_t end) {
  if (params.batch_statistics) {
    backward_apply_to_pixels<T, true>(params, begin, end);
  } else {
    backward_apply_to_pixels<T, false>(params, begin, end);
  }
}

inline void batch_norm_relu_backward_apply(const BatchNormReluBackwardParams& params) {
  if (params.channels <= 0) return;
  parallel_for(params.parallel, 0, params.pixels, pixel_grain(params.channels),
               [&](int64_t begin, int64_t end) {
                 if (params.dtype == DType::kBFloat16) {
                   backward_apply_to_pixels<bf16>(params, begin, end);
                 } else {
                   backward_apply_to_pixels<float>(params, begin, end);
                 }
               });
}

}  // namespace inception_ext::cpu::INCEPTION_EXT_ISA
