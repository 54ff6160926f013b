// stem_conv_conv_pool's 1x1 convolution: a tile of x in shared memory becomes relu(conv(x)) in
// place.
//
// The tile has [2 * kRows + 3][31] pixels, those that the 3x3 convolution of the block's pixels
// reads, as rows of operand tiles (tile.cuh): tile i holds channels i * 64 bytes and on. Zero
// outside the image, as the 3x3 convolution pads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "../stem_plan.h"
#include "async_copy.cuh"
#include "global.cuh"
#include "pooled_tile.cuh"
#include "tensor_math.cuh"

namespace inception_ext::kernels {

template <typename Math, int kRows>
class ReducedPixels {
 public:
  using T = typename Math::Element;
  using Tile = ReducedTile<kRows, sizeof(T)>;
  static constexpr int kVec = kVectorSize<T>;
  static constexpr int kTileSteps = kRowChunks / Math::kStepChunks;

  __device__ __forceinline__ ReducedPixels(char* memory, const StemConvConvPoolParams& p,
                                           const PooledOrigin& origin)
      : memory_(memory), p_(p), origin_(origin) {}

  // Copies x; wait for the copies and the other threads before compute.
  __device__ __forceinline__ void load(bool vectors) const {
    constexpr int kTileChunks = Tile::kPixels * kRowChunks;
    const int64_t image = origin_.n * p_.input_h * p_.input_w;
    const T* x = static_cast<const T*>(p_.x) + image * p_.x_stride;
    for (int i = threadIdx.x; i < Tile::kTiles * kTileChunks; i += Tile::kThreads) {
      const int tile = i / kTileChunks, pixel = i % kTileChunks / kRowChunks,
                chunk = i % kRowChunks;
      const bool inside = is_inside(pixel);
      const int64_t offset = inside ? (int64_t{h_of(pixel)} * p_.input_w + w_of(pixel)) : 0;
      const T* from = x + offset * p_.x_stride + (tile * kRowChunks + chunk) * kVec;
      char* to = memory_ + tile * Tile::kTileBytes + chunk_offset(pixel, chunk);
      if (vectors) {
        copy_async<16>(to, inside ? from : x, inside ? 16 : 0);
      } else {
        Vector<T, kVec> values = {};
#pragma unroll
        for (int e = 0; e < kVec && inside; ++e) values.data[e] = load_global(from + e);
        store_shared<kVec>(reinterpret_cast<T*>(to), values);
      }
    }
  }

  // weight [64, 64] in operand tiles, bias [64]. A fragment's pixels are read and written by one
  // warp alone.
  __device__ __forceinline__ void compute(const char* weight, const float* bias) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int pixel = threadIdx.x / 32 * 16; pixel < Tile::kPixels; pixel += Tile::kWarps * 16) {
      float c[1][8][4];
      start_sums<T>(c, bias);
#pragma unroll 1
      for (int step = 0; step < Tile::kTiles * kTileSteps; ++step) {
        const int tile = step / kTileSteps;
        typename Math::A a;
        Math::load_a(a, memory_ + tile * Tile::kTileBytes, pixel, step % kTileSteps);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          typename Math::B b;
          Math::load_b(b, weight + tile * kStemFilters * kRowBytes, 16 * j, step % kTileSteps);
          Math::multiply(c[0][2 * j], a, b, 0);
          Math::multiply(c[0][2 * j + 1], a, b, 1);
        }
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = pixel + 8 * half + lane / 4;
        const bool inside = is_inside(row);
        for_each_vector<T>(c[0], half, [&](int tile, Vector<T, kVec> vector) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            if (!inside) vector.data[e] = from_float<T>(0.0f);
            if constexpr (std::is_same_v<Math, TensorMath<float>>) {
              vector.data[e] = bits_to_float(to_tf32(vector.data[e]));
            }
          }
          char* to = memory_ + tile * Tile::kTileBytes + chunk_offset(row, lane % 4);
          store_shared<kVec>(reinterpret_cast<T*>(to), vector);
        });
      }
    }
  }

  // A [16, kStepK] of the 3x3 convolution: of fragment f, filter tap (r, s), a step of tile `tile`.
  __device__ __forceinline__ void load_a(typename Math::A& a, int f, int r, int s, int tile,
                                         int step) const {
    const int lane = threadIdx.x % 32;
    const char* rows =
        memory_ + tile * Tile::kTileBytes +
        ((fragment_row<kRows>(f) + r) * Tile::kColumns + fragment_column<kRows>(f)) * kRowBytes;
    if constexpr (Math::kStepChunks == 2) {
      load_matrices(a, rows + chunk_offset(s + lane % 16, step * 2 + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const char* row = rows + chunk_offset(s + lane / 4 + 8 * i, step);
        a[i] = load_shared<kVec>(reinterpret_cast<const T*>(row));
      }
    }
  }

 private:
  __device__ __forceinline__ int32_t h_of(int pixel) const {
    return 2 * origin_.row - 1 + pixel / Tile::kColumns;
  }
  __device__ __forceinline__ int32_t w_of(int pixel) const {
    return 2 * origin_.column - 1 + pixel % Tile::kColumns;
  }
  __device__ __forceinline__ bool is_inside(int pixel) const {
    const int32_t h = h_of(pixel), w = w_of(pixel);
    return pixel % Tile::kColumns < Tile::kUsedColumns && h >= 0 && h < p_.input_h && w >= 0 &&
           w < p_.input_w;
  }

  char* memory_;
  const StemConvConvPoolParams& p_;
  PooledOrigin origin_;
};

}  // namespace inception_ext::kernels
