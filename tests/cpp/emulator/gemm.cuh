// C [M, N] = A [M, K] * B [N, K]^T + bias [N] on tensor cores: the kernel that the emulator's tests
// measure and break.
//
// 64 x 64 x 64 tiles, four warps, three stages of cp.async, shared memory in rows of 128 bytes
// whose 16-byte chunks are swizzled by the row. K is a multiple of 8, N of 2.
#pragma once

#include "../../../csrc/kernels/device/async_copy.cuh"
#include "../../../csrc/kernels/device/global.cuh"
#include "../../../csrc/kernels/device/mma.cuh"
#include "../../../csrc/kernels/device/shared.cuh"
#include "../../../csrc/kernels/launch.h"

namespace inception_ext::kernels {

// What a variant of the kernel leaves out.
enum class Fault { kNone, kNoWait, kNoBarrier, kNoBarrierBeforeEpilogue, kNoSwizzle };

template <typename T>
struct GemmParams {
  const T* a;         // [M, K]
  const T* b;         // [N, K]
  const float* bias;  // [N]
  T* c;               // [M, N]
  int m, n, k;
};

constexpr int kTile = 64;
constexpr int kGemmThreads = 128;
constexpr int kStages = 3;
constexpr int kChunks = kTile / 8;  // of 8 elements, in a row
constexpr int kStageElements = 2 * kTile * kTile;
constexpr int kGemmSharedBytes = kStages * kStageElements * 2;

template <Fault kFault>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kTile + (kFault == Fault::kNoSwizzle ? chunk : chunk ^ (row % kChunks)) * 8;
}

// Rows [first, first + 64) and columns [k0, k0 + 64) of from [rows, k], zero outside.
template <Fault kFault, typename T>
__device__ __forceinline__ void load_tile(T* shared, const T* from, int first, int rows, int k0,
                                          int k) {
  for (int i = threadIdx.x; i < kTile * kChunks; i += kGemmThreads) {
    const int row = i / kChunks, chunk = i % kChunks, column = k0 + chunk * 8;
    const bool inside = first + row < rows && column < k;
    const T* pointer = inside ? from + int64_t{first + row} * k + column : from;
    copy_async<16>(shared + swizzled<kFault>(row, chunk), pointer, inside ? 16 : 0);
  }
}

template <typename T, Fault kFault>
__global__ void __launch_bounds__(kGemmThreads)
    gemm_kernel(const __grid_constant__ GemmParams<T> p) {
  T* shared = reinterpret_cast<T*>(dynamic_shared());
  const int m0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % 2 * 32, warp_n = warp / 2 * 32;
  const int steps = (p.k + kTile - 1) / kTile;
  const auto load_stage = [&](int step) {
    T* stage = shared + step % kStages * kStageElements;
    if (step < steps) {
      load_tile<kFault>(stage, p.a, m0, p.m, step * kTile, p.k);
      load_tile<kFault>(stage + kTile * kTile, p.b, n0, p.n, step * kTile, p.k);
    }
    commit_copies();
  };

  float sums[2][4][4] = {};  // [m / 16, n / 8, C register]
  for (int step = 0; step < kStages - 1; ++step) load_stage(step);
  for (int step = 0; step < steps; ++step) {
    if (kFault != Fault::kNoWait) wait_copies<kStages - 2>();
    if (kFault != Fault::kNoBarrier) __syncthreads();
    load_stage(step + kStages - 1);
    const T* a_tile = shared + step % kStages * kStageElements;
    const T* b_tile = a_tile + kTile * kTile;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp_m + i * 16 + lane % 16;
        load_matrices(a[i], a_tile + swizzled<kFault>(row, chunk + lane / 16));
        const int column = warp_n + i * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(b[i], b_tile + swizzled<kFault>(column, chunk + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mma_m16n8k16<T>(sums[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
        }
      }
    }
  }

  // Through shared memory, so that a warp writes whole rows. Eight more elements a row keep the
  // rows of a fragment in different banks.
  wait_copies<0>();
  if (kFault != Fault::kNoBarrierBeforeEpilogue) __syncthreads();
  constexpr int kRow = kTile + 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m + i * 16 + lane / 4 + half * 8;
        const int column = warp_n + j * 8 + lane % 4 * 2;
        Vector<T, 2> pair = {};
        if (n0 + column < p.n) {
          const Vector<float, 2> bias = load_global<2>(p.bias + n0 + column);
          pair.data[0] = from_float<T>(sums[i][j][half * 2] + bias.data[0]);
          pair.data[1] = from_float<T>(sums[i][j][half * 2 + 1] + bias.data[1]);
        }
        store_shared<2>(shared + row * kRow + column, pair);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile / 2; i += kGemmThreads) {
    const int row = i / (kTile / 2), column = i % (kTile / 2) * 2;
    if (m0 + row < p.m && n0 + column < p.n) {
      const Vector<T, 2> pair = load_shared<2>(shared + row * kRow + column);
      store_global<2>(p.c + int64_t{m0 + row} * p.n + n0 + column, pair);
    }
  }
}

template <typename T, Fault kFault = Fault::kNone>
cudaError_t gemm(const GemmParams<T>& p, cudaStream_t stream) {
  const dim3 grid((p.m + kTile - 1) / kTile, (p.n + kTile - 1) / kTile);
  note_useful_macs(int64_t{p.m} * p.n * p.k);
  return launch(gemm_kernel<T, kFault>, grid, dim3(kGemmThreads), kGemmSharedBytes, stream, p);
}

}  // namespace inception_ext::kernels
