// The Python module: importing it loads the ops (their registration is static); build_info() says
// what the file holds.
#include <Python.h>

#include "cpu/isa.h"

#ifdef INCEPTION_EXT_CUDA_VERSION
constexpr const char* kCuda = INCEPTION_EXT_CUDA_VERSION;
constexpr const char* kArchitectures = INCEPTION_EXT_ARCHITECTURES;
#else
constexpr const char* kCuda = "";
constexpr const char* kArchitectures = "";
#endif

namespace {

// Strings alone, so that the caller needs no knowledge of this file: see _library.build_info().
PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s}",                          //
                       "version", INCEPTION_EXT_VERSION,                 //
                       "torch_built_with", INCEPTION_EXT_TORCH_VERSION,  //
                       "cuda", kCuda, "architectures", kArchitectures,   //
                       "cpu_isa", inception_ext::cpu::isa_name());
}

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, "What this binary holds."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  return PyModule_Create(&module);
}
