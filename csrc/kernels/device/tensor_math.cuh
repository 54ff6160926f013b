// Products of operand tiles (tile.cuh), on tensor cores or on the scalar units, with one interface:
//
//   Math::A a;  Math::B b;
//   Math::load_a(a, tile, row, step);   // A [16, kStepK]: rows from `row`, a multiple of 8
//   Math::load_b(b, tile, row, step);   // B [16, kStepK]: columns from `row`, a multiple of 8
//   Math::multiply(c, a, b, half);      // C [16, 8] += A * (columns 8 * half ... of B)^T
//
// A step is kStepChunks 16-byte chunks of K. Whatever the math, lane 4 * g + t holds of C the
// columns 2t and 2t + 1 of row g in c[0], c[1], and of row g + 8 in c[2], c[3].
//
// kFirstShape: of kTileShapes, the largest tile whose accumulators and operands fit the registers.
// kExists: whether launchers choose it on the architecture that is compiled for. Where they do not,
// kernels are left empty.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "mma.cuh"
#include "platform.cuh"
#include "shared.cuh"
#include "tile.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

// mma.sync: fp16 and bf16 exactly, float rounded to TF32; sums in fp32.
template <typename T>
struct TensorMath {
  using Element = T;
  using A = uint32_t[4];
  using B = uint32_t[4];
  static constexpr bool kExists =
      std::is_same_v<T, __half> || kArchitecture == 0 || kArchitecture >= 800;
  static constexpr int kFirstShape = 0;
  static constexpr int kStepChunks = 2;
  static constexpr int kStepK = kStepChunks * kChunkBytes / sizeof(T);

  static __device__ __forceinline__ void load_a(A& a, const char* tile, int row, int step) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, tile + row * kRowBytes + chunk_offset(lane % 16, step * 2 + lane / 16));
    round(a);
  }

  static __device__ __forceinline__ void load_b(B& b, const char* tile, int row, int step) {
    const int lane = threadIdx.x % 32;
    load_matrices(b, tile + row * kRowBytes +
                         chunk_offset(lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
    round(b);
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b, int half) {
    const uint32_t columns[2] = {b[2 * half], b[2 * half + 1]};
    if constexpr (std::is_same_v<T, float>) {
      mma_m16n8k8_tf32(c, a, columns);
    } else {
      mma_m16n8k16<T>(c, a, columns);
    }
  }

 private:
  static __device__ __forceinline__ void round(uint32_t (&registers)[4]) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (uint32_t& bits : registers) bits = to_tf32(bits_to_float(bits));
    }
  }
};

// Multiply-add in fp32: exact products for float, and what devices without bf16 tensor cores have.
template <typename T>
struct ScalarMath {
  using Element = T;
  static constexpr bool kExists = std::is_same_v<T, float> || kArchitecture < 800;
  static constexpr int kFirstShape = 1;
  static constexpr int kStepChunks = 1;
  static constexpr int kStepK = kChunkBytes / sizeof(T);
  using A = Vector<T, kStepK>[2];  // rows g, g + 8
  using B = Vector<T, kStepK>[4];  // columns 2t, 2t + 1, 2t + 8, 2t + 9

  static __device__ __forceinline__ void load_a(A& a, const char* tile, int row, int step) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) a[i] = load(tile + (row + 8 * i) * kRowBytes, g, step);
  }

  static __device__ __forceinline__ void load_b(B& b, const char* tile, int row, int step) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i] = load(tile + (row + i / 2 * 8) * kRowBytes, 2 * t + i % 2, step);
    }
  }

  static __device__ __forceinline__ void multiply(float (&c)[4], const A& a, const B& b, int half) {
#pragma unroll
    for (int k = 0; k < kStepK; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        c[i] = fmaf(to_float(a[i / 2].data[k]), to_float(b[2 * half + i % 2].data[k]), c[i]);
      }
    }
    count_macs(4 * kStepK);
  }

 private:
  static __device__ __forceinline__ Vector<T, kStepK> load(const char* tile, int row, int chunk) {
    return load_shared<kStepK>(reinterpret_cast<const T*>(tile + chunk_offset(row, chunk)));
  }
};

}  // namespace inception_ext::kernels
