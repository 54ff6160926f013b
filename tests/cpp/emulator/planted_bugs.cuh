// Kernels with one bug each, and without it: y [128] = x [128] backwards, in one block.
//
// The line that the emulator has to name carries the marker "bug: <kernel>".
#pragma once

#include "../../../csrc/kernels/device/async_copy.cuh"
#include "../../../csrc/kernels/device/global.cuh"
#include "../../../csrc/kernels/device/mma.cuh"
#include "../../../csrc/kernels/device/shared.cuh"
#include "../../../csrc/kernels/device/sync.cuh"
#include "../../../csrc/kernels/launch.h"

namespace inception_ext::kernels {

constexpr int kCount = 128;
constexpr int kBufferBytes = kCount * sizeof(float);

template <bool kBroken>
__global__ void missing_barrier(const float* x, float* y) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared());
  store_shared(buffer + threadIdx.x, load_global(x + threadIdx.x));
  if (!kBroken) __syncthreads();
  const float value = load_shared(buffer + kCount - 1 - threadIdx.x);  // bug: missing_barrier
  store_global(y + threadIdx.x, value);
}

// The second round overwrites what other threads may still read.
template <bool kBroken>
__global__ void missing_barrier_before_reuse(const float* x, float* y) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared());
  store_shared(buffer + threadIdx.x, load_global(x + threadIdx.x));
  __syncthreads();
  const float value = load_shared(buffer + kCount - 1 - threadIdx.x);
  if (!kBroken) __syncthreads();
  store_shared(buffer + threadIdx.x, value);  // bug: missing_barrier_before_reuse
  __syncthreads();
  store_global(y + threadIdx.x, load_shared(buffer + threadIdx.x));
}

template <bool kBroken>
__global__ void missing_copy_wait(const float* x, float* y) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared());
  copy_async<4>(buffer + threadIdx.x, x + threadIdx.x);
  commit_copies();
  if (!kBroken) wait_copies<0>();
  __syncthreads();
  const float value = load_shared(buffer + kCount - 1 - threadIdx.x);  // bug: missing_copy_wait
  store_global(y + threadIdx.x, value);
}

// Waits, but for the group before the one that is read.
template <bool kBroken>
__global__ void wait_for_too_few_groups(const float* x, float* y) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared());
  if (threadIdx.x < kCount / 2) copy_async<4>(buffer + threadIdx.x, x + threadIdx.x);
  commit_copies();
  if (threadIdx.x >= kCount / 2) copy_async<4>(buffer + threadIdx.x, x + threadIdx.x);
  commit_copies();
  wait_copies<kBroken ? 1 : 0>();
  __syncthreads();
  const float value =
      load_shared(buffer + kCount - 1 - threadIdx.x);  // bug: wait_for_too_few_groups
  store_global(y + threadIdx.x, value);
}

template <bool kBroken>
__global__ void shared_overrun(const float* x, float* y) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared());
  const int shift = kBroken && threadIdx.x == kCount - 1 ? 1 : 0;
  store_shared(buffer + threadIdx.x + shift, load_global(x + threadIdx.x));  // bug: shared_overrun
  __syncthreads();
  store_global(y + threadIdx.x, load_shared(buffer + kCount - 1 - threadIdx.x));
}

template <bool kBroken>
__global__ void global_write_overrun(const float* x, float* y) {
  for (int i = threadIdx.x; i < kCount + (kBroken ? 1 : 0); i += kCount) {
    const float value = load_global(x + (i < kCount ? kCount - 1 - i : 0));
    store_global(y + i, value);  // bug: global_write_overrun
  }
}

template <bool kBroken>
__global__ void global_read_overrun(const float* x, float* y) {
  const int last = kBroken ? kCount : kCount - 1;
  const float value = load_global(x + last - threadIdx.x);  // bug: global_read_overrun
  store_global(y + threadIdx.x, value);
}

template <bool kBroken>
__global__ void copy_overrun(const float* x, float* y) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared());
  const bool missing = kBroken && threadIdx.x == kCount / 4 - 1;
  if (threadIdx.x < kCount / 4) {
    const float* from = x + threadIdx.x * 4 + (missing ? 4 : 0);
    copy_async<16>(buffer + threadIdx.x * 4, from);  // bug: copy_overrun
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  store_global(y + threadIdx.x, load_shared(buffer + kCount - 1 - threadIdx.x));
}

template <bool kBroken>
__global__ void misaligned_vector(const float* x, float* y) {
  const int i = threadIdx.x / 2 * 2;
  if (threadIdx.x % 2 == 1) return;
  const int first = kBroken && i == 0 ? 1 : i;
  const Vector<float, 2> pair = load_global<2>(x + first);  // bug: misaligned_vector
  store_global<2>(y + kCount - 2 - i, Vector<float, 2>{{pair.data[1], pair.data[0]}});
}

template <bool kBroken>
__global__ void write_to_input(const float* x, float* y) {
  float* target = kBroken && threadIdx.x == 9 ? const_cast<float*>(x) : y;
  const float value = load_global(x + kCount - 1 - threadIdx.x);
  store_global(target + threadIdx.x, value);  // bug: write_to_input
}

template <bool kBroken>
__global__ void read_of_unwritten(const float* x, float* y) {
  float value = load_global(x + kCount - 1 - threadIdx.x);
  if (kBroken && threadIdx.x == 77) {
    value += load_global(y + threadIdx.x);  // bug: read_of_unwritten
  }
  store_global(y + threadIdx.x, value);
}

template <bool kBroken>
__global__ void unwritten_output(const float* x, float* y) {
  if (kBroken && threadIdx.x == 5) return;
  store_global(y + threadIdx.x, load_global(x + kCount - 1 - threadIdx.x));
}

template <bool kBroken>
__global__ void divergent_barrier(const float* x, float* y) {
  if (!kBroken || threadIdx.x < 64) __syncthreads();  // bug: divergent_barrier
  store_global(y + threadIdx.x, load_global(x + kCount - 1 - threadIdx.x));
  __syncthreads();
}

// Half of a warp goes to one barrier and half to another.
template <bool kBroken>
__global__ void barrier_in_half_a_warp(const float* x, float* y) {
  if (!kBroken || threadIdx.x % 32 < 16) __syncthreads();  // bug: barrier_in_half_a_warp
  store_global(y + threadIdx.x, load_global(x + kCount - 1 - threadIdx.x));
  __syncthreads();
}

template <bool kBroken>
__global__ void race_in_a_warp(const float* x, float* y) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared());
  store_shared(buffer + threadIdx.x, load_global(x + threadIdx.x));
  if (!kBroken) __syncwarp();
  const float value = load_shared(buffer + (threadIdx.x ^ 31));  // bug: race_in_a_warp
  store_global(y + (threadIdx.x ^ 96), value);
}

// A fourth of the bytes of one word by each of four threads is no race; two threads on one is.
template <bool kBroken>
__global__ void race_on_a_byte(const float* x, float* y) {
  char* buffer = dynamic_shared();
  const int thread = static_cast<int>(threadIdx.x);
  const int byte = kBroken && thread == 70 ? 71 : thread;
  store_shared(buffer + byte, static_cast<char>(thread));  // bug: race_on_a_byte
  __syncthreads();
  const int partner = load_shared(buffer + kCount - 1 - thread);
  store_global(y + thread, load_global(x + partner));
}

template <bool kBroken>
__global__ void divergent_shuffle(const float* x, float* y) {
  const float value = load_global(x + threadIdx.x);
  if (kBroken && threadIdx.x % 32 < 7) __syncwarp();  // bug: divergent_shuffle
  store_global(y + (threadIdx.x ^ 96), __shfl_xor_sync(0xffffffffu, value, 31));
}

template <bool kBroken>
__global__ void barrier_for_too_many(const float* x, float* y) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared());
  store_shared(buffer + threadIdx.x, load_global(x + threadIdx.x));
  sync_named<3>(kBroken ? kCount + 32 : kCount);  // bug: barrier_for_too_many
  store_global(y + threadIdx.x, load_shared(buffer + kCount - 1 - threadIdx.x));
}

template <bool kBroken>
__global__ void matrix_load_in_part_of_a_warp(const float* x, float* y) {
  char* buffer = dynamic_shared();
  store_shared(reinterpret_cast<float*>(buffer) + threadIdx.x, 0.0f);
  __syncthreads();
  store_global(y + threadIdx.x, load_global(x + kCount - 1 - threadIdx.x));
  if (kBroken && threadIdx.x == 40) return;
  uint32_t registers[4];
  load_matrices(registers, buffer + threadIdx.x % 32 * 16);  // bug: matrix_load_in_part_of_a_warp
}

}  // namespace inception_ext::kernels
