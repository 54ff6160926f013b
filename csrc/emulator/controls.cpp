#include "controls.h"

#include <pybind11/stl.h>

#include "counters.h"
#include "launch.h"

namespace inception_ext::emulator {
namespace {

namespace py = pybind11;
using namespace py::literals;

py::dict to_dict(const LaunchRecord& record) {
  py::list touched;
  int64_t bytes_touched = 0;
  for (const auto& [operand, read, written] : record.touched) {
    touched.append(py::dict("operand"_a = operand, "read"_a = read, "written"_a = written));
    bytes_touched += read + written;
  }
  const Counts& counts = record.counts;
  return py::dict("kernel"_a = record.kernel, "op"_a = record.op,
                  "grid"_a = py::make_tuple(record.grid[0], record.grid[1], record.grid[2]),
                  "block"_a = py::make_tuple(record.block[0], record.block[1], record.block[2]),
                  "shared_bytes"_a = record.shared_bytes, "touched"_a = touched,
                  "bytes_touched"_a = bytes_touched, "bytes_read"_a = counts.bytes_read,
                  "bytes_written"_a = counts.bytes_written, "useful_macs"_a = record.useful_macs,
                  "issued_macs"_a = counts.macs, "barriers"_a = counts.barriers,
                  "shared_passes"_a = counts.shared_passes,
                  "bank_conflicts"_a = counts.bank_conflicts,
                  "conflict_places"_a = counts.conflict_places);
}

py::dict get_settings() {
  const Settings s = settings();
  return py::dict("seed"_a = s.seed, "checks"_a = s.checks, "counting"_a = s.counting,
                  "workers"_a = s.workers, "capability"_a = s.capability,
                  "multiprocessors"_a = s.multiprocessors, "shared_limit"_a = s.shared_limit);
}

// Those that are given; the others stay.
void change_settings(const py::kwargs& changes) {
  Settings s = settings();
  for (const auto& [key, value] : changes) {
    const auto name = py::cast<std::string>(key);
    if (name == "seed") {
      s.seed = py::cast<uint64_t>(value);
    } else if (name == "checks") {
      s.checks = py::cast<bool>(value);
    } else if (name == "counting") {
      s.counting = py::cast<bool>(value);
    } else if (name == "workers") {
      s.workers = py::cast<int>(value);
    } else if (name == "capability") {
      s.capability = py::cast<int>(value);
    } else if (name == "multiprocessors") {
      s.multiprocessors = py::cast<int>(value);
    } else if (name == "shared_limit") {
      s.shared_limit = py::cast<size_t>(value);
    } else {
      throw py::type_error("emulator: no setting named " + name);
    }
  }
  set_settings(s);
}

py::list launches() {
  py::list records;
  for (const LaunchRecord& record : take_launches()) records.append(to_dict(record));
  return records;
}

}  // namespace

void bind_controls(py::module_& module) {
  module.def("get_settings", &get_settings, "The settings in force.");
  module.def(
      "set_settings", &change_settings,
      "Changes seed, checks, counting, workers, capability, multiprocessors or shared_limit.");
  module.def("take_launches", &launches, "What was launched since the last call, in order.");
}

}  // namespace inception_ext::emulator
