// Argument checks of the ops. Every message names the op, the argument, what was expected and what
// came, and reaches Python as a RuntimeError.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "torch/stable.h"

namespace inception_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether the CUDA kernels serve a tensor; on the emulator they serve those of the CPU.
inline bool on_cuda(const Tensor& tensor) {
#ifdef INCEPTION_EXT_EMULATE
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < dim; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

inline std::string shape_text(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return shape_text(sizes.data(), static_cast<int64_t>(sizes.size()));
}

inline std::string strides_text(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return shape_text(strides.data(), static_cast<int64_t>(strides.size()));
}

template <class... Parts>
[[noreturn]] void fail(const char* op, const char* argument, const Parts&... parts) {
  std::ostringstream text;
  text << "inception_ext::" << op << ": " << argument << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// One argument of one op; each check returns the argument itself, so that checks chain.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  const Argument& is_dense_of(bool cuda) const {
    const bool matches = cuda ? on_cuda(tensor) : tensor.is_cpu();
    if (!matches) {
      fail(op, name, "expected a ", cuda ? "CUDA" : "CPU", " tensor, got one on another device");
    }
    return *this;
  }

  const Argument& has_dim(int64_t dim) const {
    if (tensor.dim() != dim) {
      fail(op, name, "expected ", dim, "D input, got ", tensor.dim(), "D of shape ",
           shape_text(tensor));
    }
    return *this;
  }

  const Argument& has_shape(std::initializer_list<int64_t> shape) const {
    const auto sizes = tensor.sizes();
    bool same = sizes.size() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
    if (!same) {
      fail(op, name, "expected shape ",
           shape_text(shape.begin(), static_cast<int64_t>(shape.size())), ", got ",
           shape_text(tensor));
    }
    return *this;
  }

  const Argument& has_dtype(std::initializer_list<ScalarType> dtypes) const {
    for (ScalarType dtype : dtypes) {
      if (tensor.scalar_type() == dtype) return *this;
    }
    std::ostringstream expected;
    for (ScalarType dtype : dtypes) {
      expected << (dtype == *dtypes.begin() ? "" : " or ") << dtype_name(dtype);
    }
    fail(op, name, "expected ", expected.str(), ", got ", dtype_name(tensor.scalar_type()));
  }
};

}  // namespace inception_ext
