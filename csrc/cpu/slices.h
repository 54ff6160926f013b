// Channel slices as the kernels read and write them, and the loops over their pixels. Part of
// kernels_impl.h.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "simd.h"

namespace inception_ext::cpu::INCEPTION_EXT_ISA {

INCEPTION_EXT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INCEPTION_EXT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Pixels of `channels` elements that make a part worth a thread.
INCEPTION_EXT_INLINE int64_t pixel_grain(int64_t channels) { return larger(1, 32768 / channels); }

// Pixels that share one load of the per-channel values.
constexpr int kRows = 4;

// ---- slices -------------------------------------------------------------------------------------

// Best of 0.5, 1, 2, 4 and 8 KiB on Zen 5, for one slice and for two or three at a time.
constexpr int64_t kAheadAlone = 8192;
constexpr int64_t kAhead = 4096;

// Asks for a cache line ahead of `from`; nothing there need be mapped.
INCEPTION_EXT_INLINE void prefetch(const void* from, int64_t bytes_ahead) {
  __builtin_prefetch((const void*)((uintptr_t)from + (uintptr_t)bytes_ahead));
}

// A slice that is read pixel after pixel. The hardware does not see through the order of kRows
// rows at a time, so every load asks for the data a few kilobytes ahead.
template <typename T>
struct Source {
  INCEPTION_EXT_INLINE Source(const void* from, int64_t elements, int64_t channels,
                              int64_t bytes_ahead)
      : data(static_cast<const T*>(from)), stride(elements) {
    const int64_t row_bytes = channels * (int64_t)sizeof(T);
    const int64_t rows = (bytes_ahead / row_bytes + kRows - 1) / kRows * kRows;
    ahead = larger(kRows, rows) * stride * (int64_t)sizeof(T);
  }

  template <typename Lanes>
  INCEPTION_EXT_INLINE vfloat load(int64_t pixel, int64_t c, Lanes lanes) const {
    const T* from = data + pixel * stride + c;
    prefetch(from, ahead);
    return lanes.load(from);
  }

  const T* data;
  int64_t stride;
  int64_t ahead;  // bytes
};

template <typename T>
struct Target {
  INCEPTION_EXT_INLINE Target(void* to, int64_t elements)
      : data(static_cast<T*>(to)), stride(elements) {}

  template <typename Lanes>
  INCEPTION_EXT_INLINE void store(int64_t pixel, int64_t c, Lanes lanes, vfloat v) const {
    lanes.store(data + pixel * stride + c, v);
  }

  T* data;
  int64_t stride;
};

// ---- loops --------------------------------------------------------------------------------------
//
// An op holds what it reads by value: through a reference, the compiler would load it again after
// every store.

// op.run<kRowCount>(pixel, c, lanes) for every vector of channels of [pixel, pixel + kRowCount).
template <int kRowCount, typename Op>
INCEPTION_EXT_INLINE void for_each_vector(const Op op, int64_t pixel, int64_t channels) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) op.template run<kRowCount>(pixel, c, AllLanes{});
  if (c < channels) op.template run<kRowCount>(pixel, c, FirstLanes(channels - c));
}

// The same for all pixels [begin, end), kRows at a time.
template <typename Op>
INCEPTION_EXT_INLINE void for_each_pixel(const Op op, int64_t begin, int64_t end,
                                         int64_t channels) {
  int64_t pixel = begin;
  for (; pixel + kRows <= end; pixel += kRows) for_each_vector<kRows>(op, pixel, channels);
  for (; pixel < end; ++pixel) for_each_vector<1>(op, pixel, channels);
}

}  // namespace inception_ext::cpu::INCEPTION_EXT_ISA
