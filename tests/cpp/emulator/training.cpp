// The launchers of batch_norm.h and pack_weights.h as a Python module. Params come as dicts with
// the names of their fields, pointers as addresses; a pointer that is left out is nullptr.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../../../csrc/emulator/controls.h"
#include "../../../csrc/emulator/global_memory.h"
#include "../../../csrc/kernels/batch_norm.h"
#include "../../../csrc/kernels/pack_weights.h"

namespace {

namespace py = pybind11;
using inception_ext::Use;
using inception_ext::emulator::Operand;
using inception_ext::emulator::Scope;
using namespace inception_ext::kernels;

// name, use, address, element size, sizes, strides
using Tensor =
    std::tuple<std::string, Use, uintptr_t, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

// Calls a launcher with the tensors that its kernels may touch; the error code.
template <typename Params>
int run(cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params,
        const std::vector<Tensor>& tensors) {
  std::vector<Operand> operands;
  for (const auto& [name, use, address, size, sizes, strides] : tensors) {
    operands.push_back({name, use, reinterpret_cast<void*>(address), size, sizes, strides});
  }
  const Scope scope("launcher", operands);
  const cudaError_t error = launcher(params, nullptr);
  if (error == cudaSuccess) scope.check_complete();
  return error;
}

void read(const py::dict& fields, const char* name, DType& value) {
  value = static_cast<DType>(py::cast<int>(fields[name]));
}
template <typename T>
void read(const py::dict& fields, const char* name, T& value) {
  value = py::cast<T>(fields[name]);
}
template <typename T>
void read(const py::dict& fields, const char* name, T*& pointer) {
  pointer =
      fields.contains(name) ? reinterpret_cast<T*>(py::cast<uintptr_t>(fields[name])) : nullptr;
}

#define INCEPTION_EXT_READ(field) read(fields, #field, to.field)

void fill(const py::dict& fields, PoolWindow& to) {
  INCEPTION_EXT_READ(kernel_h);
  INCEPTION_EXT_READ(kernel_w);
  INCEPTION_EXT_READ(stride_h);
  INCEPTION_EXT_READ(stride_w);
  INCEPTION_EXT_READ(padding_h);
  INCEPTION_EXT_READ(padding_w);
}

void fill(const py::dict& fields, PixelStrides& to, const char* name) {
  const auto strides = py::cast<std::vector<int64_t>>(fields[name]);
  to = {strides.at(0), strides.at(1), strides.at(2)};
}

void fill(const py::dict& fields, MaxPoolForwardParams& to) {
  INCEPTION_EXT_READ(x);
  INCEPTION_EXT_READ(y);
  INCEPTION_EXT_READ(argmax);
  fill(fields, to.x_stride, "x_stride");
  fill(fields, to.y_stride, "y_stride");
  INCEPTION_EXT_READ(batch);
  INCEPTION_EXT_READ(channels);
  INCEPTION_EXT_READ(input_h);
  INCEPTION_EXT_READ(input_w);
  INCEPTION_EXT_READ(output_h);
  INCEPTION_EXT_READ(output_w);
  fill(fields, to.window);
  INCEPTION_EXT_READ(dtype);
}

void fill(const py::dict& fields, BatchNormFinalizeItem& to) {
  INCEPTION_EXT_READ(tile_mean);
  INCEPTION_EXT_READ(x);
  INCEPTION_EXT_READ(x_stride);
  INCEPTION_EXT_READ(dtype);
  INCEPTION_EXT_READ(tile_m2);
  INCEPTION_EXT_READ(tile_pixels);
  INCEPTION_EXT_READ(tile_pixels_stride);
  INCEPTION_EXT_READ(tile_stride);
  INCEPTION_EXT_READ(pixels);
  INCEPTION_EXT_READ(rows_per_tile);
  INCEPTION_EXT_READ(tiles);
  INCEPTION_EXT_READ(channels);
  INCEPTION_EXT_READ(mean);
  INCEPTION_EXT_READ(m2);
  INCEPTION_EXT_READ(rstd);
  INCEPTION_EXT_READ(count);
  INCEPTION_EXT_READ(running_mean);
  INCEPTION_EXT_READ(running_var);
  INCEPTION_EXT_READ(momentum);
  INCEPTION_EXT_READ(eps);
}

void fill(const py::dict& fields, BatchNormReluItem& to) {
  INCEPTION_EXT_READ(x);
  INCEPTION_EXT_READ(y);
  INCEPTION_EXT_READ(x_stride);
  INCEPTION_EXT_READ(y_stride);
  INCEPTION_EXT_READ(channels);
  INCEPTION_EXT_READ(mean);
  INCEPTION_EXT_READ(rstd);
  INCEPTION_EXT_READ(gamma);
  INCEPTION_EXT_READ(beta);
}

void fill(const py::dict& fields, BatchNormReluBackwardItem& to) {
  INCEPTION_EXT_READ(x);
  INCEPTION_EXT_READ(dy);
  INCEPTION_EXT_READ(argmax);
  INCEPTION_EXT_READ(dx);
  INCEPTION_EXT_READ(x_stride);
  INCEPTION_EXT_READ(dy_stride);
  INCEPTION_EXT_READ(dx_stride);
  INCEPTION_EXT_READ(channels);
  INCEPTION_EXT_READ(mean);
  INCEPTION_EXT_READ(rstd);
  INCEPTION_EXT_READ(gamma);
  INCEPTION_EXT_READ(beta);
  INCEPTION_EXT_READ(partials);
  INCEPTION_EXT_READ(dgamma);
  INCEPTION_EXT_READ(dbeta);
}

void fill(const py::dict& fields, PackedFilter& to) {
  INCEPTION_EXT_READ(weight);
  INCEPTION_EXT_READ(packed);
  for (int i = 0; i < 4; ++i) to.stride[i] = py::cast<std::vector<int64_t>>(fields["stride"])[i];
  INCEPTION_EXT_READ(packed_stride);
  INCEPTION_EXT_READ(filters);
  INCEPTION_EXT_READ(channels);
  INCEPTION_EXT_READ(kernel_h);
  INCEPTION_EXT_READ(kernel_w);
  INCEPTION_EXT_READ(packed_columns);
}

template <typename Item, int kSize>
int32_t fill_all(const std::vector<py::dict>& items, Item (&to)[kSize]) {
  if (items.size() > kSize) throw std::invalid_argument("too many items");
  for (size_t i = 0; i < items.size(); ++i) fill(items[i], to[i]);
  return static_cast<int32_t>(items.size());
}

int tile_statistics(const py::dict& fields, const std::vector<Tensor>& tensors) {
  BatchNormTileStatisticsParams to = {};
  INCEPTION_EXT_READ(x);
  INCEPTION_EXT_READ(x_stride);
  INCEPTION_EXT_READ(pixels);
  INCEPTION_EXT_READ(channels);
  INCEPTION_EXT_READ(tiles);
  INCEPTION_EXT_READ(tile_mean);
  INCEPTION_EXT_READ(tile_m2);
  INCEPTION_EXT_READ(dtype);
  return run(batch_norm_tile_statistics, to, tensors);
}

int finalize(const std::vector<py::dict>& items, const std::vector<Tensor>& tensors) {
  BatchNormFinalizeParams params = {};
  params.items = fill_all(items, params.item);
  return run(batch_norm_finalize, params, tensors);
}

int apply(const std::vector<py::dict>& items, const py::dict& fields,
          const std::vector<Tensor>& tensors) {
  BatchNormReluApplyParams to = {};
  to.items = fill_all(items, to.item);
  INCEPTION_EXT_READ(pixels);
  INCEPTION_EXT_READ(dtype);
  return run(batch_norm_relu_apply, to, tensors);
}

int max_pool(const py::dict& fields, const std::vector<Tensor>& tensors) {
  BatchNormReluMaxPoolParams to = {};
  fill(fields, to.pool);
  INCEPTION_EXT_READ(mean);
  INCEPTION_EXT_READ(rstd);
  INCEPTION_EXT_READ(gamma);
  INCEPTION_EXT_READ(beta);
  return run(batch_norm_relu_max_pool, to, tensors);
}

template <cudaError_t (*launcher)(const BatchNormReluBackwardParams&, cudaStream_t)>
int backward(const std::vector<py::dict>& items, const py::dict& fields,
             const std::vector<Tensor>& tensors) {
  BatchNormReluBackwardParams to = {};
  to.items = fill_all(items, to.item);
  INCEPTION_EXT_READ(chunks);
  INCEPTION_EXT_READ(pixels);
  INCEPTION_EXT_READ(count);
  INCEPTION_EXT_READ(batch_statistics);
  INCEPTION_EXT_READ(dtype);
  if (fields.contains("input_h")) {
    INCEPTION_EXT_READ(input_h);
    INCEPTION_EXT_READ(input_w);
    INCEPTION_EXT_READ(output_h);
    INCEPTION_EXT_READ(output_w);
    fill(fields, to.window);
  }
  return run(launcher, to, tensors);
}

template <cudaError_t (*launcher)(const PackWeightsParams&, cudaStream_t)>
int pack(const std::vector<py::dict>& filters, const py::dict& fields,
         const std::vector<Tensor>& tensors) {
  PackWeightsParams to = {};
  to.filters = fill_all(filters, to.filter);
  INCEPTION_EXT_READ(dtype);
  INCEPTION_EXT_READ(weight_dtype);
  return run(launcher, to, tensors);
}

}  // namespace

PYBIND11_MODULE(training_kernels, m) {
  inception_ext::emulator::bind_controls(m);
  py::enum_<Use>(m, "Use")
      .value("READ", Use::kRead)
      .value("WRITE", Use::kWrite)
      .value("UPDATE", Use::kUpdate)
      .value("SCRATCH", Use::kScratch);
  m.def("chunks", &batch_norm_chunks);
  m.def("tile_statistics", &tile_statistics);
  m.def("finalize", &finalize);
  m.def("apply", &apply);
  m.def("max_pool", &max_pool);
  m.def("backward_reduce", &backward<batch_norm_relu_backward_reduce>);
  m.def("backward_apply", &backward<batch_norm_relu_backward_apply>);
  m.def("pack_fprop", &pack<pack_fprop_weights>);
  m.def("pack_dgrad", &pack<pack_dgrad_weights>);
}
