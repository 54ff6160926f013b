// The headers of LibTorch's stable ABI. All of csrc/torch includes them through this one, so that
// what fails inside torch (no memory left, say) raises with torch's own words.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <stdexcept>
#include <string>

// Since torch 2.13; weak, so that the same file loads beside an older one.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace inception_ext {

[[noreturn]] inline void fail_inside_torch(const char* call) {
  if (!torch_exception_get_what_without_backtrace) {
    throw std::runtime_error(std::string("a call of torch failed, see stderr for why: ") + call);
  }
  throw std::runtime_error(torch_exception_get_what_without_backtrace());
}

}  // namespace inception_ext

// torch's own definition keeps the message only in files that need torch 2.13.
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call)    \
  if ((call) != TORCH_SUCCESS) {               \
    ::inception_ext::fail_inside_torch(#call); \
  }

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
