// Batch norm + ReLU backward: partial sums of a chunk of pixels, then dx, which needs the sums of
// all chunks first. Every block of the second kernel adds those of its own channels up, which costs
// less than a launch between the two.
//
// What dy is read from is a functor: dy itself, or what a max pool passes back.
#include <cstdint>

#include "batch_norm.h"
#include "batch_norm_launch.h"
#include "device/batch_norm_vectors.cuh"
#include "device/channel_group.cuh"
#include "device/gradient_source.cuh"
#include "device/shared.cuh"
#include "device/sync.cuh"
#include "launch.h"

namespace inception_ext::kernels {
namespace {

constexpr int kUnroll = 2;  // pixels of a thread whose loads are under way

template <typename Source>
struct Loaded {
  Vector<typename Source::Element, Source::kVec> x;
  typename Source::Gradient dy;
};

// use(pixel, x, dy) for the pixels [begin, end) of a thread, loading them ahead.
template <typename Source, typename Use>
__device__ __forceinline__ void walk_gradients(const BatchNormReluBackwardParams& p,
                                               const BatchNormReluBackwardItem& item,
                                               const ChannelGroup<Source::kVec>& group,
                                               int64_t begin, int64_t end, const Use& use) {
  using T = typename Source::Element;
  const Source source(p, item, group.channel());
  const T* x = static_cast<const T*>(item.x) + group.channel();
  walk<kUnroll>(
      begin + group.row, end, int64_t{group.rows},
      [&](int64_t pixel) {
        return Loaded<Source>{load_global<Source::kVec>(x + pixel * item.x_stride),
                              source.load(pixel)};
      },
      [&](int64_t pixel, const auto& loaded) { use(pixel, loaded.x, loaded.dy); });
}

__device__ __forceinline__ int64_t chunk_end(int64_t begin, int64_t size, int64_t pixels) {
  return begin + size < pixels ? begin + size : pixels;
}

// Grid: see BatchNormGrid; y is the chunk.
template <typename Source>
__global__ void __launch_bounds__(kGroupThreads, Source::kMinBlocks)
    batch_norm_relu_backward_reduce_kernel(const __grid_constant__ BatchNormReluBackwardParams p,
                                           const __grid_constant__ BatchNormGrid grid) {
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kVec = Source::kVec;
  const int32_t i = item_of_block(p, grid);
  const BatchNormReluBackwardItem& item = p.item[i];
  const auto group = group_of_block<kVec>(item, grid.first_group[i]);
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  float* scratch = shared + BatchNormVectors<kVec>::kCount * kMaxGroupChannels;
  const BatchNormVectors<kVec> vectors(item, group, shared);

  float sums[2][kVec] = {};  // of dy', of dy' * (x - mean)
  if (group.is_active()) {
    const int64_t begin = blockIdx.y * grid.chunk_pixels;
    walk_gradients<Source>(p, item, group, begin, chunk_end(begin, grid.chunk_pixels, p.pixels),
                           [&](int64_t, const auto& x, const auto& dy) {
#pragma unroll
                             for (int e = 0; e < kVec; ++e) {
                               const float value = to_float(x.data[e]);
                               const bool off = vectors.normalise(e, value) <= 0;
                               const float gradient = off ? 0.0f : to_float(dy.data[e]);
                               sums[0][e] += gradient;
                               sums[1][e] += gradient * (value - vectors.mean[e]);
                             }
                           });
  }
  const auto cell = group.cell();
  float total = group.add_threads(cell, sums, scratch);
  if (cell.phase != 0) return;
  const int32_t c = group.channel_at(cell.position);
  if (cell.sum == 1) total *= load_global(item.rstd + c);
  store_global(item.partials + (int64_t{blockIdx.y} * 2 + cell.sum) * item.channels + c, total);
}

// Grid: see BatchNormGrid; the blocks of y = 0 write dgamma and dbeta.
template <typename Source>
__global__ void __launch_bounds__(kGroupThreads, Source::kMinBlocks)
    batch_norm_relu_backward_apply_kernel(const __grid_constant__ BatchNormReluBackwardParams p,
                                          const __grid_constant__ BatchNormGrid grid) {
  wait_for_previous_kernel();
  allow_next_kernel();
  using T = typename Source::Element;
  constexpr int kVec = Source::kVec;
  const int32_t i = item_of_block(p, grid);
  const BatchNormReluBackwardItem& item = p.item[i];
  if (item.dx == nullptr && blockIdx.y > 0) return;
  const auto group = group_of_block<kVec>(item, grid.first_group[i]);
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  float* mean_dy = shared + BatchNormVectors<kVec>::kCount * kMaxGroupChannels;
  float* slope = mean_dy + kMaxGroupChannels;
  float* scratch = slope + kMaxGroupChannels;

  if (p.batch_statistics || item.dgamma != nullptr || item.dbeta != nullptr) {
    const auto cell = group.cell();
    const int32_t c = cell.phase < cell.phases ? group.channel_at(cell.position) : 0;
    const float* partials = item.partials + cell.sum * item.channels + c;
    const float total = group.add_rows(cell, p.chunks, scratch, [&](int32_t chunk) {
      return load_global(partials + int64_t{2} * chunk * item.channels);
    });
    if (cell.phase == 0) {
      const float count = p.total != nullptr ? load_global(p.total) : static_cast<float>(p.count);
      const float mean = total / count;
      float* to = cell.sum == 0 ? mean_dy : slope;
      store_shared(to + cell.position, cell.sum == 0 ? mean : mean * load_global(item.rstd + c));
      float* gradient = cell.sum == 0 ? item.dbeta : item.dgamma;
      if (blockIdx.y == 0 && gradient != nullptr) store_global(gradient + c, total);
    }
  }
  if (item.dx == nullptr) return;

  // Its barrier is that of mean_dy and slope too.
  const BatchNormVectors<kVec> vectors(item, group, shared);
  if (!group.is_active()) return;
  float shift[kVec] = {}, xhat_factor[kVec] = {};
  if (p.batch_statistics) {
    group.read(mean_dy, shift);
    group.read(slope, xhat_factor);
  }
  T* dx = static_cast<T*>(item.dx) + group.channel();
  const int64_t begin = blockIdx.y * grid.chunk_pixels;
  walk_gradients<Source>(p, item, group, begin, chunk_end(begin, grid.chunk_pixels, p.pixels),
                         [&](int64_t pixel, const auto& x, const auto& dy) {
                           Vector<T, kVec> result;
#pragma unroll
                           for (int e = 0; e < kVec; ++e) {
                             const float value = to_float(x.data[e]);
                             float gradient =
                                 vectors.normalise(e, value) <= 0 ? 0.0f : to_float(dy.data[e]);
                             if (p.batch_statistics) {
                               gradient -= shift[e] + (value - vectors.mean[e]) * xhat_factor[e];
                             }
                             result.data[e] = from_float<T>(vectors.scale[e] * gradient);
                           }
                           store_global(dx + pixel * item.dx_stride, result);
                         });
}

bool takes(const BatchNormReluBackwardParams& p) {
  const PoolWindow& window = p.window;
  bool valid = p.items >= 0 && p.items <= kMaxBatchNormItems && p.chunks >= 0 && p.pixels >= 0 &&
               is_dtype(p.dtype);
  const bool pooled = valid && p.items > 0 && p.item[0].argmax != nullptr;
  for (int i = 0; valid && i < p.items; ++i) {
    const BatchNormReluBackwardItem& item = p.item[i];
    valid = item.channels >= 0 && (item.argmax != nullptr) == pooled &&
            (item.channels == 0 || has_vectors(item)) &&
            (item.channels == 0 || p.pixels == 0 || (item.x != nullptr && item.dy != nullptr));
  }
  if (!valid || !pooled || p.pixels == 0) return valid;
  const auto takes_axis = [](int32_t input, int32_t output, int32_t kernel, int32_t stride,
                             int32_t padding) {
    return input > 0 && output > 0 && (kernel == 2 || kernel == 3) &&
           (stride == 1 || stride == 2) && padding >= 0 && padding <= kernel / 2;
  };
  return p.pixels <= INT32_MAX &&
         takes_axis(p.input_h, p.output_h, window.kernel_h, window.stride_h, window.padding_h) &&
         takes_axis(p.input_w, p.output_w, window.kernel_w, window.stride_w, window.padding_w) &&
         p.pixels % (int64_t{p.input_h} * p.input_w) == 0;
}

// function(Source) of the items' dtype, alignment and gradient.
template <typename Function>
cudaError_t with_source(const BatchNormReluBackwardParams& p, const Function& function) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVec = kVectorSize<T>;
    const bool pooled = p.item[0].argmax != nullptr;
    bool vectors = true;
    for (int i = 0; i < p.items; ++i) {
      const BatchNormReluBackwardItem& item = p.item[i];
      vectors =
          vectors && is_vectorizable<T>(item.x, item.x_stride, item.channels) &&
          is_vectorizable<T>(item.dy, item.dy_stride, item.channels) &&
          (item.dx == nullptr || is_vectorizable<T>(item.dx, item.dx_stride, item.channels)) &&
          is_aligned(item.argmax, kVec);
    }
    if (vectors) {
      return pooled ? function(Kind<PooledGradient<T, kVec>>())
                    : function(Kind<PlainGradient<T, kVec>>());
    }
    return pooled ? function(Kind<PooledGradient<T, 1>>()) : function(Kind<PlainGradient<T, 1>>());
  });
}

}  // namespace

cudaError_t batch_norm_relu_backward_reduce(const BatchNormReluBackwardParams& p,
                                            cudaStream_t stream) {
  if (!takes(p) || (p.chunks == 0 && p.pixels > 0)) return cudaErrorInvalidValue;
  bool has_channels = false;
  for (int i = 0; i < p.items; ++i) {
    if (p.item[i].channels > 0 && p.chunks > 0 && p.item[i].partials == nullptr) {
      return cudaErrorInvalidValue;
    }
    has_channels = has_channels || p.item[i].channels > 0;
  }
  if (p.chunks == 0 || !has_channels) return cudaSuccess;
  return with_source(p, [&](auto kind) {
    using Source = typename decltype(kind)::Type;
    BatchNormGrid grid = {};
    const int64_t groups = count_groups<Source::kVec>(p, grid);
    grid.chunk_pixels = (p.pixels + p.chunks - 1) / p.chunks;
    constexpr int kFloats = BatchNormVectors<Source::kVec>::kCount * kMaxGroupChannels +
                            ChannelGroup<Source::kVec>::kScratch;
    return launch_dependent(batch_norm_relu_backward_reduce_kernel<Source>,
                            dim3(static_cast<unsigned>(groups), static_cast<unsigned>(p.chunks)),
                            dim3(kGroupThreads), sizeof(float) * kFloats, stream, p, grid);
  });
}

cudaError_t batch_norm_relu_backward_apply(const BatchNormReluBackwardParams& p,
                                           cudaStream_t stream) {
  if (!takes(p)) return cudaErrorInvalidValue;
  bool has_channels = false, has_dx = false, has_sums = false;
  for (int i = 0; i < p.items; ++i) {
    const BatchNormReluBackwardItem& item = p.item[i];
    const bool needs_sums = p.batch_statistics || item.dgamma != nullptr || item.dbeta != nullptr;
    if (needs_sums && p.pixels > 0 && item.channels > 0 &&
        (p.chunks == 0 || item.partials == nullptr)) {
      return cudaErrorInvalidValue;
    }
    has_channels = has_channels || item.channels > 0;
    has_dx = has_dx || item.dx != nullptr;
    has_sums = has_sums || item.dgamma != nullptr || item.dbeta != nullptr;
  }
  if (!has_channels || (!has_sums && (!has_dx || p.pixels == 0))) return cudaSuccess;
  return with_source(p, [&](auto kind) {
    using Source = typename decltype(kind)::Type;
    // One wave of blocks, since each adds up all chunks.
    constexpr int64_t kBlocks = 264, kLeastPixels = 128;
    BatchNormGrid grid = {};
    const int64_t groups = count_groups<Source::kVec>(p, grid);
    const int64_t parts = has_dx ? count_chunks(p.pixels, groups, kBlocks, kLeastPixels) : 1;
    const int64_t blocks = parts < 1 ? 1 : parts;
    grid.chunk_pixels = (p.pixels + blocks - 1) / blocks;
    constexpr int kFloats =
        (BatchNormVectors<Source::kVec>::kCount + 2) * kMaxGroupChannels + kGroupThreads;
    return launch_dependent(batch_norm_relu_backward_apply_kernel<Source>,
                            dim3(static_cast<unsigned>(groups), static_cast<unsigned>(blocks)),
                            dim3(kGroupThreads), sizeof(float) * kFloats, stream, p, grid);
  });
}

}  // namespace inception_ext::kernels
