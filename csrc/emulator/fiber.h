// Execution contexts that take turns on one host thread: every CUDA thread runs on one.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) || defined(INCEPTION_EXT_PORTABLE_FIBERS)
#define INCEPTION_EXT_UCONTEXT_FIBERS
#include <ucontext.h>
#endif

namespace inception_ext::emulator {

// A suspended execution. Switching saves the callee-saved registers and nothing else: the
// floating-point environment is shared.
struct Context {
#ifdef INCEPTION_EXT_UCONTEXT_FIBERS
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
};

// Makes `context` one that calls entry() on the stack [base, top) when switched to. entry() must
// never return.
void prepare(Context& context, char* base, char* top, void (*entry)());

// Suspends the running context into `from` and goes on with `to`.
void switch_context(Context& from, Context& to);

// Stacks for contexts, all of one size, reused last in, first out.
class StackPool {
 public:
  StackPool() = default;
  ~StackPool();
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  // The number of a free stack.
  int take();
  void give_back(int stack) { free_.push_back(stack); }
  char* base(int stack) const;
  char* top(int stack) const;
  // Whether something wrote to the far end of the stack.
  bool overflowed(int stack) const;

 private:
  void grow();

  std::vector<char*> slabs_;
  std::vector<int> free_;
};

}  // namespace inception_ext::emulator
