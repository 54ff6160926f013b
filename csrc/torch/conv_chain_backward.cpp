// The backward of conv_chain_forward: a launch that packs weights for the data gradients, then of
// each convolution, from the last to the first, the sums of its batch norm, the gradient of its raw
// output, the gradient of its input, and that of its weight. A max pool's gradient is gathered
// where the batch norm reads it. A group of processes that shares its statistics adds up the sums.
#ifdef INCEPTION_EXT_CUDA_VERSION

#include <string>
#include <tuple>
#include <vector>

#include "torch/conv_chain.h"
#include "torch/cuda_launch.h"
#include "torch/library.h"
#include "torch/process_group.h"
#include "torch/shared_statistics.h"

namespace inception_ext {
namespace {

constexpr const char* kOp = "conv_chain_backward";

using Result = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

// The convolution that maps the gradient of a convolution's output to that of its input.
Window dgrad_window(const Window& window) {
  return {window.kernel, 1, window.kernel - 1 - window.padding};
}

Result conv_chain_backward(Tensor grad, Tensor x, std::vector<Tensor> conv_weights,
                           std::vector<Tensor> weights, std::vector<Tensor> biases, Tensor raw1,
                           Tensor raw2, Tensor argmax, Tensor mean, Tensor rstd,
                           std::vector<int64_t> strides, std::vector<int64_t> paddings,
                           std::vector<int64_t> pool, bool training, std::vector<bool> needs,
                           bool exact, bool affine, std::string group_name, int64_t group_size) {
  const Chain chain(kOp, x, conv_weights, strides, paddings, pool);
  const ScalarType dtype = x.scalar_type();
  const int last = chain.length - 1;
  if (needs.size() != 1 + chain.channels.size()) {
    fail(kOp, "needs", "expected ", 1 + chain.length, " values, got ", needs.size());
  }
  const auto needs_weight = [&](int i) -> bool { return needs[1 + i]; };
  // The gradient of convolution i's input.
  const auto needs_input = [&](int i) -> bool { return i > 0 || needs[0]; };
  for (int i = 0; i < chain.length; ++i) {
    if (needs_input(i) && chain.window[i].stride != 1) {
      fail(kOp, element("strides", i).c_str(), "expected 1 where the input needs a gradient",
           ", got ", chain.window[i].stride);
    }
  }
  Argument{kOp, "grad", grad}
      .is_dense_of(/*cuda=*/true)
      .has_shape({chain.output.n, chain.channels[last], chain.output.h, chain.output.w})
      .has_dtype({dtype});
  std::vector<Tensor> raw{by_pixels(raw1)};
  if (last > 0) raw.push_back(by_pixels(raw2));
  for (int i = 0; i < chain.length; ++i) {
    const ImageSize& size = chain.output_of(i);
    Argument{kOp, i == 0 ? "raw1" : "raw2", raw[i]}
        .is_dense_of(/*cuda=*/true)
        .has_shape({size.n, chain.channels[i], size.h, size.w})
        .has_dtype({dtype});
  }
  if (chain.pooled) {
    Argument{kOp, "argmax", argmax}
        .is_dense_of(/*cuda=*/true)
        .has_shape({chain.output.n, chain.channels[last], chain.output.h, chain.output.w})
        .has_dtype({ScalarType::Byte});
  }
  const ProcessGroup group(kOp, group_name, group_size, training);
  const bool needs_sums = training || affine;  // of the batch norms
  const auto gammas = chain_parameters(kOp, "weights", weights, chain);
  const auto betas = chain_parameters(kOp, "biases", biases, chain);
  const SavedStatistics statistics(kOp, mean, rstd, chain.statistics_size);
  const auto norm = [&](int i) {
    const Statistics part = statistics.from(chain.offset[i]);
    return BatchNormVectors{gammas[i].data(), betas[i].data(), part.mean, part.rstd};
  };

  const Tensor input = by_pixels(x), gradient = by_pixels(grad);
  const Tensor indices = chain.pooled
                             ? torch::stable::contiguous(argmax, MemoryFormat::ChannelsLast)
                             : empty_vector(x, 0, ScalarType::Byte);
  const auto floats = [&](int64_t count) { return empty_vector(x, count, ScalarType::Float); };
  const auto none = [&] { return empty_vector(x, 0, dtype); };
  const Tensor counters = empty_vector(x, kernels::kConvCounterBytes, ScalarType::Byte);
  const Tensor sums = empty_vector(x, kernels::kConvPartialBytes, ScalarType::Byte);
  kernels::PackWeightsParams packing{};
  packing.dtype = kernel_dtype(dtype);
  packing.weight_dtype = kernel_dtype(conv_weights[0].scalar_type());
  packing.filter[packing.filters++] = zeros_of(counters, static_cast<int64_t>(x.element_size()));

  std::vector<Tensor> raw_grad, input_grad, packed, partials, dweight, dbias, conv_weight_grad;
  std::vector<SharedSums> shared;
  std::vector<int32_t> chunks;
  for (int i = 0; i < chain.length; ++i) {
    const ImageSize &from = chain.input_of(i), &to = chain.output_of(i);
    const Tensor& weight = conv_weights[i];
    raw_grad.push_back(empty_nhwc(x, to.n, chain.channels[i], to.h, to.w));
    input_grad.push_back(needs_input(i) ? empty_nhwc(x, from.n, weight.size(1), from.h, from.w)
                                        : none());
    if (needs_input(i)) {
      const int64_t columns = packed_columns(weight.size(0) * weight.size(2) * weight.size(3));
      const int64_t shape[] = {weight.size(1), columns};
      packed.push_back(torch::stable::empty({shape, 2}, dtype, std::nullopt, x.device()));
      packing.filter[packing.filters++] =
          packed_filter(weight, packed[i].data_ptr(), columns, columns);
    } else {
      packed.push_back(none());
    }
    shared.emplace_back(group, x, chain.channels[i], to.pixels());
    chunks.push_back(needs_sums ? kernels::batch_norm_chunks(to.pixels(), chain.channels[i]) : 0);
    partials.push_back(floats(int64_t{chunks[i]} * 2 * chain.channels[i]));
    dweight.push_back(floats(needs_sums ? chain.channels[i] : 0));
    dbias.push_back(floats(needs_sums ? chain.channels[i] : 0));
    conv_weight_grad.push_back(needs_weight(i) ? empty_like_weight(weight) : none());
  }

  const auto batch_norm = [&](int i) {
    const ImageSize& size = chain.output_of(i);
    kernels::BatchNormReluBackwardParams params{};
    params.items = 1;
    params.chunks = chunks[i];
    params.pixels = params.count = size.pixels();
    params.batch_statistics = training;
    params.dtype = kernel_dtype(dtype);
    params.item[0] = backward_item(Pixels(raw[i]), Pixels(i == last ? gradient : input_grad[i + 1]),
                                   Pixels(raw_grad[i]), norm(i), data_of<float>(partials[i]),
                                   dweight[i], dbias[i]);
    if (chain.pooled && i == last) {
      params.item[0].argmax = data_of<uint8_t>(indices);
      params.input_h = static_cast<int32_t>(size.h);
      params.input_w = static_cast<int32_t>(size.w);
      params.output_h = static_cast<int32_t>(chain.output.h);
      params.output_w = static_cast<int32_t>(chain.output.w);
      params.window = chain.pool_window;
    }
    return params;
  };
  const auto dgrad = [&](int i) {
    kernels::ConvTrainParams params{
        .problem = {}, .problems = 1, .dtype = kernel_dtype(dtype), .exact = exact};
    params.problem[0] =
        train_problem(chain.output_of(i), dgrad_window(chain.window[i]), Pixels(raw_grad[i]),
                      packed[i].data_ptr(), Pixels(input_grad[i]));
    return params;
  };
  const auto wgrad = [&](int i) {
    kernels::ConvWgradParams params{.problem = {},
                                    .problems = 1,
                                    .dtype = kernel_dtype(dtype),
                                    .exact = exact,
                                    .counters = data_of<int32_t>(counters),
                                    .partials = data_of<float>(sums)};
    params.problem[0] = wgrad_problem(chain.input_of(i), chain.window[i],
                                      Pixels(i == 0 ? input : raw[i - 1]), Pixels(raw_grad[i]));
    if (i > 0) normalize_on_load(params.problem[0], norm(i - 1));
    add_segment(params.problem[0], conv_weight_grad[i]);
    return params;
  };

  std::vector<Operand> operands{{"x", input, Use::kRead},
                                {"grad", gradient, Use::kRead},
                                {"argmax", indices, Use::kRead},
                                {"mean", statistics.mean(), Use::kRead},
                                {"rstd", statistics.rstd(), Use::kRead},
                                {"counters", counters, Use::kScratch},
                                {"sums", sums, Use::kScratch}};
  for (int i = 0; i < chain.length; ++i) {
    operands.push_back({"raw", raw[i], Use::kRead});
    operands.push_back({"conv_weight", conv_weights[i], Use::kRead});
    operands.push_back({"gamma", gammas[i].tensor(), Use::kRead});
    operands.push_back({"beta", betas[i].tensor(), Use::kRead});
    operands.push_back({"raw_grad", raw_grad[i], Use::kScratch});
    operands.push_back({"packed", packed[i], Use::kScratch});
    operands.push_back({"partials", partials[i], Use::kScratch});
    operands.push_back({"dx", input_grad[i], Use::kWrite});
    operands.push_back({"dw", conv_weight_grad[i], Use::kWrite});
    operands.push_back({"dgamma", dweight[i], Use::kWrite});
    operands.push_back({"dbeta", dbias[i], Use::kWrite});
    shared[i].add_to(operands);
  }
  launch_kernels(kOp, operands, [&](cudaStream_t stream) {
    cudaError_t error = kernels::pack_dgrad_weights(packing, stream);
    for (int i = last; i >= 0; --i) {
      const auto norms = batch_norm(i);
      if (error == cudaSuccess && needs_sums) {
        error = kernels::batch_norm_relu_backward_reduce(norms, stream);
      }
      if (error == cudaSuccess) error = shared[i].apply(norms, {dbias[i], dweight[i]}, stream);
      if (error == cudaSuccess && needs_input(i)) error = kernels::conv_train(dgrad(i), stream);
      if (error == cudaSuccess && needs_weight(i)) error = kernels::conv_wgrad(wgrad(i), stream);
    }
    return error;
  });
  std::vector<Tensor> weight_grads, bias_grads;
  for (int i = 0; i < chain.length; ++i) {
    weight_grads.push_back(vector_gradient(dweight[i], weights[i], affine));
    bias_grads.push_back(vector_gradient(dbias[i], biases[i], affine));
  }
  return {input_grad[0], conv_weight_grad, weight_grads, bias_grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, INCEPTION_EXT_CUDA_KEY, m) {
  m.impl("conv_chain_backward", TORCH_BOX(&conv_chain_backward));
}

}  // namespace inception_ext

#endif  // INCEPTION_EXT_CUDA_VERSION
