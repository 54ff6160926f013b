// A warp's sums, 16 rows (r, s, c) at a time, into weight gradients of any layout.
//
// They pass through shared memory, so that neighbouring lanes write neighbouring channels; a column
// takes kPitch floats, which keeps both directions free of bank conflicts.
#pragma once

#include <cstdint>

#include "../conv_wgrad.h"
#include "../tile_plan.h"
#include "global.cuh"
#include "shared.cuh"
#include "types.cuh"
#include "warp_tile.cuh"
#include "wgrad_loader.cuh"

namespace inception_ext::kernels {

template <typename T, int kFragments>
class WgradStore {
 public:
  // `shared`: kTileWarps * kBytes that nobody reads any more.
  static constexpr int kPitch = 20;
  static constexpr int kBytes = 8 * kFragments * kPitch * sizeof(float);

  __device__ __forceinline__ WgradStore(const WgradProblem& p, char* shared)
      : p_(p), sums_(reinterpret_cast<float*>(shared + threadIdx.x / 32 * kBytes)) {}

  // The sums of a tile that begins at row m and filter n.
  template <typename Math, TileShape kShape>
  __device__ __forceinline__ void write(const WarpTile<Math, kShape>& warp, int32_t m,
                                        int32_t n) const {
    const int lane = threadIdx.x % 32;
    const int32_t first_k = n + warp.column;
    const int32_t filters = smaller(8 * warp.n_count, p_.filters - first_k);
#pragma unroll
    for (int i = 0; i < kShape.m_fragments; ++i) {
      if (i >= warp.m_count) break;
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = 8 * j + lane % 4 * 2 + e % 2;
          store_shared(sums_ + column * kPitch + lane / 4 + e / 2 * 8, warp.sum[i][j][e]);
        }
      }
      __syncwarp();
      const int32_t row = m + warp.row + 16 * i + lane % 16;
      if (row < p_.kernel_h * p_.kernel_w * p_.channels) {
        const WgradTap tap = WgradTap::of(p_, row);
#pragma unroll 1
        for (int at = 0; at < 4 * kFragments; ++at) {
          const int column = at / 4 * 8 + lane / 16 * 4 + at % 4;
          if (column >= filters) continue;
          store(first_k + column, tap, load_shared(sums_ + column * kPitch + lane % 16));
        }
      }
      __syncwarp();
    }
  }

 private:
  __device__ __forceinline__ void store(int32_t k, const WgradTap& tap, float value) const {
    int i = 0;
    while (k >= p_.segment[i].filters) k -= p_.segment[i++].filters;
    const WgradSegment& segment = p_.segment[i];
    const int64_t offset = k * segment.stride_k + tap.r * segment.stride_r +
                           tap.s * segment.stride_s + tap.c * segment.stride_c;
    if (segment.is_float32) {
      store_global(static_cast<float*>(segment.dw) + offset, value);
    } else {
      store_global(static_cast<T*>(segment.dw) + offset, from_float<T>(value));
    }
  }

  const WgradProblem& p_;
  float* sums_;
};

}  // namespace inception_ext::kernels
