// How the kernels ask for threads: a plain function pointer, so that the caller decides whose
// threads they are (torch's in the extension, std::thread or none in the tests).
#pragma once

#include <cstdint>

namespace inception_ext::cpu {

// Runs on [begin, end), a part of the range given to ParallelFor. Must not throw.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Splits [begin, end) into disjoint parts of at least `grain` indices (the last may be shorter),
// calls `body` on each, on any thread in any order, and returns when all are done. Never calls
// `body` on an empty part. May call it once on the whole range.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                             void* context);

// Passes a callable `void(int64_t begin, int64_t end)` through the function pointer.
template <typename Callable>
void parallel_for(ParallelFor parallel, int64_t begin, int64_t end, int64_t grain,
                  const Callable& callable) {
  if (begin >= end) return;
  const ParallelBody body = [](int64_t part_begin, int64_t part_end, void* context) {
    (*static_cast<const Callable*>(context))(part_begin, part_end);
  };
  parallel(begin, end, grain, body, const_cast<Callable*>(&callable));
}

}  // namespace inception_ext::cpu
