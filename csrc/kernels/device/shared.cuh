// Dynamic shared memory and plain accesses to it. Kernels make every one of them here, so that the
// emulator sees it; for the same reason they declare no __shared__ variable of their own.
#pragma once

#include "platform.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

// Start of the block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ char* dynamic_shared() {
#ifdef INCEPTION_EXT_EMULATE
  return static_cast<char*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(128) char inception_ext_dynamic_shared[];
  return inception_ext_dynamic_shared;
#endif
}

// The address that PTX instructions take.
#ifndef INCEPTION_EXT_EMULATE
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

template <typename T>
__device__ __forceinline__ T load_shared(const T* pointer, Place place = Place::current()) {
#ifdef INCEPTION_EXT_EMULATE
  emulator::read_shared(pointer, sizeof(T), place);
#endif
  return *pointer;
}

template <typename T>
__device__ __forceinline__ void store_shared(T* pointer, T value, Place place = Place::current()) {
#ifdef INCEPTION_EXT_EMULATE
  emulator::write_shared(pointer, sizeof(T), place);
#endif
  *pointer = value;
}

// kSize neighbouring elements in one instruction; the pointer is aligned to their size.
template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load_shared(const T* pointer,
                                                        Place place = Place::current()) {
  return load_shared(reinterpret_cast<const Vector<T, kSize>*>(pointer), place);
}

template <int kSize, typename T>
__device__ __forceinline__ void store_shared(T* pointer, const Vector<T, kSize>& vector,
                                             Place place = Place::current()) {
  store_shared(reinterpret_cast<Vector<T, kSize>*>(pointer), vector, place);
}

}  // namespace inception_ext::kernels
