// Plain accesses to global memory. Kernels make every one of them here, so that the emulator sees
// it: where, how many bytes, and by which line.
#pragma once

#include "platform.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

template <typename T>
__device__ __forceinline__ T load_global(const T* pointer, Place place = Place::current()) {
#ifdef INCEPTION_EXT_EMULATE
  emulator::read_global(pointer, sizeof(T), place);
#endif
  return *pointer;
}

template <typename T>
__device__ __forceinline__ void store_global(T* pointer, T value, Place place = Place::current()) {
#ifdef INCEPTION_EXT_EMULATE
  emulator::write_global(pointer, sizeof(T), place);
#endif
  *pointer = value;
}

// As load_global, of 16 bytes that another block of the same launch has written: past the L1 cache.
template <typename T>
__device__ __forceinline__ T load_global_coherent(const T* pointer,
                                                  Place place = Place::current()) {
  static_assert(sizeof(T) == sizeof(uint4));
#ifdef INCEPTION_EXT_EMULATE
  emulator::read_global(pointer, sizeof(T), place);
  return *pointer;
#else
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(pointer));
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
#endif
}

// Adds to a counter that other blocks add to as well; what it was before.
__device__ __forceinline__ int32_t add_global(int32_t* counter, int32_t value,
                                              Place place = Place::current()) {
#ifdef INCEPTION_EXT_EMULATE
  emulator::update_global(counter, sizeof(int32_t), place);
  return std::atomic_ref<int32_t>(*counter).fetch_add(value);
#else
  return atomicAdd(counter, value);
#endif
}

// kSize neighbouring elements in one instruction; the pointer is aligned to their size.
template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load_global(const T* pointer,
                                                        Place place = Place::current()) {
  return load_global(reinterpret_cast<const Vector<T, kSize>*>(pointer), place);
}

template <int kSize, typename T>
__device__ __forceinline__ void store_global(T* pointer, const Vector<T, kSize>& vector,
                                             Place place = Place::current()) {
  store_global(reinterpret_cast<Vector<T, kSize>*>(pointer), vector, place);
}

}  // namespace inception_ext::kernels
