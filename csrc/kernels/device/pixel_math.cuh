// The products of tensor_math.cuh for tiles that lie pixel by pixel (pixel_tile.cuh): K runs over a
// step's pixels, the rows of A and the columns of B are channels. kFirstShape: of kTileShapes, the
// largest that a thread has the registers for. kChainSteps: see wgrad_plan.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../wgrad_plan.h"
#include "mma.cuh"
#include "pixel_tile.cuh"
#include "shared.cuh"
#include "tensor_math.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

template <typename Math>
__device__ __forceinline__ const typename Math::Element* pixel_element(const char* tile, int pixel,
                                                                       int channel) {
  using T = typename Math::Element;
  constexpr int kVec = kVectorSize<T>;
  return reinterpret_cast<const T*>(
             tile + pixel_chunk_offset<Math>(kStepPixels<T>, pixel, channel / kVec)) +
         channel % kVec;
}

// mma.sync. ldmatrix transposes 16-bit elements; floats are read one by one.
template <typename T>
struct PixelTensorMath : TensorMath<T> {
  static constexpr int kFirstShape = 0;
  using typename TensorMath<T>::A;
  using typename TensorMath<T>::B;
  using TensorMath<T>::kStepK;
  static constexpr int32_t kChainSteps = kTensorChainSteps;

  static __device__ __forceinline__ int slot_key(int pixel) {
    return sizeof(T) == 4 ? pixel % 4 * 2 : pixel % 8;
  }

  static __device__ __forceinline__ void load_a(A& a, const char* tile, int row, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = load(tile, step, e / 2, row + e % 2 * 8);
    } else {
      load_matrices<4, true>(a, chunk(tile, step, lane / 16, row / 8 + lane / 8 % 2));
    }
  }

  static __device__ __forceinline__ void load_b(B& b, const char* tile, int row, int step) {
    const int lane = threadIdx.x % 32;
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int e = 0; e < 4; ++e) b[e] = load(tile, step, e % 2, row + e / 2 * 8);
    } else {
      load_matrices<4, true>(b, chunk(tile, step, lane / 8 % 2, row / 8 + lane / 16));
    }
  }

 private:
  // The row of an 8x8 matrix that this lane passes to ldmatrix.
  static __device__ __forceinline__ const char* chunk(const char* tile, int step, int half,
                                                      int chunk) {
    const int pixel = step * kStepK + half * 8 + threadIdx.x % 8;
    return tile + pixel_chunk_offset<PixelTensorMath>(kStepPixels<T>, pixel, chunk);
  }
  // Element (g, t) of eight channels and four pixels.
  static __device__ __forceinline__ uint32_t load(const char* tile, int step, int half,
                                                  int channel) {
    const int lane = threadIdx.x % 32;
    const int pixel = step * kStepK + half * 4 + lane % 4;
    return to_tf32(load_shared(pixel_element<PixelTensorMath>(tile, pixel, channel + lane / 4)));
  }
};

// Multiply-add in fp32.
template <typename T>
struct PixelScalarMath {
  using Element = T;
  static constexpr bool kExists = ScalarMath<T>::kExists;
  static constexpr int kFirstShape = 1;
  static constexpr int kStepK = 2;
  static constexpr int32_t kChainSteps = kScalarChainPixels / kStepPixels<T>;
  using A = float[kStepK][2];  // rows g, g + 8
  using B = float[kStepK][4];  // columns 2t, 2t + 1, 2t + 8, 2t + 9

  // All lanes read one pixel.
  static __device__ __forceinline__ int slot_key(int /*pixel*/) { return 0; }

  static __device__ __forceinline__ void load_a(A& a, const char* tile, int row, int step) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int k = 0; k < kStepK; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* from = pixel_element<PixelScalarMath>(tile, step * kStepK + k, row + 8 * i + g);
        a[k][i] = to_float(load_shared(from));
      }
    }
  }

  static __device__ __forceinline__ void load_b(B& b, const char* tile, int row, int step) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kStepK; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const T* from =
            pixel_element<PixelScalarMath>(tile, step * kStepK + k, row + 8 * i + 2 * t);
        const Vector<T, 2> pair = load_shared<2>(from);
#pragma unroll
        for (int e = 0; e < 2; ++e) b[k][2 * i + e] = to_float(pair.data[e]);
      }
    }
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b, int half) {
#pragma unroll
    for (int k = 0; k < kStepK; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = fmaf(a[k][i / 2], b[k][2 * half + i % 2], c[i]);
    }
    count_macs(4 * kStepK);
  }
};

}  // namespace inception_ext::kernels
