// Finalize of batch norm: merges the statistics of tiles of pixels by Chan's formula.
//
// A block owns eight channels, 32 bytes of each tile. Its threads take the tiles in turn, then the
// lanes of a warp that share a channel merge, then warp 0 merges the warps: an order that depends
// on the number of tiles alone. Means are held relative to the first pixel, or to the first tile's
// mean: where they are large and close to one another, merging in float32 would round away what
// tells them apart.
#include <cmath>
#include <cstdint>

#include "batch_norm.h"
#include "device/channel_group.cuh"
#include "device/moments.cuh"
#include "device/shared.cuh"
#include "device/sync.cuh"
#include "launch.h"

namespace inception_ext::kernels {
namespace {

constexpr int kChannels = 8;            // of a block
constexpr int kShare = 32 / kChannels;  // lanes of a warp for one channel
constexpr int kMaxWarps = 32;

// Block number at which each item starts.
struct Blocks {
  int32_t first[kMaxBatchNormFinalizeItems];
};

struct TileStatistics {
  float first;  // pixel
  float mean;
  float m2;
  float count;
};

// The tile's first pixel of x; 0 without x.
__device__ __forceinline__ float first_pixel(const BatchNormFinalizeItem& item, int32_t tile,
                                             int32_t c) {
  if (item.x == nullptr) return 0;
  const int64_t offset = int64_t{tile} * item.rows_per_tile * item.x_stride + c;
  switch (item.dtype) {
    case DType::kFloat16:
      return to_float(load_global(static_cast<const __half*>(item.x) + offset));
    case DType::kBFloat16:
      return to_float(load_global(static_cast<const __nv_bfloat16*>(item.x) + offset));
    default:
      return load_global(static_cast<const float*>(item.x) + offset);
  }
}

__device__ __forceinline__ float pixels_of(const BatchNormFinalizeItem& item, int32_t tile) {
  if (item.tile_pixels != nullptr) {
    return static_cast<float>(load_global(item.tile_pixels + tile * item.tile_pixels_stride));
  }
  const int64_t left = item.pixels - int64_t{tile} * item.rows_per_tile;
  return static_cast<float>(left < item.rows_per_tile ? left : item.rows_per_tile);
}

// Merges the lanes that share a channel.
__device__ __forceinline__ void merge_lanes(Moments& moments) {
#pragma unroll
  for (int distance = kChannels; distance < 32; distance *= 2) {
    const Moments other{__shfl_down_sync(0xffffffffu, moments.count, distance),
                        __shfl_down_sync(0xffffffffu, moments.mean, distance),
                        __shfl_down_sync(0xffffffffu, moments.m2, distance)};
    moments.merge(other);
  }
}

__device__ __forceinline__ void update(float* running, int32_t c, float momentum, float value) {
  if (running == nullptr) return;
  store_global(running + c, (1 - momentum) * load_global(running + c) + momentum * value);
}

__global__ void __launch_bounds__(kMaxWarps * 32)
    batch_norm_finalize_kernel(const __grid_constant__ BatchNormFinalizeParams p,
                               const __grid_constant__ Blocks blocks) {
  wait_for_previous_kernel();
  allow_next_kernel();
  int i = p.items - 1;
  while (static_cast<int32_t>(blockIdx.x) < blocks.first[i]) --i;
  const BatchNormFinalizeItem& item = p.item[i];
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int32_t c = (blockIdx.x - blocks.first[i]) * kChannels + lane % kChannels;
  const bool inside = c < item.channels;

  Moments moments;
  float origin = 0;
  if (inside && item.tiles > 0) {
    origin = item.x != nullptr ? first_pixel(item, 0, c) : load_global(item.tile_mean + c);
    walk<4>(
        static_cast<int32_t>(threadIdx.x) / kChannels, item.tiles, warps * kShare,
        [&](int32_t tile) {
          const int64_t offset = tile * item.tile_stride + c;
          return TileStatistics{first_pixel(item, tile, c), load_global(item.tile_mean + offset),
                                load_global(item.tile_m2 + offset), pixels_of(item, tile)};
        },
        [&](int32_t, const TileStatistics& tile) {
          // The difference of large values first: it is exact.
          const float mean =
              item.x != nullptr ? tile.first - origin + tile.mean : tile.mean - origin;
          moments.merge({tile.count, mean, tile.m2});
        });
  }
  merge_lanes(moments);

  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [3][warps][kChannels]
  const int32_t plane = warps * kChannels;
  if (lane < kChannels) {
    float* own = shared + warp * kChannels + lane;
    store_shared(own, moments.count);
    store_shared(own + plane, moments.mean);
    store_shared(own + 2 * plane, moments.m2);
  }
  __syncthreads();
  if (warp != 0) return;
  moments = {};
  for (int32_t position = lane; position < plane; position += 32) {
    moments.merge({load_shared(shared + position), load_shared(shared + position + plane),
                   load_shared(shared + position + 2 * plane)});
  }
  merge_lanes(moments);
  if (lane >= kChannels || !inside) return;

  const float count = moments.count;
  const float mean = origin + moments.mean;
  const float variance = count > 0 ? moments.m2 / count : 0.0f;
  store_global(item.mean + c, mean);
  if (item.m2 != nullptr) store_global(item.m2 + c, moments.m2);
  if (item.rstd != nullptr) store_global(item.rstd + c, 1 / sqrtf(variance + item.eps));
  if (item.count != nullptr && c == 0) {
    store_global(item.count, static_cast<int32_t>(item.pixels));
  }
  if (count > 0) {
    update(item.running_mean, c, item.momentum, mean);
    update(item.running_var, c, item.momentum, moments.m2 / (count - 1));
  }
}

bool takes(const BatchNormFinalizeItem& item) {
  return item.channels >= 0 && item.tiles >= 0 && (item.channels == 0 || item.mean != nullptr) &&
         (item.count == nullptr || (item.tile_pixels == nullptr && item.pixels <= INT32_MAX)) &&
         (item.channels == 0 || item.tiles == 0 ||
          (item.tile_mean != nullptr && item.tile_m2 != nullptr &&
           ((item.tile_pixels != nullptr && item.x == nullptr) ||
            (item.rows_per_tile > 0 &&
             (item.pixels + item.rows_per_tile - 1) / item.rows_per_tile == item.tiles))));
}

}  // namespace

cudaError_t batch_norm_finalize(const BatchNormFinalizeParams& p, cudaStream_t stream) {
  if (p.items < 0 || p.items > kMaxBatchNormFinalizeItems) return cudaErrorInvalidValue;
  Blocks blocks = {};
  int64_t count = 0, tiles = 0;
  for (int i = 0; i < p.items; ++i) {
    if (!takes(p.item[i])) return cudaErrorInvalidValue;
    blocks.first[i] = static_cast<int32_t>(count);
    count += (int64_t{p.item[i].channels} + kChannels - 1) / kChannels;
    if (p.item[i].tiles > tiles) tiles = p.item[i].tiles;
  }
  if (count == 0) return cudaSuccess;
  const int64_t wanted = (tiles + kShare - 1) / kShare;
  const int64_t warps = wanted < 1 ? 1 : wanted < kMaxWarps ? wanted : kMaxWarps;
  return launch_dependent(batch_norm_finalize_kernel, dim3(static_cast<unsigned>(count)),
                          dim3(static_cast<unsigned>(32 * warps)),
                          3 * sizeof(float) * warps * kChannels, stream, p, blocks);
}

}  // namespace inception_ext::kernels
