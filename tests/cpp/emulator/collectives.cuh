// What the twins of the warp's and the block's collectives compute, written out for a comparison.
#pragma once

#include "../../../csrc/kernels/device/async_copy.cuh"
#include "../../../csrc/kernels/device/global.cuh"
#include "../../../csrc/kernels/device/mma.cuh"
#include "../../../csrc/kernels/device/shared.cuh"
#include "../../../csrc/kernels/device/sync.cuh"
#include "../../../csrc/kernels/launch.h"

namespace inception_ext::kernels {

// y [9, 32]: the exchanges of one warp, see the test.
__global__ void exchanges(const int* x, int* y) {
  const unsigned lane = threadIdx.x, full = 0xffffffffu;
  const int value = load_global(x + lane);
  const auto put = [&](int row, int result) { store_global(y + row * 32 + lane, result); };
  put(0, __shfl_sync(full, value, 5));
  put(1, __shfl_sync(full, value, static_cast<int>(lane) + 3, 8));
  put(2, __shfl_up_sync(full, value, 2, 16));
  put(3, __shfl_down_sync(full, value, 3));
  put(4, __shfl_xor_sync(full, value, 9));
  put(5, static_cast<int>(__ballot_sync(full, value % 3 == 0)));
  put(6, __any_sync(full, value == 1000) * 2 + __all_sync(full, value >= 0));
  // Each half of the warp on its own, by its own mask.
  if (lane < 16) {
    put(7, __shfl_xor_sync(0x0000ffffu, value, 1));
    put(8, static_cast<int>(__ballot_sync(0x0000ffffu, lane & 1)));
  } else {
    put(7, __shfl_xor_sync(0xffff0000u, value, 2));
    put(8, static_cast<int>(__ballot_sync(0xffff0000u, lane & 2)));
  }
}

// Warp 0 fills one of two buffers while warps 1 and 2 read the other: y [rounds, 2, 32] = 2 x.
__global__ void producer_and_consumers(const int* x, int* y, int rounds) {
  int* buffers = reinterpret_cast<int*>(dynamic_shared());  // [2, 32]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int round = 0; round < rounds; ++round) {
    int* buffer = buffers + round % 2 * 32;
    if (warp == 0) {
      if (round >= 2) round % 2 ? sync_named<4>(96) : sync_named<3>(96);  // buffer is free
      store_shared(buffer + lane, 2 * load_global(x + round * 32 + lane));
      round % 2 ? arrive_named<2>(96) : arrive_named<1>(96);  // buffer is full
    } else {
      round % 2 ? sync_named<2>(96) : sync_named<1>(96);
      const int value = load_shared(buffer + (lane ^ 1));
      store_global(y + (round * 2 + warp - 1) * 32 + (lane ^ 1), value);
      if (round + 2 < rounds) round % 2 ? arrive_named<4>(96) : arrive_named<3>(96);
    }
  }
}

// y [128] = the sum of x [blocks, 128] over the blocks, in their order: each writes its part to
// memory, and the one that comes last adds up. The counter starts as 0 and is left so.
__global__ void add_up_blocks(const float* x, float* parts, int* counter, float* y) {
  using Part = Vector<float, 4>;
  int* order = reinterpret_cast<int*>(dynamic_shared());
  Part* all = reinterpret_cast<Part*>(parts);
  store_global(all + blockIdx.x * 32 + threadIdx.x,
               load_global<4>(x + blockIdx.x * 128 + threadIdx.x * 4));
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) store_shared(order, add_global(counter, 1));
  __syncthreads();
  const int last = static_cast<int>(gridDim.x) - 1;
  if (load_shared(order) != last) return;
  __threadfence();
  Part sum{};
  for (int block = 0; block <= last; ++block) {
    const Part part = load_global_coherent(all + block * 32 + threadIdx.x);
    for (int i = 0; i < 4; ++i) sum.data[i] += part.data[i];
  }
  store_global<4>(y + threadIdx.x * 4, sum);
  if (threadIdx.x == 0) store_global(counter, 0);
}

// How a 16 x 8 tile of C = A * B is computed.
enum class Tile {
  kTransposedB,  // m16n8k16, B [16, 8] through ldmatrix.trans
  kNarrow,       // m16n8k8 twice, as sm_75 has it, B^T [8, 16]
  kTf32,         // m16n8k8 twice in TF32, B^T [8, 16]
};

// One warp. a [16, 16], b as the kind says, c [16, 8], T = __half; float for kTf32.
template <Tile kTile, typename T>
__global__ void multiply_tile(const T* a, const T* b, float* c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float sums[4] = {};
  if constexpr (kTile == Tile::kTf32) {
    for (int k = 0; k < 16; k += 8) {
      uint32_t a_fragment[4], b_fragment[2];
      for (int i = 0; i < 4; ++i) {
        a_fragment[i] = to_tf32(load_global(a + (g + i % 2 * 8) * 16 + k + t + i / 2 * 4));
      }
      for (int i = 0; i < 2; ++i) b_fragment[i] = to_tf32(load_global(b + g * 16 + k + t + i * 4));
      mma_m16n8k8_tf32(sums, a_fragment, b_fragment);
    }
  } else {
    T* a_shared = reinterpret_cast<T*>(dynamic_shared());  // [16, 16]
    T* b_shared = a_shared + 16 * 16;                      // [16, 8] or [8, 16]
    copy_async<16>(a_shared + lane * 8, a + lane * 8);
    if (lane < 16) copy_async<8>(b_shared + lane * 8, b + lane * 8);
    if (lane < 16) copy_async<4>(b_shared + lane * 8 + 4, b + lane * 8 + 4);
    if (lane < 16) copy_async<4>(b_shared + lane * 8 + 6, b + lane * 8 + 6);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    if constexpr (kTile == Tile::kTransposedB) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
      uint32_t a_fragment[4], b_fragment[2];
      load_matrices(a_fragment, a_shared + lane % 16 * 16 + lane / 16 * 8);
      load_matrices<2, true>(b_fragment, b_shared + lane % 16 * 8);
      mma_m16n8k16<T>(sums, a_fragment, b_fragment);
#endif
    } else {
      for (int k = 0; k < 16; k += 8) {
        uint32_t a_fragment[2], b_fragment[1];
        load_matrices(a_fragment, a_shared + lane % 16 * 16 + k);
        load_matrices(b_fragment, b_shared + lane % 8 * 16 + k);
        mma_m16n8k8(sums, a_fragment, b_fragment[0]);
      }
    }
  }
  for (int i = 0; i < 4; ++i) store_global(c + (g + i / 2 * 8) * 8 + 2 * t + i % 2, sums[i]);
}

}  // namespace inception_ext::kernels
