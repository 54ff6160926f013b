// The emulator's controls as Python functions.
#pragma once

#include <pybind11/pybind11.h>

namespace inception_ext::emulator {

// Defines in `module`: get_settings() -> dict, set_settings(**settings), take_launches() -> list of
// dicts (see LaunchRecord), with everything counted since the last call.
void bind_controls(pybind11::module_& module);

}  // namespace inception_ext::emulator
