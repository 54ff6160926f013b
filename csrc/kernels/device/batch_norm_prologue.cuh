// Batch norm + ReLU of a tile's rows, between the copy to shared memory and the products:
//
//   relu((x - mean) * (gamma * rstd) + beta), and zero where the filter lies on padding
//
// Every thread treats the chunks that it has copied itself, so that its own wait for the copy is
// enough, and the barrier before the products is the only one.
#pragma once

#include <cmath>
#include <cstdint>

#include "conv_loader.cuh"
#include "shared.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

template <typename T, int kTileRows>
class BatchNormPrologue {
 public:
  // Floats of shared memory for the vectors of `channels` channels.
  static __device__ __host__ constexpr int32_t table_floats(int32_t channels) {
    return 3 * padded(channels);
  }

  // `table` [3, channels]: mean, gamma * rstd, beta; filled by fill_table and a barrier.
  __device__ __forceinline__ BatchNormPrologue(const ConvProblem& p, const float* table,
                                               int32_t k_begin)
      : p_(p), table_(table), tap_(first_tap<T>(p, k_begin)) {}

  static __device__ __forceinline__ void fill_table(float* table, int32_t channels,
                                                    const float* mean, const float* rstd,
                                                    const float* gamma, const float* beta) {
    for (int32_t c = threadIdx.x; c < padded(channels); c += kTileThreads) {
      const bool exists = c < channels;
      store_shared(table + c, exists ? load_global(mean + c) : 0.0f);
      store_shared(table + padded(channels) + c,
                   exists ? load_global(gamma + c) * load_global(rstd + c) : 0.0f);
      store_shared(table + 2 * padded(channels) + c, exists ? load_global(beta + c) : 0.0f);
    }
  }

  // The next step of K, which `loader` has copied to `tile`.
  __device__ __forceinline__ void apply(char* tile, const WindowLoader<T, kTileRows>& loader) {
    char* chunk = tile + chunk_offset(threadIdx.x / kRowChunks, threadIdx.x % kRowChunks);
    if (loader.is_whole()) {
      if (tap_.r < p_.kernel_h) {
        float mean[kVec], scale[kVec], shift[kVec];
        load_vector(mean, 0);
        load_vector(scale, 1);
        load_vector(shift, 2);
#pragma unroll
        for (int i = 0; i < kTileRows / kLoadRows; ++i) {
          if (!loader.is_inside(i, tap_)) continue;
          T* pointer = reinterpret_cast<T*>(chunk + i * kLoadRows * kRowBytes);
          Vector<T, kVec> values = load_shared<kVec>(pointer);
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            values.data[e] = normalized(values.data[e], mean[e], scale[e], shift[e]);
          }
          store_shared<kVec>(pointer, values);
        }
      }
    } else {
      FilterTap tap = tap_;
#pragma unroll 1
      for (int e = 0; e < kVec; ++e) {
        if (tap.r < p_.kernel_h) {
          const float* vectors = table_ + tap.c;
          const float mean = load_shared(vectors);
          const float scale = load_shared(vectors + padded(p_.channels));
          const float shift = load_shared(vectors + 2 * padded(p_.channels));
#pragma unroll
          for (int i = 0; i < kTileRows / kLoadRows; ++i) {
            if (!loader.is_inside(i, tap)) continue;
            T* pointer = reinterpret_cast<T*>(chunk + i * kLoadRows * kRowBytes) + e;
            store_shared(pointer, normalized(load_shared(pointer), mean, scale, shift));
          }
        }
        tap.advance(p_, 1);
      }
    }
    tap_.advance(p_, kRowChunks * kVec);
  }

 private:
  static constexpr int kVec = kVectorSize<T>;

  static __device__ __host__ constexpr int32_t padded(int32_t channels) {
    return (channels + 7) / 8 * 8;
  }

  static __device__ __forceinline__ T normalized(T x, float mean, float scale, float shift) {
    const float y = fmaf(to_float(x) - mean, scale, shift);
    return from_float<T>(y < 0 ? 0.0f : y);  // keeps NaN
  }

  // Row `row` of the table at the tap's channels.
  __device__ __forceinline__ void load_vector(float (&values)[kVec], int row) const {
    const float* from = table_ + row * padded(p_.channels) + tap_.c;
#pragma unroll
    for (int i = 0; i < kVec; i += 4) {
      const Vector<float, 4> part = load_shared<4>(from + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) values[i + e] = part.data[e];
    }
  }

  const ConvProblem& p_;
  const float* table_;
  FilterTap tap_;
};

}  // namespace inception_ext::kernels
