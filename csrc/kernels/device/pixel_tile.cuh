// Operand tiles of a GEMM that contracts over pixels, as NHWC tensors lie in memory: every row is a
// pixel, 128 bytes of its channels in eight 16-byte chunks. Wider tiles are panels of such rows,
// one after the other.
//
// Which of the eight slots a chunk takes is up to its pixel and to the math, so that each of these
// is free of bank conflicts:
//   - all chunks of one pixel (what eight lanes copy from global memory)
//   - 16 bits: eight consecutive pixels, from a multiple of 8 on, at one chunk (ldmatrix)
//   - TF32: eight channels, from a multiple of 8 on, of four consecutive pixels, from a multiple of
//     4 on (what the lanes of a fragment read)
#pragma once

#include "../tile_plan.h"
#include "platform.cuh"
#include "tile.cuh"

namespace inception_ext::kernels {

constexpr int kPanelChunks = 8;
constexpr int kPanelRowBytes = kPanelChunks * kChunkBytes;

// Pixels of one step: as many as a step of K has elements elsewhere (tile.cuh).
template <typename T>
constexpr int kStepPixels = kRowBytes / sizeof(T);

// Bytes from the start of a tile of `pixels` rows to a chunk of one of them. Math
// (pixel_math.cuh) knows which slots suit its reads.
template <typename Math>
__device__ __forceinline__ int pixel_chunk_offset(int pixels, int pixel, int chunk) {
  return (chunk / kPanelChunks * pixels + pixel) * kPanelRowBytes +
         (chunk % kPanelChunks ^ Math::slot_key(pixel)) * kChunkBytes;
}

// Which part of a tile of kChannels a thread copies or prepares: one chunk, always the same, of
// kPixels of a step's pixels.
template <typename T, int kChannels>
struct PixelShare {
  static constexpr int kVec = kChunkBytes / sizeof(T);
  static constexpr int kChunks = kChannels / kVec;
  static constexpr int kRows = kTileThreads / kChunks;  // pixels that the block takes at once
  static constexpr int kPixels = kStepPixels<T> / kRows;
  static_assert(kTileThreads % kChunks == 0 && kStepPixels<T> % kRows == 0);

  static __device__ __forceinline__ int chunk() { return threadIdx.x % kChunks; }
  static __device__ __forceinline__ int channel() { return chunk() * kVec; }
  static __device__ __forceinline__ int row() { return threadIdx.x / kChunks; }
};

}  // namespace inception_ext::kernels
