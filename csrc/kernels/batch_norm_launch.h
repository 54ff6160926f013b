// What the launchers of the batch norm kernels share: how a launch is cut into blocks.
#pragma once

#include <cstdint>

#include "batch_norm.h"
#include "device/channel_group.cuh"
#include "device/types.cuh"
#include "variants.h"

namespace inception_ext::kernels {

// Grid: x over the groups of channels of all items, y over chunks of the pixels.
struct BatchNormGrid {
  int32_t first_group[kMaxBatchNormItems];  // of each item
  int64_t chunk_pixels;
};

// The item that a block works for.
template <typename Params>
__device__ __forceinline__ int32_t item_of_block(const Params& p, const BatchNormGrid& grid) {
  int32_t i = p.items - 1;
  while (static_cast<int32_t>(blockIdx.x) < grid.first_group[i]) --i;
  return i;
}

template <int kVec, typename Item>
__device__ __forceinline__ ChannelGroup<kVec> group_of_block(const Item& item,
                                                             int32_t first_group) {
  return ChannelGroup<kVec>(item.channels, blockIdx.x - first_group);
}

// Sets first_group; the number of groups.
template <int kVec, typename Params>
int64_t count_groups(const Params& p, BatchNormGrid& grid) {
  int64_t groups = 0;
  for (int i = 0; i < p.items; ++i) {
    grid.first_group[i] = static_cast<int32_t>(groups);
    groups += ChannelGroup<kVec>::count(p.item[i].channels);
  }
  return groups;
}

// As many parts as fill `blocks` blocks with `groups` groups each, of `least` pixels or more.
int64_t count_chunks(int64_t pixels, int64_t groups, int64_t blocks, int64_t least);

inline bool is_dtype(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 || dtype == DType::kFloat32;
}

// Can [P, C] be moved in 16-byte vectors?
template <typename T>
bool is_vectorizable(const void* data, int64_t stride, int32_t channels) {
  return is_aligned(data, 16) && stride % kVectorSize<T> == 0 && channels % kVectorSize<T> == 0;
}

// function(T()) for the C++ type of a dtype.
template <typename Function>
cudaError_t with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat16:
      return function(__half());
    case DType::kBFloat16:
      return function(__nv_bfloat16());
    case DType::kFloat32:
      return function(float());
  }
  return cudaErrorInvalidValue;
}

}  // namespace inception_ext::kernels
