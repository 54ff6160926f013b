// Batch norm forward: the statistics of tiles of pixels, and apply + ReLU.
//
// Both move each value once and compute little, so that memory sets their time. See
// device/channel_group.cuh for who does what.
#include <cstdint>

#include "batch_norm.h"
#include "batch_norm_launch.h"
#include "device/batch_norm_vectors.cuh"
#include "device/channel_group.cuh"
#include "device/moments.cuh"
#include "device/shared.cuh"
#include "device/sync.cuh"
#include "launch.h"

namespace inception_ext::kernels {
namespace {

constexpr int kUnroll = 4;  // loads of a thread under way

// Welford's steps over a thread's pixels, then Chan's over the threads of a channel. Everything is
// held relative to the tile's first pixel, so that a large mean costs no digits.
//
// Grid: x over groups of channels, y over tiles.
template <typename T, int kVec>
__global__ void __launch_bounds__(kGroupThreads, 2)
    batch_norm_tile_statistics_kernel(const __grid_constant__ BatchNormTileStatisticsParams p,
                                      int64_t tile_pixels) {
  wait_for_previous_kernel();
  allow_next_kernel();
  using Group = ChannelGroup<kVec>;
  constexpr int kRun = Group::kRun, kRuns = Group::kRuns;
  const Group group(p.channels, blockIdx.x);
  const int64_t begin = blockIdx.y * tile_pixels;
  const int32_t size =
      static_cast<int32_t>(p.pixels - begin < tile_pixels ? p.pixels - begin : tile_pixels);
  const T* x = static_cast<const T*>(p.x) + begin * p.x_stride + group.channel();
  float* shared = reinterpret_cast<float*>(dynamic_shared());

  if (group.is_active()) {
    const Vector<T, kVec> first = load_global<kVec>(x);
    float mean[kVec] = {}, m2[kVec] = {}, count = 0;
    walk<kUnroll>(
        group.row, size, group.rows,
        [&](int32_t pixel) { return load_global<kVec>(x + pixel * p.x_stride); },
        [&](int32_t, const Vector<T, kVec>& values) {
          count += 1;
          const float share = 1 / count;
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            const float value = to_float(values.data[i]) - to_float(first.data[i]);
            const float delta = value - mean[i];
            mean[i] += delta * share;
            m2[i] += delta * (value - mean[i]);
          }
        });
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      Vector<float, kRun> means, squares;
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        means.data[e] = mean[r * kRun + e];
        squares.data[e] = m2[r * kRun + e];
      }
      float* own = shared + (r * kGroupThreads + threadIdx.x) * kRun;
      store_shared<kRun>(own, means);
      store_shared<kRun>(own + kVec * kGroupThreads, squares);
    }
  }
  __syncthreads();

  // A thread merges the rows phase, phase + phases, ... of one position, then one thread the
  // phases.
  constexpr int kSlot = kGroupThreads / kRuns;
  const int32_t length = group.width * kRun;
  const int32_t run = threadIdx.x / kSlot, slot = threadIdx.x % kSlot;
  const int32_t phase = slot / length, phases = kSlot / length;
  Moments moments;
  if (phase < phases) {
    for (int32_t row = phase; row < group.rows && row < size; row += phases) {
      const float* own = shared + run * kGroupThreads * kRun + row * length + slot % length;
      const int32_t count = (size - row + group.rows - 1) / group.rows;
      moments.merge(
          {static_cast<float>(count), load_shared(own), load_shared(own + kVec * kGroupThreads)});
    }
  }
  float* merged = shared + 2 * kVec * kGroupThreads + threadIdx.x;
  store_shared(merged, moments.count);
  store_shared(merged + kGroupThreads, moments.mean);
  store_shared(merged + 2 * kGroupThreads, moments.m2);
  __syncthreads();
  if (phase != 0) return;
  for (int32_t i = 1; i < phases; ++i) {
    const float* other = merged + i * length;
    moments.merge({load_shared(other), load_shared(other + kGroupThreads),
                   load_shared(other + 2 * kGroupThreads)});
  }
  const int32_t channel = group.channel_at(run * length + slot);
  const int64_t offset = int64_t{blockIdx.y} * p.channels + channel;
  store_global(p.tile_mean + offset, moments.mean);
  store_global(p.tile_m2 + offset, moments.m2);
}

// Grid: see BatchNormGrid.
template <typename T, int kVec>
__global__ void __launch_bounds__(kGroupThreads, 2)
    batch_norm_relu_apply_kernel(const __grid_constant__ BatchNormReluApplyParams p,
                                 const __grid_constant__ BatchNormGrid grid) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int32_t i = item_of_block(p, grid);
  const BatchNormReluItem& item = p.item[i];
  const auto group = group_of_block<kVec>(item, grid.first_group[i]);
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [3][kMaxGroupChannels]
  const BatchNormVectors<kVec> vectors(item, group, shared);
  if (!group.is_active()) return;

  const T* x = static_cast<const T*>(item.x) + group.channel();
  T* y = static_cast<T*>(item.y) + group.channel();
  const int64_t begin = blockIdx.y * grid.chunk_pixels;
  const int64_t left = p.pixels - begin;
  walk<kUnroll>(
      begin + group.row, begin + (left < grid.chunk_pixels ? left : grid.chunk_pixels),
      int64_t{group.rows},
      [&](int64_t pixel) { return load_global<kVec>(x + pixel * item.x_stride); },
      [&](int64_t pixel, const Vector<T, kVec>& values) {
        Vector<T, kVec> result;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          result.data[e] = from_float<T>(relu(vectors.normalise(e, to_float(values.data[e]))));
        }
        store_global(y + pixel * item.y_stride, result);
      });
}

template <typename T, int kVec>
cudaError_t launch_tile_statistics(const BatchNormTileStatisticsParams& p, cudaStream_t stream) {
  const dim3 grid(ChannelGroup<kVec>::count(p.channels), p.tiles);
  const size_t bytes = sizeof(float) * (2 * kVec + 3) * kGroupThreads;
  return launch_dependent(batch_norm_tile_statistics_kernel<T, kVec>, grid, dim3(kGroupThreads),
                          bytes, stream, p, (p.pixels + p.tiles - 1) / p.tiles);
}

template <typename T, int kVec>
cudaError_t launch_apply(const BatchNormReluApplyParams& p, cudaStream_t stream) {
  constexpr int64_t kBlocks = 1024, kLeastPixels = 256;
  BatchNormGrid grid = {};
  const int64_t groups = count_groups<kVec>(p, grid);
  if (groups == 0) return cudaSuccess;
  const int64_t chunks = count_chunks(p.pixels, groups, kBlocks, kLeastPixels);
  grid.chunk_pixels = (p.pixels + chunks - 1) / chunks;
  return launch_dependent(
      batch_norm_relu_apply_kernel<T, kVec>,
      dim3(static_cast<unsigned>(groups), static_cast<unsigned>(chunks)), dim3(kGroupThreads),
      sizeof(float) * BatchNormVectors<kVec>::kCount * kMaxGroupChannels, stream, p, grid);
}

}  // namespace

int64_t count_chunks(int64_t pixels, int64_t groups, int64_t blocks, int64_t least) {
  if (pixels == 0 || groups == 0) return 0;
  const int64_t wanted = blocks / groups < 1 ? 1 : blocks / groups;
  const int64_t even = (pixels + wanted - 1) / wanted;
  const int64_t chunk = even < least ? least : even;
  return (pixels + chunk - 1) / chunk;
}

int32_t batch_norm_chunks(int64_t pixels, int64_t channels) {
  // Each block of backward_apply adds up all chunks of its channels: two blocks for each of 132
  // multiprocessors fill the memory pipeline, and more only add sums.
  constexpr int64_t kBlocks = 264, kLeastPixels = 64;
  const int64_t groups = (channels + kMaxGroupChannels - 1) / kMaxGroupChannels;
  return static_cast<int32_t>(count_chunks(pixels, groups, kBlocks, kLeastPixels));
}

cudaError_t batch_norm_tile_statistics(const BatchNormTileStatisticsParams& p,
                                       cudaStream_t stream) {
  if (p.pixels < 0 || p.channels < 0 || !is_dtype(p.dtype)) return cudaErrorInvalidValue;
  if (p.pixels == 0 || p.channels == 0) return cudaSuccess;
  if (p.tiles != batch_norm_chunks(p.pixels, p.channels) || p.x == nullptr ||
      p.tile_mean == nullptr || p.tile_m2 == nullptr) {
    return cudaErrorInvalidValue;
  }
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return is_vectorizable<T>(p.x, p.x_stride, p.channels)
               ? launch_tile_statistics<T, kVectorSize<T>>(p, stream)
               : launch_tile_statistics<T, 1>(p, stream);
  });
}

cudaError_t batch_norm_relu_apply(const BatchNormReluApplyParams& p, cudaStream_t stream) {
  if (p.items < 0 || p.items > kMaxBatchNormItems || p.pixels < 0 || !is_dtype(p.dtype)) {
    return cudaErrorInvalidValue;
  }
  if (p.pixels == 0) return cudaSuccess;
  for (int i = 0; i < p.items; ++i) {
    const BatchNormReluItem& item = p.item[i];
    if (item.channels < 0) return cudaErrorInvalidValue;
    if (item.channels > 0 && (item.x == nullptr || item.y == nullptr || !has_vectors(item))) {
      return cudaErrorInvalidValue;
    }
  }
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool vectors = true;
    for (int i = 0; i < p.items; ++i) {
      const BatchNormReluItem& item = p.item[i];
      vectors = vectors && is_vectorizable<T>(item.x, item.x_stride, item.channels) &&
                is_vectorizable<T>(item.y, item.y_stride, item.channels);
    }
    return vectors ? launch_apply<T, kVectorSize<T>>(p, stream) : launch_apply<T, 1>(p, stream);
  });
}

}  // namespace inception_ext::kernels
