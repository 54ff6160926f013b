// conv 1x1 + bias + ReLU, conv 3x3 padding 1 + bias + ReLU, max pool 3x3 stride 2, in one kernel.
//
//   r[n, h, w, c] = relu(bias1[c] + sum over i of weight1[c, i] * x[n, h, w, i])
//   z[n, h, w, k] = relu(bias2[k] + sum over i, j, c of
//                        weight2[k, i, j, c] * r[n, h - 1 + i, w - 1 + j, c]), r = 0 outside
//   y[n, p, q, k] = max of z over rows 2p ... 2p + 2, columns 2q ... 2q + 2, as far as z goes
//
// r and z never leave the chip: r under a tile (stem_plan.h) stays in shared memory, and the block
// computes the 192 filters from it in three passes of 64. Few tiles are given to three blocks each,
// one to a pass; r is computed three times then, a sixth of a pass each.
#include <cstdint>

#include "device/async_copy.cuh"
#include "device/pooled_tile.cuh"
#include "device/reduced_tile.cuh"
#include "device/sync.cuh"
#include "device/tensor_math.cuh"
#include "launch.h"
#include "stem.h"
#include "stem_launch.h"

namespace inception_ext::kernels {
namespace {

constexpr int kPasses = kWideFilters / kStemFilters;

// The filters' way into shared memory: stages of 128 bytes of K, in two operand tiles. Stages
// 0 ... kFirst - 1 are those of the 1x1 convolution, then come those of the 3x3 convolution's pass.
template <typename T, int kRows>
class FilterRing {
 public:
  using Tile = ReducedTile<kRows, sizeof(T)>;
  static constexpr int kStageK = 128 / sizeof(T);
  static constexpr int kFirst = kStemFilters / kStageK;
  static constexpr int kTapStages = kStemFilters / kStageK;  // of one filter tap
  static constexpr int kEnd = kFirst + 9 * kTapStages;

  __device__ __forceinline__ FilterRing(char* memory, const StemConvConvPoolParams& p)
      : memory_(memory), p_(p) {}

  __device__ __forceinline__ char* stage(int i) const {
    return memory_ + i % Tile::kStages * Tile::kStageBytes;
  }

  // Starts the copies of stage i of a pass; none past the end.
  __device__ __forceinline__ void load(int i, int pass) const {
    if (i >= kEnd) return;
    const bool reduces = i < kFirst;
    const T* weight = static_cast<const T*>(reduces ? p_.weight1 : p_.weight2);
    const int64_t row = reduces ? kStemFilters : 9 * kStemFilters;
    if (!reduces) weight += pass * kStemFilters * row;
    const int k = (reduces ? i : i - kFirst) * kStageK;
    constexpr int kVec = kVectorSize<T>, kTileChunks = kStemFilters * kRowChunks;
#pragma unroll 1
    for (int j = threadIdx.x; j < 2 * kTileChunks; j += Tile::kThreads) {
      const int tile = j / kTileChunks, column = j % kTileChunks / kRowChunks;
      const int chunk = j % kRowChunks;
      const T* from = weight + filter_of_column<T>(column) * row + k;
      copy_async<16>(stage(i) + tile * kStemFilters * kRowBytes + chunk_offset(column, chunk),
                     from + (tile * kRowChunks + chunk) * kVec);
    }
  }

 private:
  char* memory_;
  const StemConvConvPoolParams& p_;
};

template <typename Math, int kRows>
__device__ __forceinline__ void compute_tile(const StemConvConvPoolParams& p, int32_t passes,
                                             bool x_vectors, bool y_vectors) {
  using T = typename Math::Element;
  using Tile = ReducedTile<kRows, sizeof(T)>;
  using Ring = FilterRing<T, kRows>;
  using Sums = float[Tile::kFragments][8][4];
  constexpr int kTileSteps = kRowChunks / Math::kStepChunks;
  const PooledOrigin origin = pooled_origin<kRows>(blockIdx.x, p.output_h, p.output_w);
  char* behind_ring = dynamic_shared() + Tile::kRingBytes;
  const Ring ring(dynamic_shared(), p);
  const ConvTile<T, kRows> conv(dynamic_shared());
  const ReducedPixels<Math, kRows> pixels(behind_ring, p, origin);
  float* bias = reinterpret_cast<float*>(behind_ring + Tile::kTiles * Tile::kTileBytes);
  int pass = blockIdx.y * passes;

#pragma unroll
  for (int i = 0; i < Tile::kStages - 1; ++i) ring.load(i, pass);
  for (int i = threadIdx.x; i < kStemFilters + kWideFilters; i += Tile::kThreads) {
    const float* from = i < kStemFilters ? p.bias1 + i : p.bias2 + (i - kStemFilters);
    store_shared(bias + i, load_global(from));
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  pixels.load(x_vectors);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  pixels.compute(ring.stage(0), bias);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Ring::kFirst; ++i) {
    ring.load(Tile::kStages - 1 + i, pass);
    commit_copies();
  }

  for (const int end = pass + passes; pass < end; ++pass) {
    Sums c;
    start_sums<T>(c, bias + (1 + pass) * kStemFilters);
#pragma unroll 1
    for (int i = Ring::kFirst; i < Ring::kEnd; ++i) {
      wait_copies<Tile::kStages - 2>();
      __syncthreads();
      ring.load(i + Tile::kStages - 1, pass);
      commit_copies();
      const int tap = (i - Ring::kFirst) / Ring::kTapStages;
      const int first_tile = (i - Ring::kFirst) % Ring::kTapStages * 2;
      const auto multiply_stage = [&](Sums& sums) {
#pragma unroll 1
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
          for (int step = 0; step < kTileSteps; ++step) {
            typename Math::A a[Tile::kFragments];
#pragma unroll
            for (int f = 0; f < Tile::kFragments; ++f) {
              pixels.load_a(a[f], f, tap / 3, tap % 3, first_tile + tile, step);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              typename Math::B b;
              Math::load_b(b, ring.stage(i) + tile * kStemFilters * kRowBytes, 16 * j, step);
#pragma unroll
              for (int f = 0; f < Tile::kFragments; ++f) {
                Math::multiply(sums[f][2 * j], a[f], b, 0);
                Math::multiply(sums[f][2 * j + 1], a[f], b, 1);
              }
            }
          }
        }
      };
      if constexpr (Math::kStepChunks == 1) {
        // 576 products one after the other would lose a digit to what sums in blocks have.
        Sums stage_sums = {};
        multiply_stage(stage_sums);
        add_sums(c, stage_sums);
      } else {
        multiply_stage(c);
      }
    }

    __syncthreads();  // the ring has been read: its memory is the conv tile's now
#pragma unroll
    for (int f = 0; f < Tile::kFragments; ++f) conv.store(c[f], f);
    __syncthreads();
    const int64_t image = origin.n * p.output_h * p.output_w;
    T* y = static_cast<T*>(p.y) + image * p.y_stride + pass * kStemFilters;
    conv.pool(y, p.y_stride, y_vectors, origin, p.input_h - 2 * origin.row,
              p.input_w - 2 * origin.column, p.output_h, p.output_w);
    if (pass + 1 == end) break;
    __syncthreads();
#pragma unroll
    for (int i = Ring::kFirst; i < Ring::kFirst + Tile::kStages - 1; ++i) {
      ring.load(i, pass + 1);
      commit_copies();
    }
  }
}

// Scalar products hold two sets of sums.
template <typename Math, int kRows>
constexpr int kMinBlocks = Math::kStepChunks == 1 ? 1 : kResidentBlocks<kRows>;

// Grid: x over tiles, y over kPasses / passes.
template <typename Math, int kRows>
__global__ void __launch_bounds__(ReducedTile<kRows, 2>::kThreads, (kMinBlocks<Math, kRows>))
    stem_conv_conv_pool_kernel(const __grid_constant__ StemConvConvPoolParams p, int32_t passes,
                               bool x_vectors, bool y_vectors) {
  if constexpr (kHasStem<Math, kRows>) {
    compute_tile<Math, kRows>(p, passes, x_vectors, y_vectors);
  } else {
    never_launched();
  }
}

template <typename Math, int kRows>
cudaError_t launch_rows(const StemConvConvPoolParams& p, const DeviceLimits& device,
                        cudaStream_t stream) {
  using T = typename Math::Element;
  using Tile = ReducedTile<kRows, sizeof(T)>;
  constexpr int kVec = kVectorSize<T>;
  const int64_t tiles = stem_tiles(kRows, p.batch, p.output_h, p.output_w);
  if (tiles > INT32_MAX) return cudaErrorInvalidValue;
  const int32_t passes = tiles < device.multiprocessors ? 1 : kPasses;
  const dim3 grid(static_cast<unsigned>(tiles), kPasses / passes);
  const bool x_vectors = is_aligned(p.x, 16) && p.x_stride % kVec == 0;
  const bool y_vectors = is_aligned(p.y, 16) && p.y_stride % kVec == 0;
  note_useful_macs(p.batch * p.input_h * p.input_w * kStemFilters *
                   (kStemFilters + 9 * int64_t{kWideFilters}));
  return launch_dependent(stem_conv_conv_pool_kernel<Math, kRows>, grid, dim3(Tile::kThreads),
                          Tile::kSharedBytes, stream, p, passes, x_vectors, y_vectors);
}

bool takes(const StemConvConvPoolParams& p) {
  return has_valid_sizes(p, p.input_h, p.input_w) && is_aligned(p.weight1, 16) &&
         is_aligned(p.weight2, 16);
}

}  // namespace

cudaError_t stem_conv_conv_pool(const StemConvConvPoolParams& p, cudaStream_t stream) {
  if (!takes(p)) return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  if (!p.x || !p.weight1 || !p.bias1 || !p.weight2 || !p.bias2 || !p.y) {
    return cudaErrorInvalidValue;
  }
  return with_stem_tile<ReducedTile>(p, [&](auto math, auto rows, const DeviceLimits& device) {
    return launch_rows<typename decltype(math)::Type, decltype(rows)::value>(p, device, stream);
  });
}

}  // namespace inception_ext::kernels
