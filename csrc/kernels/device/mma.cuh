// ldmatrix and mma.sync. All 32 lanes of a warp call them together.
//
// Register layouts, with g = lane / 4 and t = lane % 4, two 16-bit elements to a register:
//   A [16, 16] row-major: a[0] = (g, 2t), a[1] = (g + 8, 2t), a[2] = (g, 2t + 8), a[3] = (g + 8, 2t
//   + 8) B [16, 8]:            b[0] = (2t, g), b[1] = (2t + 8, g), neighbours along k C [16, 8]
//   fp32:       c[0], c[1] = (g, 2t), (g, 2t + 1); c[2], c[3] = the same of row g + 8
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "platform.cuh"
#include "shared.cuh"

namespace inception_ext::kernels {

// kCount (1, 2 or 4) 8x8 matrices of 16-bit elements from shared memory. Lane 8 * i + r passes the
// address of row r of matrix i, 16 bytes each; registers[i] becomes elements (g, 2t), (g, 2t + 1)
// of matrix i, or of its transpose.
template <int kCount, bool kTransposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[kCount], const void* row,
                                              Place place = Place::current()) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#ifdef INCEPTION_EXT_EMULATE
  emulator::load_matrices(registers, kCount, kTransposed, row, place);
#else
  const uint32_t address = shared_address(row);
  if constexpr (kCount == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// c += a * b, m16n8k8, fp16 (sm_75 and later): the first half of the m16n8k16 registers.
__device__ __forceinline__ void mma_m16n8k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b,
                                            Place place = Place::current()) {
#ifdef INCEPTION_EXT_EMULATE
  emulator::mma(emulator::MmaShape::kM16N8K8Half, c, a, &b, place);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
#endif
}

// c += a * b, m16n8k16, T = __half or __nv_bfloat16. sm_75 multiplies __half in two halves of k,
// and has no __nv_bfloat16: launchers do not choose it there.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2],
                                             Place place = Place::current()) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
#ifdef INCEPTION_EXT_EMULATE
  using emulator::MmaShape;
  if (kHalf && emulator::compute_capability() < 80) {
    mma_m16n8k8(c, {a[0], a[1]}, b[0], place);
    mma_m16n8k8(c, {a[2], a[3]}, b[1], place);
  } else {
    emulator::mma(kHalf ? MmaShape::kM16N8K16Half : MmaShape::kM16N8K16Bfloat16, c, a, b, place);
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (kHalf) {
    mma_m16n8k8(c, {a[0], a[1]}, b[0]);
    mma_m16n8k8(c, {a[2], a[3]}, b[1]);
  } else {
    __trap();
  }
#else
  if constexpr (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// float -> tf32, rounded to nearest, ties away from zero (sm_80 and later).
__device__ __forceinline__ uint32_t to_tf32(float value) {
#ifdef INCEPTION_EXT_EMULATE
  return emulator::round_to_tf32(value);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return __float_as_uint(value);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// c += a * b, m16n8k8, tf32 (sm_80 and later), one element to a register:
// a[0] = (g, t), a[1] = (g + 8, t), a[2] = (g, t + 4), a[3] = (g + 8, t + 4);
// b[0] = (t, g), b[1] = (t + 4, g).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2],
                                                 Place place = Place::current()) {
#ifdef INCEPTION_EXT_EMULATE
  emulator::mma(emulator::MmaShape::kM16N8K8Tf32, c, a, b, place);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();  // launchers do not choose it there
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace inception_ext::kernels
