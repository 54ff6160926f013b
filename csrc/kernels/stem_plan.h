// The tiles of the two stem kernels: plain C++, for host and device.
//
// A block computes a tile of the max pool's output, `rows` x 14 pixels: images of 224 x 224 give 56
// and 28 columns, that is four tiles and two. Its windows cover (2 * rows + 1) x 29 pixels of the
// convolution, which are computed in fragments of 16, two to a row (three of the 32 columns are not
// used), for 64 filters at once.
#pragma once

#include <cstdint>

namespace inception_ext::kernels {

constexpr int kStemFilters = 64;
constexpr int kPooledColumns = 14;
constexpr int kConvColumns = 2 * kPooledColumns + 1;
constexpr int kFragmentColumns = 32;
constexpr int kStemBlocks = 2;  // that share a multiprocessor, where its memory allows

// kRows: 4 or 2. kBytes: of an element.
template <int kRows, int kBytes>
struct StemTile {
  static constexpr int kConvRows = 2 * kRows + 1;
  // Nine rows: a warp takes one half of every third. Five rows: both halves of one.
  static constexpr int kWarps = kRows == 4 ? 6 : 5;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kFragments = 2 * kConvRows / kWarps;
  // The convolution's pixels on their way through the pool.
  static constexpr int kConvBytes = kConvRows * kFragmentColumns * kStemFilters * kBytes;
};

// stem_conv_pool: the filters, K in tiles of 64 bytes a filter; the image under the tile, in words
// of 32 bits (device/stem_patch.cuh).
template <int kRows, int kBytes>
struct PatchTile : StemTile<kRows, kBytes> {
  static constexpr int kColumns = 2 * (kFragmentColumns - 1) + 7;
  static constexpr int kPatchRows = 2 * (StemTile<kRows, kBytes>::kConvRows - 1) + 7;
  static constexpr int kRowWords = kBytes == 2 ? 116 : 212;
  // A row more: the windows' eighth rows are read, and then masked.
  static constexpr int kPatchBytes = (kPatchRows + 1) * kRowWords * 4;
  static constexpr int kFilterTiles = kBytes == 2 ? 5 : 10;
  static constexpr int kFilterBytes = kFilterTiles * kStemFilters * 64;
  static constexpr int kSharedBytes =
      kFilterBytes + StemTile<kRows, kBytes>::kConvBytes + kPatchBytes + kStemFilters * 4;
};

// stem_conv_conv_pool: filters in a ring of stages, 128 bytes a filter, which shares its memory
// with the pixels that are pooled; x and then, in its place, the 1x1 convolution's pixels under the
// tile, K in tiles of 64 bytes a pixel. Of their 32 columns one is not used: whole rows are a
// multiple of eight pixels, after which the tiles' pattern repeats. The last fragment reads two
// pixels past the end, for columns that are not used, and finds the biases there.
constexpr int kWideFilters = 192;  // of the 3x3 convolution

template <int kRows, int kBytes>
struct ReducedTile : StemTile<kRows, kBytes> {
  static constexpr int kColumns = kFragmentColumns;
  static constexpr int kUsedColumns = kConvColumns + 2;
  static constexpr int kPixels = (StemTile<kRows, kBytes>::kConvRows + 2) * kColumns;
  static constexpr int kTileBytes = kPixels * 64;
  static constexpr int kTiles = kStemFilters * kBytes / 64;
  static constexpr int kStages = 4;
  static constexpr int kStageBytes = kStemFilters * 128;
  static constexpr int kRingBytes = kStages * kStageBytes > StemTile<kRows, kBytes>::kConvBytes
                                        ? kStages * kStageBytes
                                        : StemTile<kRows, kBytes>::kConvBytes;
  static constexpr int kSharedBytes =
      kRingBytes + kTiles * kTileBytes + (kStemFilters + kWideFilters) * 4;
};

// Tiles of the pool's output.
constexpr int64_t stem_tiles(int rows, int64_t batch, int64_t output_h, int64_t output_w) {
  return batch * ((output_h + rows - 1) / rows) *
         ((output_w + kPooledColumns - 1) / kPooledColumns);
}

}  // namespace inception_ext::kernels
