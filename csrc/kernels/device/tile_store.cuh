// A warp's results, 16 rows of fp32 fragments at a time, into channels of the output segments.
//
// They pass through shared memory, so that rows of up to 64 channels are written in 16-byte
// vectors; its chunks are swizzled by row, free of bank conflicts in both directions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "global.cuh"
#include "shared.cuh"
#include "tile.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

// Whether every 16-byte chunk of channels, from a multiple of 8 on, is one vector of one segment.
template <typename T>
__device__ __forceinline__ bool has_whole_vectors(const ConvProblem& p) {
  constexpr int kVec = kVectorSize<T>;
  bool whole = true;
  for (int i = 0; i < p.segments; ++i) {
    const ConvSegment& segment = p.segment[i];
    whole = whole && segment.channels % kVec == 0 && segment.stride % kVec == 0 &&
            reinterpret_cast<uintptr_t>(segment.y) % kChunkBytes == 0;
  }
  return whole;
}

template <typename T, int kFragments>
class TileStore {
 public:
  static constexpr int kColumns = 8 * kFragments;
  static constexpr int kBytes = 16 * kColumns * sizeof(T);  // of shared memory, for each warp

  // `vectors`: whether `adjust` of write() takes vectors.
  __device__ __forceinline__ TileStore(const ConvProblem& p, char* shared, bool vectors = true)
      : p_(p), shared_(shared), whole_(vectors && has_whole_vectors<T>(p)) {}

  // Columns 2t and 2t + 1 of fragment j in rows g and g + 8, of a warp's 16 rows.
  __device__ __forceinline__ void put(int j, const float (&c)[4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vector<T, 2> pair{from_float<T>(c[2 * half]), from_float<T>(c[2 * half + 1])};
      const int column = 8 * j + lane % 4 * 2;
      T* chunk = at(lane / 4 + 8 * half, column / kVec);
      store_shared<2>(chunk + column % kVec, pair);
    }
  }

  // After a __syncwarp: rows m ... m_end - 1, at most 16, and filters k ... k_end - 1 of the
  // output. Before they are written, adjust(values, m, k) may change a vector, or a single one.
  template <typename Adjust>
  __device__ __forceinline__ void write(int32_t m, int32_t m_end, int32_t k, int32_t k_end,
                                        const Adjust& adjust) const {
    constexpr int kRowsAtOnce = 32 / kRowVectors;
    const int lane = threadIdx.x % 32;
    const int32_t channel = k + lane % kRowVectors * kVec;
    if (channel >= k_end) return;
#pragma unroll 1
    for (int row = lane / kRowVectors; row < 16 && m + row < m_end; row += kRowsAtOnce) {
      const T* chunk = at(row, lane % kRowVectors);
      if (whole_) {
        Vector<T, kVec> values = load_shared<kVec>(chunk);
        adjust(values, m + row, channel);
        store_global<kVec>(address(m + row, channel), values);
      } else {
#pragma unroll 1
        for (int e = 0; e < kVec && channel + e < k_end; ++e) {
          Vector<T, 1> value = load_shared<1>(chunk + e);
          adjust(value, m + row, channel + e);
          store_global<1>(address(m + row, channel + e), value);
        }
      }
    }
  }

  __device__ __forceinline__ void write(int32_t m, int32_t m_end, int32_t k, int32_t k_end) const {
    write(m, m_end, k, k_end, [](auto&, int32_t, int32_t) {});
  }

 private:
  static constexpr int kVec = kVectorSize<T>;
  static constexpr int kRowVectors = kColumns / kVec;  // 4, 8 or 16

  __device__ __forceinline__ T* at(int row, int chunk) const {
    int offset;
    if constexpr (kRowVectors == kRowChunks) {
      offset = chunk_offset(row, chunk);
    } else {
      const int key = std::is_same_v<T, float> ? row % 4 * 2 : row % 8;
      offset = (row * kRowVectors + (chunk ^ key)) * kChunkBytes;
    }
    return reinterpret_cast<T*>(shared_ + offset);
  }

  __device__ __forceinline__ T* address(int32_t m, int32_t channel) const {
    int i = 0;
    while (channel >= p_.segment[i].channels) channel -= p_.segment[i++].channels;
    const ConvSegment& segment = p_.segment[i];
    return static_cast<T*>(segment.y) + m * segment.stride + channel;
  }

  const ConvProblem& p_;
  char* shared_;
  bool whole_;
};

}  // namespace inception_ext::kernels
