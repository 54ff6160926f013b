// The vectors [C] of batch norms, as the ops of every device take them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "torch/checks.h"
#include "torch/nhwc.h"
#include "torch/stable.h"

namespace inception_ext {

// `cuda`: which kernels they are for; their float16 is the CUDA kernels' alone.
inline void check_vector(const char* op, const char* name, const Tensor& tensor, int64_t channels,
                         bool cuda) {
  const Argument argument{op, name, tensor};
  argument.is_dense_of(cuda).has_shape({channels});
  if (cuda) {
    argument.has_dtype({ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  } else {
    argument.has_dtype({ScalarType::Float, ScalarType::BFloat16});
  }
}

inline Tensor as_float32(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous()
             ? tensor
             : torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}

// A parameter [C] read as float32.
class Parameter {
 public:
  Parameter(const char* op, const char* name, const Tensor& tensor, int64_t channels,
            bool cuda = false)
      : values_((check_vector(op, name, tensor, channels, cuda), as_float32(tensor))) {}
  const float* data() const { return static_cast<const float*>(values_.data_ptr()); }
  // What data() points to.
  const Tensor& tensor() const { return values_; }

 private:
  Tensor values_;
};

// Running statistics [C], in training updated in float32 and written back in their own dtype; or
// none, which is for training alone.
class RunningStatistic {
 public:
  RunningStatistic(const char* op, const char* name, const std::optional<Tensor>& tensor,
                   int64_t channels, bool training, bool cuda = false)
      : tensor_(tensor) {
    if (!tensor) {
      if (!training) fail(op, name, "expected a tensor in evaluation mode, got None");
      return;
    }
    check_vector(op, name, *tensor, channels, cuda);
    if (training && channels > 1 && tensor->stride(0) == 0) {
      fail(op, name, "expected ", channels, " elements to write to, got one that is expanded");
    }
    values_ = as_float32(*tensor);
  }
  // nullptr: there are none.
  float* data() const { return values_ ? static_cast<float*>(values_->data_ptr()) : nullptr; }
  // What data() points to.
  const std::optional<Tensor>& tensor() const { return values_; }
  void write_back() {
    if (values_ && values_->data_ptr() != tensor_->data_ptr()) {
      torch::stable::copy_(*tensor_, *values_);
    }
  }

 private:
  std::optional<Tensor> tensor_;
  std::optional<Tensor> values_;
};

// What messages call an element of a list.
inline std::string element(const char* list, int index) {
  return std::string(list) + '[' + std::to_string(index) + ']';
}

// Running means or variances of several batch norms; an empty list: of none.
template <typename Channels>
std::vector<RunningStatistic> running_statistics(const char* op, const char* name,
                                                 const std::vector<Tensor>& tensors,
                                                 const Channels& channels, bool training,
                                                 bool cuda) {
  const bool has_none = training && tensors.empty();
  if (tensors.size() != channels.size() && !has_none) {
    fail(op, name, "expected ", channels.size(), " tensors", training ? " or none" : "", ", got ",
         tensors.size());
  }
  std::vector<RunningStatistic> result;
  for (size_t i = 0; i < channels.size(); ++i) {
    result.emplace_back(op, element(name, static_cast<int>(i)).c_str(),
                        has_none ? std::nullopt : std::optional(tensors[i]), channels[i], training,
                        cuda);
  }
  return result;
}

// The gradient of a batch norm's weight or bias, in its dtype; [0] unless it is needed.
inline Tensor vector_gradient(const Tensor& gradient, const Tensor& parameter, bool needed) {
  return needed ? torch::stable::to(gradient, parameter.scalar_type())
                : empty_vector(parameter, 0, parameter.scalar_type());
}

// The CPU's kernels know no other process.
inline void check_alone(const char* op, int64_t group_size) {
  if (group_size != 1) fail(op, "group_size", "expected 1 on the CPU, got ", group_size);
}

// Mean and rstd of one or more batch norms over one raw convolution output, [C] each.
struct Statistics {
  float* mean;
  float* rstd;
};

// The mean and rstd [C] that forward returned, as backward gets them.
class SavedStatistics {
 public:
  SavedStatistics(const char* op, const Tensor& mean, const Tensor& rstd, int64_t channels)
      : mean_(torch::stable::contiguous(mean)), rstd_(torch::stable::contiguous(rstd)) {
    Argument{op, "mean", mean}.has_shape({channels}).has_dtype({ScalarType::Float});
    Argument{op, "rstd", rstd}.has_shape({channels}).has_dtype({ScalarType::Float});
  }
  // Those of the channels from `first` on.
  Statistics from(int64_t first) const {
    return {static_cast<float*>(mean_.data_ptr()) + first,
            static_cast<float*>(rstd_.data_ptr()) + first};
  }
  const Tensor& mean() const { return mean_; }
  const Tensor& rstd() const { return rstd_; }

 private:
  Tensor mean_;
  Tensor rstd_;
};

}  // namespace inception_ext
