// The image under a tile of stem_conv_pool, and the order in which the 7x7 convolution walks it.
//
// The image's rows lie in shared memory as words of 32 bits. The windows of neighbouring pixels
// start three words apart: 16-bit elements lie as in an NHWC image, two to a word; 32-bit elements
// have the even columns first, then the odd ones. K runs over chunks of four words, one to each
// lane t of four. Eight pixels and a chunk are 32 words whose banks must differ, or the words be
// the same, which 3 * g + t grants to four neighbouring words. A filter row of 10.5 words leaves
// the last 2.5 over, or of 12 + 9 words the last one: these make chunks of the same word in four
// filter rows, 0, 2, 4, 6 or 1, 3, 5. Two rows of the patch lie an odd multiple of 8 words apart
// (kRowWords = 4 modulo 16), so that multiples of 3 up to 21 never take one to another's bank.
//
// A word that the filter has not, or half, is masked: the filters' zeros would not stop a NaN.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"
#include "../stem_plan.h"
#include "pooled_tile.cuh"
#include "tensor_math.cuh"

namespace inception_ext::kernels {

constexpr int kFilterWidth = 7;
constexpr int kFilterRow = 3 * kFilterWidth;
constexpr int kFilterElements = 152;  // of a packed filter, 147 of them used

struct PatchWord {
  int row;       // of the filter
  int word;      // from the start of the window's row
  int elements;  // how many of its elements the filter has, 0 to 2
};

struct PatchElement {
  int column;
  int channel;
};

template <typename T>
struct PatchOrder {
  static_assert(sizeof(T) == 2);
  static constexpr int kChunks = 20;
  static constexpr int kPerWord = 2;

  static __device__ __forceinline__ constexpr PatchWord word(int chunk, int t) {
    if (chunk < 14) return {chunk / 2, chunk % 2 * 4 + t, 2};
    const int row = 2 * t + chunk % 2, rest = (chunk - 14) / 2;
    return {row, 8 + rest, row == kFilterWidth ? 0 : rest == 2 ? 1 : 2};
  }

  static __device__ __forceinline__ constexpr PatchElement element(int word, int i) {
    return {(2 * word + i) / 3, (2 * word + i) % 3};
  }
};

template <>
struct PatchOrder<float> {
  static constexpr int kChunks = 38;  // the last one is empty
  static constexpr int kPerWord = 1;
  static constexpr int kOdd =
      3 * (PatchTile<2, 4>::kColumns + 1) / 2;  // where the odd columns start

  static __device__ __forceinline__ constexpr PatchWord word(int chunk, int t) {
    if (chunk < 35) {
      const int i = chunk % 5;
      return {chunk / 5, i < 3 ? i * 4 + t : kOdd + (i - 3) * 4 + t, 1};
    }
    const int row = 2 * t + (chunk - 35) % 2;
    return {row, kOdd + 8, row == kFilterWidth || chunk == 37 ? 0 : 1};
  }

  static __device__ __forceinline__ constexpr PatchElement element(int word, int /*i*/) {
    return word < kOdd ? PatchElement{word / 3 * 2, word % 3}
                       : PatchElement{(word - kOdd) / 3 * 2 + 1, (word - kOdd) % 3};
  }
};

// Words of T, rounded to what the products take.
template <typename Math>
__device__ __forceinline__ uint32_t pack_word(const float* values) {
  using T = typename Math::Element;
  if constexpr (std::is_same_v<Math, TensorMath<float>>) {
    return to_tf32(values[0]);
  } else {
    Vector<T, PatchOrder<T>::kPerWord> word;
#pragma unroll
    for (int i = 0; i < PatchOrder<T>::kPerWord; ++i) word.data[i] = from_float<T>(values[i]);
    uint32_t bits;
    memcpy(&bits, &word, sizeof(bits));
    return bits;
  }
}

__device__ __forceinline__ float image_value(uint8_t value) { return value; }
template <typename X>
__device__ __forceinline__ float image_value(X value) {
  return to_float(value);
}

// Loads the image under the tile, times scale plus shift; zero outside.
template <typename Math, int kRows, typename X>
__device__ __forceinline__ void fill_patch(uint32_t* patch, const StemConvPoolParams& p, const X* x,
                                           const PooledOrigin& origin) {
  using T = typename Math::Element;
  using Order = PatchOrder<T>;
  using Tile = PatchTile<kRows, sizeof(T)>;
  x += origin.n * p.x_stride.n;
#pragma unroll 2
  for (int i = threadIdx.x; i < Tile::kPatchRows * Tile::kRowWords; i += Tile::kThreads) {
    const int row = i / Tile::kRowWords, word = i % Tile::kRowWords;
    const int32_t h = 4 * origin.row - 3 + row;
    float values[Order::kPerWord];
#pragma unroll
    for (int e = 0; e < Order::kPerWord; ++e) {
      const PatchElement element = Order::element(word, e);
      const int32_t w = 4 * origin.column - 3 + element.column;
      values[e] = 0;
      if (h < 0 || h >= p.input_h || w < 0 || w >= p.input_w || element.column >= Tile::kColumns) {
        continue;
      }
      const X* pointer = x + element.channel * p.x_stride.c + h * p.x_stride.h + w * p.x_stride.w;
      values[e] = fmaf(image_value(load_global(pointer)), p.scale[element.channel],
                       p.shift[element.channel]);
    }
    store_shared(patch + i, pack_word<Math>(values));
  }
}

template <typename Math, int kRows>
__device__ __forceinline__ void fill_patch(uint32_t* patch, const StemConvPoolParams& p,
                                           const PooledOrigin& origin) {
  switch (p.x_dtype) {
    case ImageDType::kUint8:
      return fill_patch<Math, kRows>(patch, p, static_cast<const uint8_t*>(p.x), origin);
    case ImageDType::kFloat16:
      return fill_patch<Math, kRows>(patch, p, static_cast<const __half*>(p.x), origin);
    case ImageDType::kBFloat16:
      return fill_patch<Math, kRows>(patch, p, static_cast<const __nv_bfloat16*>(p.x), origin);
    case ImageDType::kFloat32:
      return fill_patch<Math, kRows>(patch, p, static_cast<const float*>(p.x), origin);
  }
}

// Filters [64, 152] into tiles of 64 bytes a filter: the patch's order of K, the columns' order of
// filters, zero where the filter has nothing.
template <typename Math, int kRows>
__device__ __forceinline__ void fill_filters(char* tiles, const typename Math::Element* weight) {
  using T = typename Math::Element;
  using Order = PatchOrder<T>;
  using Tile = PatchTile<kRows, sizeof(T)>;
  constexpr int kTileWords = kStemFilters * kRowBytes / 4;
#pragma unroll 2
  for (int i = threadIdx.x; i < Tile::kFilterTiles * kTileWords; i += Tile::kThreads) {
    const int tile = i / kTileWords, column = i / (kRowBytes / 4) % kStemFilters;
    const int chunk = i / 4 % kRowChunks, t = i % 4;
    const int k = tile * kRowChunks + chunk;
    const PatchWord word = k < Order::kChunks ? Order::word(k, t) : PatchWord{0, 0, 0};
    const T* filter = weight + filter_of_column<T>(column) * kFilterElements;
    float values[Order::kPerWord];
#pragma unroll
    for (int e = 0; e < Order::kPerWord; ++e) {
      const PatchElement element = Order::element(word.word, e);
      const int k_in_filter = word.row * kFilterRow + element.column * 3 + element.channel;
      values[e] = e < word.elements ? to_float(load_global(filter + k_in_filter)) : 0;
    }
    const int offset = tile * kTileWords * 4 + chunk_offset(column, chunk) + t * 4;
    store_shared(reinterpret_cast<uint32_t*>(tiles + offset), pack_word<Math>(values));
  }
}

// The words of a chunk that the window at `first` has at lane t.
template <typename T>
__device__ __forceinline__ uint32_t load_word(const uint32_t* first, int chunk, int t) {
  const PatchWord word = PatchOrder<T>::word(chunk, t);
  const uint32_t bits =
      load_shared(first + word.row * PatchTile<2, sizeof(T)>::kRowWords + word.word);
  return word.elements * sizeof(T) == 4 ? bits : word.elements == 0 ? 0 : bits & 0xffff;
}

// A [16, kStepK] of 16 neighbouring pixels. first: where the window of the first one starts.
template <typename Math>
__device__ __forceinline__ void load_windows(typename Math::A& a, const uint32_t* first, int step) {
  using T = typename Math::Element;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t* window = first + 3 * (g + 8 * i);
    if constexpr (Math::kStepChunks == 2) {
      a[i] = load_word<T>(window, 2 * step, t);
      a[2 + i] = load_word<T>(window, 2 * step + 1, t);
    } else {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = load_word<T>(window, step, j);
      memcpy(&a[i], words, sizeof(words));
    }
  }
}

}  // namespace inception_ext::kernels
