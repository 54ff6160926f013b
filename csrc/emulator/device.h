// What emulated kernels call: the host twins behind csrc/kernels/device/*.cuh.
//
// Each function acts for the CUDA thread that calls it. `place` is the line of the kernel, which
// every report names.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

#include "place.h"

namespace inception_ext::emulator {

constexpr uint32_t kFullWarp = 0xffffffffu;

uint3 thread_index();
uint3 block_index();
dim3 block_extent();
dim3 grid_extent();

// Block-wide barrier; threads that have returned are not waited for.
void sync_block(Place place);
// Named barrier 1 ... 15 of `threads` threads, a multiple of 32. `wait` = false only arrives.
void sync_named(int barrier, int threads, bool wait, Place place);
void sync_warp(uint32_t mask, Place place);

enum class Shuffle { kIndex, kUp, kDown, kXor };
// The bits that the lane chosen by `kind` and `lane` passes, in groups of `width` lanes.
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t bits, int lane, int width, Place place);
// The lanes of `mask` whose predicate holds.
uint32_t ballot(uint32_t mask, bool predicate, Place place);

// Start of the block's dynamic shared memory, aligned to 1024 bytes, and its size.
void* dynamic_shared();
size_t dynamic_shared_bytes();

// Before a plain access: aligned to its size, inside its memory, no race.
void read_shared(const void* pointer, size_t bytes, Place place);
void write_shared(const void* pointer, size_t bytes, Place place);
void read_global(const void* pointer, size_t bytes, Place place);
void write_global(const void* pointer, size_t bytes, Place place);

// Of the device that is emulated: 75, 80, 90 and so on.
int compute_capability();

// Before an atomic addition to global memory.
void update_global(const void* pointer, size_t bytes, Place place);

// cp.async: `bytes` of shared memory become `valid` bytes from global memory and zeros, when the
// thread waits for the group that the copy was committed to; at once below compute capability 8.0.
void copy_async(void* shared, const void* global, int bytes, int valid, Place place);
void commit_copies();
// Completes all committed groups but the newest `pending`.
void wait_copies(int pending);

// ldmatrix of `count` 8x8 matrices of 16-bit elements; `row` is this lane's row address.
void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Place place);

enum class MmaShape {
  kM16N8K16Half,
  kM16N8K16Bfloat16,
  kM16N8K8Half,
  kM16N8K8Tf32,
};
// c [4] += a * b over the warp, in the register layout of mma.sync.
void mma(MmaShape shape, float* c, const uint32_t* a, const uint32_t* b, Place place);

// To 10 bits of mantissa, nearest, ties away from zero; infinities and NaN stay.
uint32_t round_to_tf32(float value);

// Multiply-accumulates that this thread issues outside mma.
void count_macs(int64_t macs);

}  // namespace inception_ext::emulator
