// A frozen network on the CPU, or a part of it, as one op: a chain of convolutions with ReLU, max
// pools and Inception modules, whose weights are folded and packed. See
// inception_ext/_frozen_cpu.py for who writes the plan.
//
// Images go through by slices, as many slices at a time as torch has threads; the convolutions
// within then run on one thread each. Images that are left over are worked on by all threads.

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/winograd.h"
#include "torch/cpu_kernels.h"
#include "torch/frozen_convolution.h"
#include "torch/library.h"
#include "torch/max_pool.h"
#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {
namespace {

constexpr const char* kOp = "frozen_forward";

std::vector<int64_t> list(const std::array<int64_t, 2>& pair) { return {pair[0], pair[1]}; }

struct Shape {
  int64_t c, h, w;
};

class Step {
 public:
  virtual ~Step() = default;
  virtual Shape output(const Shape& x) const = 0;
  // Into `out` where given, else into a tensor of its own; returns what the next step reads.
  virtual Feature run(const Feature& x, const std::optional<Feature>& out) const = 0;
};

class ConvolutionStep : public Step {
 public:
  explicit ConvolutionStep(FrozenConvolution convolution) : convolution_(std::move(convolution)) {}

  Shape output(const Shape& x) const override {
    if (x.c != inputs()) fail(kOp, "x", "expected ", inputs(), " channels, got ", x.c);
    const auto [h, w] = convolution_.output_size(x.h, x.w);
    if (h < 1 || w < 1) {
      fail(kOp, "x", "Output size is too small: ", x.h, " x ", x.w, " gives ", h, " x ", w);
    }
    return {outputs(), h, w};
  }

  Feature run(const Feature& x, const std::optional<Feature>& out) const override {
    return convolution_.run(x, out);
  }

  int64_t inputs() const { return convolution_.weight.size(1); }
  int64_t outputs() const { return convolution_.weight.size(0); }

 private:
  FrozenConvolution convolution_;
};

class PoolStep : public Step {
 public:
  explicit PoolStep(MaxPoolWindow window) : window_(std::move(window)) {}

  Shape output(const Shape& x) const override {
    const cpu::MaxPoolShape shape = window_.over(kOp, 1, x.c, x.h, x.w);
    return {x.c, shape.out_h, shape.out_w};
  }

  Feature run(const Feature& x, const std::optional<Feature>& out) const override {
    const cpu::MaxPoolShape shape = window_.over(kOp, x.n, x.pixels.channels, x.h, x.w);
    Feature y = out ? *out : Feature(empty_nhwc(x.tensor, x.n, shape.c, shape.out_h, shape.out_w));
    max_pool_pixels(shape, x.pixels, y.pixels, nullptr, x.tensor.scalar_type());
    if (x.lacks_relu) {  // ReLU and maximum commute, and there is less left to do it on
      y.lacks_relu = true;
      copy(y, y);
      y.lacks_relu = false;
    }
    return y;
  }

 private:
  MaxPoolWindow window_;
};

class InceptionStep : public Step {
 public:
  // reads_x: the three 1x1 convolutions of x in one, with `split` outputs.
  InceptionStep(std::array<int64_t, 3> split, ConvolutionStep reads_x, ConvolutionStep conv_3x3,
                ConvolutionStep conv_5x5, PoolStep pool, ConvolutionStep projection)
      : split_(split),
        reads_x_(std::move(reads_x)),
        conv_3x3_(std::move(conv_3x3)),
        conv_5x5_(std::move(conv_5x5)),
        pool_(std::move(pool)),
        projection_(std::move(projection)) {}

  Shape output(const Shape& x) const override {
    const Shape merged = reads_x_.output(x);
    if (std::min({split_[0], split_[1], split_[2]}) < 1 ||
        split_[0] + split_[1] + split_[2] != merged.c) {
      fail(kOp, "plan", "expected parts of ", merged.c, " channels");
    }
    int64_t channels = split_[0];
    const Shape branches[] = {conv_3x3_.output({split_[1], merged.h, merged.w}),
                              conv_5x5_.output({split_[2], merged.h, merged.w}),
                              projection_.output(pool_.output(x))};
    for (const Shape& branch : branches) {
      if (branch.h != merged.h || branch.w != merged.w) {
        fail(kOp, "plan", "expected branches of ", merged.h, " x ", merged.w, ", got ", branch.h,
             " x ", branch.w);
      }
      channels += branch.c;
    }
    return {channels, merged.h, merged.w};
  }

  Feature run(const Feature& given, const std::optional<Feature>& out) const override {
    const Feature x = given.lacks_relu ? Feature(dense(given)) : given;
    const Shape size = output({x.pixels.channels, x.h, x.w});
    const Feature y = out ? *out : Feature(empty_nhwc(x.tensor, x.n, size.c, size.h, size.w));
    int64_t read = 0, written = 0;
    const Feature merged = reads_x_.run(x, std::nullopt);
    const auto part = [&](int64_t channels) {
      return merged.slice(std::exchange(read, read + channels), channels);
    };
    const auto branch = [&](int64_t channels) {
      return y.slice(std::exchange(written, written + channels), channels);
    };
    copy(part(split_[0]), branch(split_[0]));
    conv_3x3_.run(part(split_[1]), branch(conv_3x3_.outputs()));
    conv_5x5_.run(part(split_[2]), branch(conv_5x5_.outputs()));
    projection_.run(pool_.run(x, std::nullopt), branch(projection_.outputs()));
    return y;
  }

 private:
  std::array<int64_t, 3> split_;  // branch1, reduce 3x3, reduce 5x5
  ConvolutionStep reads_x_, conv_3x3_, conv_5x5_;
  PoolStep pool_;
  ConvolutionStep projection_;
};

// Reads steps off the op's lists. Each record of the plan starts with its kind:
//   0, stride h, w, padding h, w, least tiles for Winograd             a convolution
//   1, kernel h, w, stride h, w, padding h, w, ceil_mode               a max pool
//   2, channels of the three parts of the merged convolution, followed by the records of the
//   merged,
//      the 3x3 and the 5x5 convolution, the pool, and the projection   an Inception module
class Plan {
 public:
  Plan(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases,
       std::vector<int64_t> plan)
      : x_(x), weights_(std::move(weights)), biases_(std::move(biases)), plan_(std::move(plan)) {}

  std::vector<std::unique_ptr<Step>> steps() {
    std::vector<std::unique_ptr<Step>> result;
    while (position_ < plan_.size()) {
      switch (const int64_t kind = plan_[position_]) {
        case kConvolution:
          result.push_back(std::make_unique<ConvolutionStep>(convolution()));
          break;
        case kPool:
          result.push_back(std::make_unique<PoolStep>(pool()));
          break;
        case kInception:
          result.push_back(std::make_unique<InceptionStep>(inception()));
          break;
        default:
          fail(kOp, "plan", "expected 0, 1 or 2 for a kind of step, got ", kind);
      }
    }
    if (result.empty()) fail(kOp, "plan", "expected at least one step, got none");
    if (weight_ != weights_.size() || bias_ != biases_.size()) {
      fail(kOp, "plan", "expected ", weights_.size(), " weights and ", biases_.size(),
           " biases to be used, got ", weight_, " and ", bias_);
    }
    return result;
  }

 private:
  enum Kind { kConvolution, kPool, kInception };

  int64_t next() {
    if (position_ >= plan_.size()) fail(kOp, "plan", "expected more than ", position_, " values");
    return plan_[position_++];
  }

  std::array<int64_t, 2> next_pair(int64_t least) {
    constexpr int64_t most = 1 << 20;
    const std::array<int64_t, 2> pair{next(), next()};
    for (int64_t value : pair) {
      if (value < least || value > most) {
        fail(kOp, "plan", "expected ", least, " to ", most, ", got ", value);
      }
    }
    return pair;
  }

  void expect(Kind kind) {
    if (const int64_t got = next(); got != kind) {
      fail(kOp, "plan", "expected a step of kind ", static_cast<int64_t>(kind), ", got ", got);
    }
  }

  Tensor next_weight(ScalarType dtype) {
    if (weight_ >= weights_.size()) {
      fail(kOp, "weights", "expected more than ", weights_.size(), " tensors");
    }
    const Tensor& weight = weights_[weight_++];
    Argument{kOp, "weights", weight}.has_dim(4).has_dtype({dtype});
    return weight;
  }

  ConvolutionStep convolution() {
    expect(kConvolution);
    const std::array<int64_t, 2> stride = next_pair(1), padding = next_pair(0);
    const int64_t least_tiles = next();  // 0: there is no weight for Winograd
    if (least_tiles < 0) fail(kOp, "plan", "expected at least 0 tiles, got ", least_tiles);
    const Tensor weight = next_weight(x_.scalar_type());
    const int64_t k = weight.size(0), c = weight.size(1);
    std::optional<Tensor> winograd;
    if (least_tiles > 0) {
      const bool fits = weight.size(2) == 3 && weight.size(3) == 3 && stride[0] == 1 &&
                        stride[1] == 1 && padding[0] == 1 && padding[1] == 1;
      if (!fits) {
        fail(kOp, "plan",
             "expected Winograd's weight for 3x3 convolutions of stride and padding 1 only");
      }
      winograd = next_weight(ScalarType::Float);
      Argument{kOp, "weights", *winograd}.has_shape({cpu::kWinogradPositions * k, c, 1, 1});
    }
    if (bias_ >= biases_.size()) {
      fail(kOp, "biases", "expected more than ", biases_.size(), " tensors");
    }
    const Tensor& bias = biases_[bias_++];
    Argument{kOp, "biases", bias}
        .is_dense_of(/*cuda=*/false)
        .has_dtype({x_.scalar_type()})
        .has_shape({k});
    if (k > 1 && bias.stride(0) != 1) fail(kOp, "biases", "expected contiguous tensors");
    return ConvolutionStep({weight, winograd, least_tiles, bias, stride, padding});
  }

  PoolStep pool() {
    expect(kPool);
    const std::array<int64_t, 2> kernel = next_pair(1), stride = next_pair(1),
                                 padding = next_pair(0);
    MaxPoolWindow window{list(kernel), list(stride), list(padding), /*ceil_mode=*/next() != 0};
    window.check(kOp, /*cuda=*/false);
    return PoolStep(std::move(window));
  }

  InceptionStep inception() {
    expect(kInception);
    const std::array<int64_t, 3> split{next(), next(), next()};
    ConvolutionStep reads_x = convolution(), conv_3x3 = convolution(), conv_5x5 = convolution();
    PoolStep window = pool();
    return InceptionStep(split, std::move(reads_x), std::move(conv_3x3), std::move(conv_5x5),
                         std::move(window), convolution());
  }

  const Tensor& x_;
  std::vector<Tensor> weights_, biases_;
  std::vector<int64_t> plan_;
  size_t weight_ = 0, bias_ = 0, position_ = 0;
};

class Chain {
 public:
  Chain(const Tensor& x, std::vector<std::unique_ptr<Step>> steps)
      : x_(x), steps_(std::move(steps)), y_(make_output()) {}

  // Images [begin, end) through all steps.
  void run(int64_t begin, int64_t end) {
    Feature feature(torch::stable::narrow(x_, 0, begin, end - begin));
    const Feature out(torch::stable::narrow(y_, 0, begin, end - begin));
    for (const auto& step : steps_) {
      feature = step->run(feature, step == steps_.back() ? std::optional(out) : std::nullopt);
    }
  }

  // The same by slices of at most `images` images, one slice a thread.
  void run_in_slices(int64_t begin, int64_t end, int64_t images) {
    run_tasks((end - begin + images - 1) / images,
              [&](int64_t i) { run(begin + i * images, std::min(end, begin + (i + 1) * images)); });
  }

  const Tensor& output() const { return y_; }

 private:
  Tensor make_output() const {
    Shape shape{x_.size(1), x_.size(2), x_.size(3)};
    for (const auto& step : steps_) shape = step->output(shape);
    return empty_nhwc(x_, x_.size(0), shape.c, shape.h, shape.w);
  }

  Tensor x_;
  std::vector<std::unique_ptr<Step>> steps_;
  Tensor y_;
};

Tensor frozen_forward(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases,
                      std::vector<int64_t> plan, int64_t images) {
  const NoGrad no_grad;
  check_cpu_activation({kOp, "x", x});
  if (images < 1) fail(kOp, "images", "expected at least 1, got ", images);
  Chain chain(torch::stable::contiguous(x, MemoryFormat::ChannelsLast),
              Plan(x, std::move(weights), std::move(biases), std::move(plan)).steps());
  const int64_t n = x.size(0), threads = torch::stable::get_num_threads();
  const int64_t shared = n / threads * threads;  // images for threads of their own
  if (shared > 0) {
    // As few slices as there may be, all of one size.
    const int64_t rounds = (shared / threads + images - 1) / images;
    chain.run_in_slices(0, shared, (shared / threads + rounds - 1) / rounds);
  }
  for (int64_t begin = shared; begin < n; begin += images) {
    chain.run(begin, std::min(n, begin + images));
  }
  return chain.output();
}

}  // namespace

// Packed weights are tensors of a backend of their own, so no single key stands for this op.
STABLE_TORCH_LIBRARY_IMPL(INCEPTION_EXT_OPS, CompositeExplicitAutograd, m) {
  m.impl("frozen_forward", TORCH_BOX(&frozen_forward));
}

}  // namespace inception_ext
