// The checks before an access to memory, shared by plain accesses, cp.async and ldmatrix.
#pragma once

#include <cstddef>

#include "block.h"
#include "place.h"

namespace inception_ext::emulator {

// Fails the block unless the bytes lie in its shared memory at a multiple of their number and,
// where `access` takes part in the race check, no other access collides.
void check_shared(Block& block, const void* pointer, size_t bytes, bool write,
                  const Access& access);

// Fails the block unless the bytes lie in a tensor of the op, at a multiple of `alignment`; counts
// them.
void check_global(Block& block, const void* pointer, size_t bytes, size_t alignment, bool write,
                  Place place);

}  // namespace inception_ext::emulator
