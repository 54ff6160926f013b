// How the reductions of batch_norm split their pixels: fixed by the shape alone, so that neither
// the number of threads nor the ISA moves a boundary.
#pragma once

#include <cstdint>

namespace inception_ext::cpu {

// Pixels whose deviations are summed around one shift, and the first of them, whose mean the shift
// is: see batch_norm_impl.h.
constexpr int64_t kBlockPixels = 64;
constexpr int64_t kShiftPixels = 8;

// Channels in the workspace are padded to whole vectors of any ISA.
constexpr int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

// One chunk is the work of one thread at a time: about 64k elements, in whole blocks.
constexpr int64_t chunk_pixels(int64_t channels) {
  const int64_t blocks = 65536 / (kBlockPixels * (channels > 0 ? channels : 1));
  return kBlockPixels * (blocks < 1 ? 1 : blocks > 64 ? 64 : blocks);
}

constexpr int64_t chunk_count(int64_t pixels, int64_t channels) {
  return (pixels + chunk_pixels(channels) - 1) / chunk_pixels(channels);
}

// Floats of workspace for one padded channel of one chunk.
constexpr int64_t kStatisticsScratch = 7;  // mean, m2: double; shift, sum, sum_squares: float
constexpr int64_t kBackwardScratch = 2;    // sum_dy, sum_dy_xhat: float

}  // namespace inception_ext::cpu
