// A block's share of an activation [P, C]: up to eight vectors of channels (32 channels where it
// cannot be read in vectors) of a chunk of the pixels. Its threads
// lie over vectors of channels, then over pixels; each keeps its vector and walks down the pixels,
// so that what belongs to a channel is loaded once.
#pragma once

#include <cstdint>

#include "global.cuh"
#include "platform.cuh"
#include "shared.cuh"
#include "types.cuh"

namespace inception_ext::kernels {

constexpr int kGroupThreads = 256;
constexpr int kMaxGroupChannels = 64;

// Shared memory holds what belongs to the group's channels in positions [0, channels), in an order
// that lets each thread read its vector in 16-byte accesses without a bank conflict: runs of up to
// four channels, the first runs of all vectors before the second ones.
template <int kVec>
struct ChannelGroup {
  static constexpr int kRun = kVec < 4 ? kVec : 4;
  static constexpr int kRuns = kVec / kRun;
  static constexpr int kMaxVectors = kVec == 1 ? 32 : 8;  // more would meet in a bank
  static constexpr int kSums = 2;                         // that are added up for each channel
  // As many parts as sums are long: shorter chains of additions, smaller rounding errors.
  static constexpr int kMaxPhases = 16;
  // Floats of shared memory that add_rows takes: what each thread has, then one a thread.
  static constexpr int kScratch = (kSums * kVec + 1) * kGroupThreads;

  // Groups that `channels` make.
  __host__ __device__ static int32_t count(int32_t channels) {
    return (channels / kVec + kMaxVectors - 1) / kMaxVectors;
  }

  __device__ __forceinline__ ChannelGroup(int32_t channels, int32_t group) {
    const int32_t vectors = channels / kVec, groups = count(channels);
    const int32_t most = (vectors + groups - 1) / groups;
    const int32_t left = vectors - group * most;
    first = group * most * kVec;
    width = left < most ? left : most;
    rows = kGroupThreads / width;
    row = threadIdx.x / width;
    column = threadIdx.x % width;
  }

  // Whether the thread has pixels to work on.
  __device__ __forceinline__ bool is_active() const { return row < rows; }
  // The first channel of the thread's vector.
  __device__ __forceinline__ int32_t channel() const { return first + column * kVec; }
  __device__ __forceinline__ int32_t size() const { return width * kVec; }

  // The channel at a position.
  __device__ __forceinline__ int32_t channel_at(int32_t position) const {
    const int32_t length = width * kRun, rest = position % length;
    return first + rest / kRun * kVec + position / length * kRun + rest % kRun;
  }

  // The thread's vector out of [size()].
  __device__ __forceinline__ void read(const float* shared, float (&values)[kVec]) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const Vector<float, kRun> run = load_shared<kRun>(shared + (r * width + column) * kRun);
#pragma unroll
      for (int e = 0; e < kRun; ++e) values[r * kRun + e] = run.data[e];
    }
  }

  // What a thread adds up in add_rows: `sum`, at `position`, of all `rows`; others have a part.
  struct Cell {
    int32_t sum;
    int32_t position;
    int32_t phase;   // takes the rows phase, phase + phases, ...
    int32_t phases;  // the last threads of each run have none: phase = phases
    int32_t run;     // sum * kRuns + run of the position
    int32_t offset;  // from the start of the run
  };
  __device__ __forceinline__ Cell cell() const {
    constexpr int kSlot = kGroupThreads / (kSums * kRuns);
    const int32_t length = width * kRun, slot = threadIdx.x % kSlot;
    Cell cell;
    cell.run = threadIdx.x / kSlot;
    cell.phase = slot / length;
    cell.phases = kSlot / length < kMaxPhases ? kSlot / length : kMaxPhases;
    cell.offset = slot % length;
    cell.sum = cell.run / kRuns;
    cell.position = cell.run % kRuns * length + cell.offset;
    return cell;
  }

  // The sum of load(row) over `rows` of the cell, in a fixed order; valid where cell.phase is 0.
  // scratch: [kGroupThreads].
  template <typename Load>
  __device__ __forceinline__ float add_rows(const Cell& cell, int32_t rows, float* scratch,
                                            const Load& load) const {
    float total = 0;
    if (cell.phase < cell.phases) {
#pragma unroll 8
      for (int32_t i = cell.phase; i < rows; i += cell.phases) total += load(i);
    }
    store_shared(scratch + threadIdx.x, total);
    __syncthreads();
    if (cell.phase == 0) {
      for (int32_t i = 1; i < cell.phases; ++i) {
        total += load_shared(scratch + threadIdx.x + i * width * kRun);
      }
    }
    return total;
  }

  // The sums of the block's active threads. scratch: [kScratch].
  __device__ __forceinline__ float add_threads(const Cell& cell, const float (&sums)[kSums][kVec],
                                               float* scratch) const {
    if (is_active()) {
#pragma unroll
      for (int q = 0; q < kSums * kRuns; ++q) {
        Vector<float, kRun> run;
#pragma unroll
        for (int e = 0; e < kRun; ++e) run.data[e] = sums[q / kRuns][q % kRuns * kRun + e];
        store_shared<kRun>(scratch + (q * kGroupThreads + threadIdx.x) * kRun, run);
      }
    }
    __syncthreads();
    const float* own = scratch + cell.run * kGroupThreads * kRun + cell.offset;
    return add_rows(cell, rows, scratch + kSums * kVec * kGroupThreads,
                    [&](int32_t row) { return load_shared(own + row * width * kRun); });
  }

  int32_t first;  // channel
  int32_t width;  // vectors
  int32_t rows;   // pixels at once
  int32_t row;    // of the thread
  int32_t column;
};

// use(i, load(i)) for i = begin, begin + step, ... < end, with kUnroll loads under way at once.
template <int kUnroll, typename Index, typename Load, typename Use>
__device__ __forceinline__ void walk(Index begin, Index end, Index step, const Load& load,
                                     const Use& use) {
  Index i = begin;
#pragma unroll 1
  for (; i + (kUnroll - 1) * step < end; i += kUnroll * step) {
    decltype(load(i)) values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) values[u] = load(i + u * step);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) use(i + u * step, values[u]);
  }
#pragma unroll 1
  for (; i < end; i += step) use(i, load(i));
}

}  // namespace inception_ext::kernels
