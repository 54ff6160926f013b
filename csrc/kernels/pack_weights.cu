// Packs convolution weights; see pack_weights.h for the two orders.
//
// A block fills a square of the packed matrix. Its lanes read along whichever side of the square
// usually lies together in the weights, the channels in both orders, and write along the rows; a
// square in shared memory turns one into the other.
#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "device/sync.cuh"
#include "device/types.cuh"
#include "launch.h"
#include "pack_weights.h"

namespace inception_ext::kernels {
namespace {

constexpr int kSide = 32;  // of a square
constexpr int kWarps = 8;
constexpr int kPitch = kSide + 1;  // floats from row to row of the square: no bank conflicts

// Block number at which each filter starts, and squares along its rows.
struct Blocks {
  int32_t first[kMaxPackedFilters];
  int32_t across[kMaxPackedFilters];
};

// The rows of a packed matrix, and where its columns come from: the offset in the weight of a
// column that holds a value.
struct FpropOrder {
  static constexpr bool kChannelsAlongRows = true;

  __host__ __device__ static int32_t rows(const PackedFilter& f) { return f.filters; }
  __host__ __device__ static int32_t columns(const PackedFilter& f) {
    return f.kernel_h * f.kernel_w * f.channels;
  }
  static __device__ __forceinline__ int64_t offset(const PackedFilter& f, int32_t row,
                                                   int32_t column) {
    const int32_t tap = column / f.channels, c = column % f.channels;
    return row * f.stride[0] + c * f.stride[1] + tap / f.kernel_w * f.stride[2] +
           tap % f.kernel_w * f.stride[3];
  }
};

struct DgradOrder {
  static constexpr bool kChannelsAlongRows = false;

  __host__ __device__ static int32_t rows(const PackedFilter& f) { return f.channels; }
  __host__ __device__ static int32_t columns(const PackedFilter& f) {
    return f.kernel_h * f.kernel_w * f.filters;
  }
  static __device__ __forceinline__ int64_t offset(const PackedFilter& f, int32_t row,
                                                   int32_t column) {
    const int32_t tap = column / f.filters, k = column % f.filters;
    const int32_t r = f.kernel_h - 1 - tap / f.kernel_w, s = f.kernel_w - 1 - tap % f.kernel_w;
    return k * f.stride[0] + row * f.stride[1] + r * f.stride[2] + s * f.stride[3];
  }
};

// Grid: x over the squares of all filters.
template <typename Order, typename From, typename To>
__global__ void __launch_bounds__(kWarps * 32)
    pack_weights_kernel(const __grid_constant__ PackWeightsParams p,
                        const __grid_constant__ Blocks blocks) {
  wait_for_previous_kernel();
  allow_next_kernel();
  int i = p.filters - 1;
  while (static_cast<int32_t>(blockIdx.x) < blocks.first[i]) --i;
  const PackedFilter& f = p.filter[i];
  const int32_t square = blockIdx.x - blocks.first[i];
  const int32_t first_row = square / blocks.across[i] * kSide;
  const int32_t first_column = square % blocks.across[i] * kSide;
  const int32_t rows = Order::rows(f), columns = Order::columns(f);
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // [kSide][kPitch]

#pragma unroll
  for (int j = warp; j < kSide; j += kWarps) {
    const int32_t row = Order::kChannelsAlongRows ? j : lane;
    const int32_t column = Order::kChannelsAlongRows ? lane : j;
    float value = 0;
    if (first_row + row < rows && first_column + column < columns) {
      const int64_t offset = Order::offset(f, first_row + row, first_column + column);
      value = to_float(load_global(static_cast<const From*>(f.weight) + offset));
    }
    store_shared(shared + row * kPitch + column, value);
  }
  __syncthreads();
  To* packed = static_cast<To*>(f.packed) + first_row * f.packed_stride + first_column;
#pragma unroll
  for (int row = warp; row < kSide; row += kWarps) {
    if (first_row + row >= rows || first_column + lane >= f.packed_columns) break;
    const float value = load_shared(shared + row * kPitch + lane);
    store_global(packed + row * f.packed_stride + lane, from_float<To>(value));
  }
}

template <typename Order>
bool takes(const PackedFilter& f) {
  if (f.filters < 0 || f.channels < 0 || f.kernel_h < 1 || f.kernel_w < 1) return false;
  const int64_t columns = int64_t{f.kernel_h} * f.kernel_w;
  const int64_t wide = columns * (f.filters > f.channels ? f.filters : f.channels);
  if (wide > INT32_MAX - kSide || f.packed_columns > INT32_MAX - kSide) return false;
  const bool empty = Order::rows(f) == 0 || f.packed_columns == 0;
  return Order::columns(f) <= f.packed_columns && f.packed_columns <= f.packed_stride &&
         (empty || f.packed != nullptr) && (empty || Order::columns(f) == 0 || f.weight != nullptr);
}

template <typename Order, typename From, typename To>
cudaError_t launch_squares(const PackWeightsParams& p, cudaStream_t stream) {
  Blocks blocks = {};
  int64_t count = 0;
  for (int i = 0; i < p.filters; ++i) {
    const PackedFilter& f = p.filter[i];
    blocks.first[i] = static_cast<int32_t>(count);
    blocks.across[i] = (f.packed_columns + kSide - 1) / kSide;
    count += (int64_t{Order::rows(f)} + kSide - 1) / kSide * blocks.across[i];
    if (count > INT32_MAX) return cudaErrorInvalidValue;
  }
  if (count == 0) return cudaSuccess;
  return launch_dependent(pack_weights_kernel<Order, From, To>, dim3(static_cast<unsigned>(count)),
                          dim3(kWarps * 32), sizeof(float) * kSide * kPitch, stream, p, blocks);
}

template <typename Order, typename To>
cudaError_t dispatch(const PackWeightsParams& p, cudaStream_t stream) {
  return p.weight_dtype == p.dtype ? launch_squares<Order, To, To>(p, stream)
                                   : launch_squares<Order, float, To>(p, stream);
}

template <typename Order>
cudaError_t pack(const PackWeightsParams& p, cudaStream_t stream) {
  if (p.filters < 0 || p.filters > kMaxPackedFilters ||
      (p.weight_dtype != p.dtype && p.weight_dtype != DType::kFloat32)) {
    return cudaErrorInvalidValue;
  }
  for (int i = 0; i < p.filters; ++i) {
    if (!takes<Order>(p.filter[i])) return cudaErrorInvalidValue;
  }
  switch (p.dtype) {
    case DType::kFloat16:
      return dispatch<Order, __half>(p, stream);
    case DType::kBFloat16:
      return dispatch<Order, __nv_bfloat16>(p, stream);
    case DType::kFloat32:
      return dispatch<Order, float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t pack_fprop_weights(const PackWeightsParams& p, cudaStream_t stream) {
  return pack<FpropOrder>(p, stream);
}

cudaError_t pack_dgrad_weights(const PackWeightsParams& p, cudaStream_t stream) {
  return pack<DgradOrder>(p, stream);
}

}  // namespace inception_ext::kernels
