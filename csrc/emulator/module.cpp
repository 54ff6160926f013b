// The Python module inception_ext._emulator: importing it registers inception_ext_emulated::*.
#include "controls.h"

PYBIND11_MODULE(_emulator, module) { inception_ext::emulator::bind_controls(module); }
