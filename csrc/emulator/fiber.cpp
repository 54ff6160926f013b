#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifndef INCEPTION_EXT_UCONTEXT_FIBERS

// Saves the registers that a call preserves on the running stack, then pops those of the other.
extern "C" __attribute__((visibility("hidden"))) void inception_ext_switch_stack(void** from,
                                                                                 void* to);
asm(R"(
.text
.p2align 4
.globl inception_ext_switch_stack
.hidden inception_ext_switch_stack
.type inception_ext_switch_stack,@function
inception_ext_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size inception_ext_switch_stack,.-inception_ext_switch_stack
)");

#endif

namespace inception_ext::emulator {

#ifdef INCEPTION_EXT_UCONTEXT_FIBERS

void prepare(Context& context, char* base, char* top, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = base;
  context.state.uc_stack.ss_size = top - base;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

void prepare(Context& context, char* /*base*/, char* top, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto* slot = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
  *--slot = nullptr;  // where entry() would return to; also aligns the stack as a call does
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--slot = nullptr;
  context.stack_pointer = slot;
}

void switch_context(Context& from, Context& to) {
  inception_ext_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#endif

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kStacksPerSlab = 128;
constexpr size_t kSlabBytes = kStackBytes * kStacksPerSlab;
constexpr uint64_t kCanary = 0x5afe57ac5afe57ac;

// Stacks start at different offsets within a page, or the frames of all threads of a warp would
// fall into the same few sets of the level 1 cache.
constexpr size_t kColourStep = 1088;
constexpr int kColours = 15;

}  // namespace

StackPool::~StackPool() {
  for (char* slab : slabs_) munmap(slab, kSlabBytes);
}

void StackPool::grow() {
  void* slab = mmap(nullptr, kSlabBytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (slab == MAP_FAILED) throw std::bad_alloc();
  const int first = static_cast<int>(slabs_.size()) * kStacksPerSlab;
  slabs_.push_back(static_cast<char*>(slab));
  for (int i = kStacksPerSlab - 1; i >= 0; --i) free_.push_back(first + i);
}

int StackPool::take() {
  if (free_.empty()) grow();
  const int stack = free_.back();
  free_.pop_back();
  std::memcpy(base(stack), &kCanary, sizeof(kCanary));
  return stack;
}

char* StackPool::base(int stack) const {
  return slabs_[stack / kStacksPerSlab] + stack % kStacksPerSlab * kStackBytes;
}

char* StackPool::top(int stack) const {
  return base(stack) + kStackBytes - stack % kColours * kColourStep;
}

bool StackPool::overflowed(int stack) const {
  return std::memcmp(base(stack), &kCanary, sizeof(kCanary)) != 0;
}

}  // namespace inception_ext::emulator
