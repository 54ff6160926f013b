// Operand tiles in shared memory: rows of 64 bytes of K, in four 16-byte chunks.
//
// Two rows share the 128 bytes that the 32 banks deliver at once. Which of the eight slots a chunk
// takes depends on its row, so that each of these is free of bank conflicts:
//   - eight consecutive rows, from a multiple of 8 on, at one chunk (ldmatrix)
//   - all chunks of rows 2i and 2i + 1 (what eight lanes copy from global memory)
//   - all chunks of rows i and i + 4 (what eight lanes of the max pool prologue read)
#pragma once

#include "platform.cuh"

namespace inception_ext::kernels {

constexpr int kChunkBytes = 16;
constexpr int kRowChunks = 4;
constexpr int kRowBytes = kRowChunks * kChunkBytes;

// Bytes from the start of a tile, which is aligned to 128. The pattern repeats every eight rows.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  const int half = (row ^ row >> 2) & 1;
  return (row >> 1) * 128 + (half * kRowChunks + (chunk ^ (row >> 1 & 3))) * kChunkBytes;
}

}  // namespace inception_ext::kernels
