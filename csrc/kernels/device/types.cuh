// Element types and 16-byte vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "platform.cuh"

namespace inception_ext::kernels {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// float -> T, rounded to nearest even; NaN stays NaN.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Elements of T in one 16-byte access.
template <typename T>
constexpr int kVectorSize = 16 / sizeof(T);

// kSize neighbouring elements, moved by one instruction when aligned to their own size.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T data[kSize];
};

// Can a tensor be moved in vectors of kSize elements? Host side, for the launchers.
inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace inception_ext::kernels
