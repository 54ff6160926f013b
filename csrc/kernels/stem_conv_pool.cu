// conv 7x7 stride 2 padding 3 + bias + ReLU + max pool 3x3 stride 2, from the image, in one kernel.
//
//   z[n, p, q, k] = relu(bias[k] + sum over r, s, c of
//                        weight[k, r, s, c] * (x[n, c, 2p - 3 + r, 2q - 3 + s] * scale[c] +
//                        shift[c]))
//   y[n, p, q, k] = max of z over rows 2p ... 2p + 2, columns 2q ... 2q + 2, as far as z goes
//
// Outside the image the convolution reads zeros. Blocks stay: each lays the filters out once in
// shared memory, then computes one tile (stem_plan.h) after another.
#include <cstdint>

#include "device/pooled_tile.cuh"
#include "device/stem_patch.cuh"
#include "device/sync.cuh"
#include "device/tensor_math.cuh"
#include "launch.h"
#include "stem.h"
#include "stem_launch.h"

namespace inception_ext::kernels {
namespace {

template <typename Math, int kRows>
__device__ __forceinline__ void compute_tiles(const StemConvPoolParams& p, int32_t tiles,
                                              bool vectors) {
  using T = typename Math::Element;
  using Tile = PatchTile<kRows, sizeof(T)>;
  constexpr int kSteps = PatchOrder<T>::kChunks / Math::kStepChunks;
  constexpr int kTileSteps = kRowChunks / Math::kStepChunks;
  // Unrolled, the scalar products would be ten thousand instructions.
  constexpr int kUnroll = Math::kStepChunks == 2 ? kSteps : 1;
  char* filters = dynamic_shared();
  const ConvTile<T, kRows> conv(filters + Tile::kFilterBytes);
  char* behind_conv = filters + Tile::kFilterBytes + Tile::kConvBytes;
  uint32_t* patch = reinterpret_cast<uint32_t*>(behind_conv);
  float* bias = reinterpret_cast<float*>(behind_conv + Tile::kPatchBytes);

  fill_filters<Math, kRows>(filters, static_cast<const T*>(p.weight));
  if (threadIdx.x < kStemFilters) {
    store_shared(bias + threadIdx.x, load_global(p.bias + threadIdx.x));
  }
  wait_for_previous_kernel();
  allow_next_kernel();

  for (int32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const PooledOrigin origin = pooled_origin<kRows>(tile, p.output_h, p.output_w);
    fill_patch<Math, kRows>(patch, p, origin);
    __syncthreads();

    float c[Tile::kFragments][8][4];
    start_sums<T>(c, bias);
#pragma unroll kUnroll
    for (int step = 0; step < kSteps; ++step) {
      typename Math::A a[Tile::kFragments];
#pragma unroll
      for (int f = 0; f < Tile::kFragments; ++f) {
        const uint32_t* row = patch + 2 * fragment_row<kRows>(f) * Tile::kRowWords;
        load_windows<Math>(a[f], row + 3 * fragment_column<kRows>(f), step);
      }
      const char* filter_tile = filters + step / kTileSteps * kStemFilters * kRowBytes;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        typename Math::B b;
        Math::load_b(b, filter_tile, 16 * j, step % kTileSteps);
#pragma unroll
        for (int f = 0; f < Tile::kFragments; ++f) {
          Math::multiply(c[f][2 * j], a[f], b, 0);
          Math::multiply(c[f][2 * j + 1], a[f], b, 1);
        }
      }
    }
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) conv.store(c[f], f);
    __syncthreads();
    T* y = static_cast<T*>(p.y) + origin.n * p.output_h * p.output_w * p.y_stride;
    conv.pool(y, p.y_stride, vectors, origin, p.conv_h - 2 * origin.row,
              p.conv_w - 2 * origin.column, p.output_h, p.output_w);
  }
}

template <typename Math, int kRows>
__global__ void __launch_bounds__(PatchTile<kRows, 2>::kThreads, kResidentBlocks<kRows>)
    stem_conv_pool_kernel(const __grid_constant__ StemConvPoolParams p, int32_t tiles,
                          bool vectors) {
  if constexpr (kHasStem<Math, kRows>) {
    compute_tiles<Math, kRows>(p, tiles, vectors);
  } else {
    never_launched();
  }
}

template <typename Math, int kRows>
cudaError_t launch_rows(const StemConvPoolParams& p, const DeviceLimits& device,
                        cudaStream_t stream) {
  using T = typename Math::Element;
  using Tile = PatchTile<kRows, sizeof(T)>;
  const int64_t tiles = stem_tiles(kRows, p.batch, p.output_h, p.output_w);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  // A multiprocessor has 1 KiB more than one block may use, and keeps 1 KiB of each for itself.
  const int fitting = (device.shared_bytes + 1024) / (Tile::kSharedBytes + 1024);
  const int64_t resident =
      int64_t{device.multiprocessors} * (fitting < kStemBlocks ? fitting : kStemBlocks);
  const dim3 grid(static_cast<unsigned>(tiles < resident ? tiles : resident));
  const bool vectors = is_aligned(p.y, 16) && p.y_stride % kVectorSize<T> == 0;
  note_useful_macs(int64_t{p.batch} * p.conv_h * p.conv_w * kStemFilters * kFilterRow *
                   kFilterWidth);
  return launch_dependent(stem_conv_pool_kernel<Math, kRows>, grid, dim3(Tile::kThreads),
                          Tile::kSharedBytes, stream, p, static_cast<int32_t>(tiles), vectors);
}

}  // namespace

cudaError_t stem_conv_pool(const StemConvPoolParams& p, cudaStream_t stream) {
  if (!has_valid_sizes(p, p.conv_h, p.conv_w)) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  if (!p.x || !p.weight || !p.bias || !p.y) return cudaErrorInvalidValue;
  return with_stem_tile<PatchTile>(p, [&](auto math, auto rows, const DeviceLimits& device) {
    return launch_rows<typename decltype(math)::Type, decltype(rows)::value>(p, device, stream);
  });
}

cudaError_t stem_fits(DType dtype, bool& fits) {
  const bool wide = dtype == DType::kFloat32;
  const int first = wide ? PatchTile<2, 4>::kSharedBytes : PatchTile<2, 2>::kSharedBytes;
  const int second = wide ? ReducedTile<2, 4>::kSharedBytes : ReducedTile<2, 2>::kSharedBytes;
  DeviceLimits device;
  const cudaError_t error = device_limits(device);
  fits = error == cudaSuccess && first <= device.shared_bytes && second <= device.shared_bytes;
  return error;
}

}  // namespace inception_ext::kernels
