// The errors that the checks find.
#pragma once

#include <stdexcept>
#include <string>

namespace inception_ext::emulator {

// What a check found, in words that a person can act on; reaches Python as a RuntimeError.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The name of the function at an address, without namespaces and argument list:
// "max_pool_forward_kernel<float, 4, 3, 1, true>". Reads the symbol table of the file that holds
// it, because kernels are local symbols.
std::string function_name(const void* address);

}  // namespace inception_ext::emulator
