// The emulator's own tests as a Python module: each function launches one kernel on the memory of
// NumPy-like tensors, given by their addresses.
#include <map>

#include "../../../csrc/emulator/controls.h"
#include "../../../csrc/emulator/global_memory.h"
#include "../../../csrc/emulator/launch.h"
#include "collectives.cuh"
#include "gemm.cuh"
#include "planted_bugs.cuh"

namespace {

using inception_ext::Use;
using inception_ext::emulator::Operand;
using inception_ext::emulator::Scope;
using namespace inception_ext::kernels;

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Operand matrix(const char* name, Use use, uintptr_t address, int64_t bytes, int64_t rows,
               int64_t columns) {
  return {name, use, at<void>(address), bytes, {rows, columns}, {columns, 1}};
}

void require_success(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("cudaError " + std::to_string(error));
}

template <typename T>
void run_gemm(Fault fault, uintptr_t a, uintptr_t b, uintptr_t bias, uintptr_t c, int m, int n,
              int k) {
  const Scope scope("gemm", {matrix("a", Use::kRead, a, sizeof(T), m, k),
                             matrix("b", Use::kRead, b, sizeof(T), n, k),
                             matrix("bias", Use::kRead, bias, sizeof(float), 1, n),
                             matrix("c", Use::kWrite, c, sizeof(T), m, n)});
  const GemmParams<T> p{at<const T>(a), at<const T>(b), at<const float>(bias), at<T>(c), m, n, k};
  switch (fault) {
    case Fault::kNone:
      return require_success(gemm<T, Fault::kNone>(p, nullptr));
    case Fault::kNoWait:
      return require_success(gemm<T, Fault::kNoWait>(p, nullptr));
    case Fault::kNoBarrier:
      return require_success(gemm<T, Fault::kNoBarrier>(p, nullptr));
    case Fault::kNoBarrierBeforeEpilogue:
      return require_success(gemm<T, Fault::kNoBarrierBeforeEpilogue>(p, nullptr));
    case Fault::kNoSwizzle:
      return require_success(gemm<T, Fault::kNoSwizzle>(p, nullptr));
  }
}

using BugKernel = void (*)(const float*, float*);

// Both variants of each kernel: broken and clean.
#define INCEPTION_EXT_BUG(name)        \
  {                                    \
    #name, { name<true>, name<false> } \
  }
const std::map<std::string, std::pair<BugKernel, BugKernel>> kBugs = {
    INCEPTION_EXT_BUG(missing_barrier),
    INCEPTION_EXT_BUG(missing_barrier_before_reuse),
    INCEPTION_EXT_BUG(missing_copy_wait),
    INCEPTION_EXT_BUG(wait_for_too_few_groups),
    INCEPTION_EXT_BUG(shared_overrun),
    INCEPTION_EXT_BUG(global_write_overrun),
    INCEPTION_EXT_BUG(global_read_overrun),
    INCEPTION_EXT_BUG(copy_overrun),
    INCEPTION_EXT_BUG(misaligned_vector),
    INCEPTION_EXT_BUG(write_to_input),
    INCEPTION_EXT_BUG(read_of_unwritten),
    INCEPTION_EXT_BUG(unwritten_output),
    INCEPTION_EXT_BUG(divergent_barrier),
    INCEPTION_EXT_BUG(barrier_in_half_a_warp),
    INCEPTION_EXT_BUG(race_in_a_warp),
    INCEPTION_EXT_BUG(race_on_a_byte),
    INCEPTION_EXT_BUG(divergent_shuffle),
    INCEPTION_EXT_BUG(barrier_for_too_many),
    INCEPTION_EXT_BUG(matrix_load_in_part_of_a_warp),
};
#undef INCEPTION_EXT_BUG

void run_planted_bug(const std::string& name, bool broken, uintptr_t x, uintptr_t y) {
  const Scope scope(name, {matrix("x", Use::kRead, x, sizeof(float), 1, kCount),
                           matrix("y", Use::kWrite, y, sizeof(float), 1, kCount)});
  const auto& [with_bug, without] = kBugs.at(name);
  require_success(launch(broken ? with_bug : without, dim3(1), dim3(kCount), kBufferBytes, nullptr,
                         at<const float>(x), at<float>(y)));
  scope.check_complete();
}

void run_exchanges(uintptr_t x, uintptr_t y) {
  const Scope scope("exchanges", {matrix("x", Use::kRead, x, sizeof(int), 1, 32),
                                  matrix("y", Use::kWrite, y, sizeof(int), 9, 32)});
  require_success(launch(exchanges, dim3(1), dim3(32), 0, nullptr, at<const int>(x), at<int>(y)));
  scope.check_complete();
}

void run_producer(uintptr_t x, uintptr_t y, int rounds) {
  const Scope scope("producer", {matrix("x", Use::kRead, x, sizeof(int), rounds, 32),
                                 matrix("y", Use::kWrite, y, sizeof(int), 2 * rounds, 32)});
  require_success(launch(producer_and_consumers, dim3(1), dim3(96), 256, nullptr, at<const int>(x),
                         at<int>(y), rounds));
  scope.check_complete();
}

void run_add_up_blocks(uintptr_t x, uintptr_t parts, uintptr_t counter, uintptr_t y, int blocks) {
  const Scope scope("add_up_blocks",
                    {matrix("x", Use::kRead, x, sizeof(float), blocks, kCount),
                     matrix("parts", Use::kScratch, parts, sizeof(float), blocks, kCount),
                     matrix("counter", Use::kUpdate, counter, sizeof(int), 1, 1),
                     matrix("y", Use::kWrite, y, sizeof(float), 1, kCount)});
  require_success(launch(add_up_blocks, dim3(blocks), dim3(32), 16, nullptr, at<const float>(x),
                         at<float>(parts), at<int>(counter), at<float>(y)));
  scope.check_complete();
}

template <Tile kTile, typename T>
void run_tile(uintptr_t a, uintptr_t b, uintptr_t c) {
  const Scope scope("tile", {matrix("a", Use::kRead, a, sizeof(T), 16, 16),
                             matrix("b", Use::kRead, b, sizeof(T), 8, 16),
                             matrix("c", Use::kWrite, c, sizeof(float), 16, 8)});
  require_success(launch(multiply_tile<kTile, T>, dim3(1), dim3(32), 1024, nullptr, at<const T>(a),
                         at<const T>(b), at<float>(c)));
  scope.check_complete();
}

}  // namespace

PYBIND11_MODULE(emulator_tests, m) {
  namespace py = pybind11;
  inception_ext::emulator::bind_controls(m);
  py::enum_<Fault>(m, "Fault")
      .value("NONE", Fault::kNone)
      .value("NO_WAIT", Fault::kNoWait)
      .value("NO_BARRIER", Fault::kNoBarrier)
      .value("NO_BARRIER_BEFORE_EPILOGUE", Fault::kNoBarrierBeforeEpilogue)
      .value("NO_SWIZZLE", Fault::kNoSwizzle);
  m.def("gemm_half", &run_gemm<__half>);
  m.def("gemm_bfloat16", &run_gemm<__nv_bfloat16>);
  py::list bugs;
  for (const auto& bug : kBugs) bugs.append(bug.first);
  m.attr("BUGS") = bugs;
  m.def("planted_bug", &run_planted_bug);
  m.def("exchanges", &run_exchanges);
  m.def("producer_and_consumers", &run_producer);
  m.def("add_up_blocks", &run_add_up_blocks);
  m.def("tile_transposed_b", &run_tile<Tile::kTransposedB, __half>);
  m.def("tile_narrow", &run_tile<Tile::kNarrow, __half>);
  m.def("tile_tf32", &run_tile<Tile::kTf32, float>);
}
