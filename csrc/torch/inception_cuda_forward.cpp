// The Inception module's forward on the CUDA kernels, in five launches:
//
//   1  raw_1x1 = x * the three 1x1 filters, raw_pool = max pool of x * its filters; statistics
//   2  mean and rstd of these four batch norms
//   3  raw_3x3, raw_5x5 from raw_1x1, with batch norm and ReLU on load; statistics
//   4  mean and rstd of these two
//   5  out = ReLU of the batch norms of all four branches
//
// and one before them where weights have to be packed or cast. In evaluation mode 2 and 4 turn
// running statistics into mean and rstd. Where a group of processes shares its statistics, 2 and 4
// are two launches each, and between them the processes exchange one vector.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "torch/cuda_launch.h"
#include "torch/inception_layout.h"
#include "torch/library.h"
#include "torch/process_group.h"
#include "torch/shared_statistics.h"
#include "torch/train_blocks.h"

namespace inception_ext {
namespace {

constexpr const char* kOp = "inception_forward";

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                          Tensor, Tensor>;

Result inception_forward(Tensor x, std::vector<Tensor> conv_weights, std::vector<Tensor> weights,
                         std::vector<Tensor> biases, std::vector<Tensor> running_means,
                         std::vector<Tensor> running_vars, bool training, double momentum,
                         double eps, bool save, bool exact, std::string group_name,
                         int64_t group_size) {
  const Layout layout(kOp, x, conv_weights, /*cuda=*/true);
  const ImageSize size(kOp, x);
  const ScalarType dtype = x.scalar_type();
  const Tensor input = by_pixels(x);
  const auto gammas = parameters(kOp, "weights", weights, layout);
  const auto betas = parameters(kOp, "biases", biases, layout);
  auto means = running_statistics(kOp, "running_means", running_means, layout.channels, training,
                                  /*cuda=*/true);
  auto vars = running_statistics(kOp, "running_vars", running_vars, layout.channels, training,
                                 /*cuda=*/true);
  const ProcessGroup group(kOp, group_name, group_size, training);
  const FilterMatrices filters(conv_weights, x);

  const auto activation = [&](int64_t channels) {
    return empty_nhwc(x, size.n, channels, size.h, size.w);
  };
  const auto floats = [&](int64_t count) { return empty_vector(x, count, ScalarType::Float); };
  Tensor out = activation(layout.output_channels);
  Tensor raw_1x1 = activation(layout.merged_channels);
  Tensor raw_3x3 = activation(layout.channels[kConv3x3]);
  Tensor raw_5x5 = activation(layout.channels[kConv5x5]);
  Tensor raw_pool = activation(layout.channels[kPoolProjection]);
  Tensor argmax = save ? empty_nhwc(x, size.n, x.size(1), size.h, size.w, ScalarType::Byte)
                       : empty_vector(x, 0, ScalarType::Byte);
  Tensor mean = floats(layout.statistics_size), rstd = floats(layout.statistics_size);
  const Pixels merged(raw_1x1), out_pixels(out);

  // The convolutions whose outputs are raw, in statistics order, and where their raw outputs lie.
  const std::array<Pixels, kConvs> raw = [&] {
    const auto part = [&](Conv conv) {
      return merged.slice(layout.statistics[conv], layout.channels[conv]);
    };
    return std::array<Pixels, kConvs>{part(kBranch1),   part(kReduce3x3), Pixels(raw_3x3),
                                      part(kReduce5x5), Pixels(raw_5x5),  Pixels(raw_pool)};
  }();

  const auto norm = [&](Conv conv) {
    const int64_t offset = layout.statistics[conv];
    return BatchNormVectors{gammas[conv].data(), betas[conv].data(), data_of<float>(mean) + offset,
                            data_of<float>(rstd) + offset};
  };

  // Statistics of tiles: of the merged convolution together, of the others each.
  const int64_t tiles = most_tiles(size.pixels());
  const int64_t tile_floats = training ? tiles * layout.statistics_size : 0;
  Tensor tile_mean = floats(tile_floats), tile_m2 = floats(tile_floats);
  const auto problem_of = [&](Conv conv, const Pixels& from, const Pixels& to) {
    auto problem = train_problem(size, same_window(conv_weights[conv].size(2)), from,
                                 filters[conv].data_ptr(), to);
    if (training) {
      problem.tile_mean = data_of<float>(tile_mean) + tiles * layout.statistics[conv];
      problem.tile_m2 = data_of<float>(tile_m2) + tiles * layout.statistics[conv];
    }
    return problem;
  };

  kernels::ConvTrainParams reading_x{
      .problem = {}, .problems = 0, .dtype = kernel_dtype(dtype), .exact = exact};
  kernels::ConvTrainParams reading_reduced = reading_x;
  auto& merged_1x1 = reading_x.problem[reading_x.problems++];
  merged_1x1 = problem_of(kBranch1, Pixels(input), merged);
  for (Conv conv : {kReduce3x3, kReduce5x5}) {
    merged_1x1.more[merged_1x1.more_filters++] = {filters[conv].data_ptr(),
                                                  static_cast<int32_t>(layout.statistics[conv])};
  }
  auto& pool = reading_x.problem[reading_x.problems++];
  pool = problem_of(kPoolProjection, Pixels(input), Pixels(raw_pool));
  pool.prologue = kernels::ConvPrologue::kMaxPool;
  pool.argmax = save ? data_of<uint8_t>(argmax) : nullptr;
  for (auto [reduce, conv] : {std::pair(kReduce3x3, kConv3x3), std::pair(kReduce5x5, kConv5x5)}) {
    auto& problem = reading_reduced.problem[reading_reduced.problems++];
    problem = problem_of(conv, raw[reduce], raw[conv]);
    normalize_on_load(problem, norm(reduce));
  }

  // Of the batch norms behind one launch, whose tiles have `rows` pixels.
  const SharedStatistics behind_x(group, x,
                                  layout.merged_channels + layout.channels[kPoolProjection]);
  const SharedStatistics behind_reduced(group, x,
                                        layout.channels[kConv3x3] + layout.channels[kConv5x5]);
  const auto finalize = [&](const SharedStatistics& shared, std::initializer_list<Conv> convs,
                            int32_t rows, cudaStream_t stream) {
    kernels::BatchNormFinalizeParams params{};
    for (Conv conv : convs) {
      const bool is_merged = conv == kBranch1 || conv == kReduce3x3 || conv == kReduce5x5;
      const int64_t offset = layout.statistics[conv], channels = layout.channels[conv];
      // The merged convolution's tiles begin at offset 0 and hold all of its channels.
      const int64_t first = is_merged ? offset : tiles * offset;
      auto& item = params.item[params.items++];
      item = training
                 ? tiles_item(raw[conv], kernel_dtype(dtype), data_of<float>(tile_mean) + first,
                              data_of<float>(tile_m2) + first,
                              is_merged ? layout.merged_channels : channels, rows, means[conv],
                              vars[conv])
                 : running_item(means[conv], vars[conv], channels);
      item.mean = norm(conv).mean;
      item.rstd = norm(conv).rstd;
      item.momentum = static_cast<float>(momentum);
      item.eps = static_cast<float>(eps);
    }
    return shared.finalize(params, stream);
  };

  kernels::BatchNormReluApplyParams apply{
      .item = {}, .items = 0, .pixels = size.pixels(), .dtype = kernel_dtype(dtype)};
  for (Conv conv : {kBranch1, kConv3x3, kConv5x5, kPoolProjection}) {
    apply.item[apply.items++] = apply_item(
        raw[conv], out_pixels.slice(layout.output[conv], layout.channels[conv]), norm(conv));
  }

  std::vector<Operand> operands{
      {"x", input, Use::kRead},           {"out", out, Use::kWrite},
      {"raw_1x1", raw_1x1, Use::kWrite},  {"raw_3x3", raw_3x3, Use::kWrite},
      {"raw_5x5", raw_5x5, Use::kWrite},  {"raw_pool", raw_pool, Use::kWrite},
      {"argmax", argmax, Use::kWrite},    {"mean", mean, Use::kWrite},
      {"rstd", rstd, Use::kWrite},        {"tile_mean", tile_mean, Use::kScratch},
      {"tile_m2", tile_m2, Use::kScratch}};
  filters.add_to(operands);
  for (int conv = 0; conv < kConvs; ++conv) {
    operands.push_back({"gamma", gammas[conv].tensor(), Use::kRead});
    operands.push_back({"beta", betas[conv].tensor(), Use::kRead});
    add_running(operands, means[conv], vars[conv], training);
  }
  behind_x.add_to(operands);
  behind_reduced.add_to(operands);
  launch_kernels(kOp, operands, [&](cudaStream_t stream) {
    int32_t rows_of_x = 0, rows_of_reduced = 0;
    cudaError_t error = kernels::conv_train_rows(reading_x, &rows_of_x);
    if (error == cudaSuccess) error = kernels::conv_train_rows(reading_reduced, &rows_of_reduced);
    if (error == cudaSuccess) error = filters.pack(stream);
    if (error == cudaSuccess) error = kernels::conv_train(reading_x, stream);
    if (error == cudaSuccess) {
      error = finalize(behind_x, {kBranch1, kReduce3x3, kReduce5x5, kPoolProjection}, rows_of_x,
                       stream);
    }
    if (error == cudaSuccess) error = kernels::conv_train(reading_reduced, stream);
    if (error == cudaSuccess) {
      error = finalize(behind_reduced, {kConv3x3, kConv5x5}, rows_of_reduced, stream);
    }
    if (error == cudaSuccess) error = kernels::batch_norm_relu_apply(apply, stream);
    return error;
  });
  for (int conv = 0; conv < kConvs; ++conv) {
    if (!training) break;
    means[conv].write_back();
    vars[conv].write_back();
  }

  const auto none = [&] { return empty_vector(x, 0, dtype); };
  if (!save) {
    return {out,    none(), none(), none(),    none(),   none(),
            none(), none(), argmax, floats(0), floats(0)};
  }
  // What the CPU keeps besides is recomputed on load.
  return {out, raw_1x1, raw_3x3, raw_5x5, raw_pool, none(), none(), none(), argmax, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("inception_forward", TORCH_BOX(&inception_forward));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
