// Winograd's minimal filtering F(4x4, 3x3) for NHWC tensors: what surrounds the products.
//
// A 3x3 convolution of stride 1 and padding 1 gives each 4x4 tile of its output from a 6x6 tile of
// its input by 36 products a pair of channels, where the plain sum takes 144:
//
//   y = A^T [(G w G^T) * (B^T x B)] A
//
// winograd_input computes B^T x B, winograd_output A^T m A; the products between them are 36
// matrix products [tiles, C] x [C, K], one for each position of the 6x6 tile: a 1x1 convolution of
// 36 groups. Tiles are numbered row by row, image by image, and reach over the right and lower edge
// where H or W is no multiple of 4.
//
// x, bias and y are float32 or bfloat16, v and m float32 in either case: bfloat16 has no digits to
// spare for what the transforms cancel.
//
// The interpolation points are 0, +-sqrt(1/2), +-sqrt(2) and infinity, which make the error of a
// float32 result about 6 times that of the plain sum (0, +-1, +-2: 12 times).
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2015.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "parallel.h"

namespace inception_ext::cpu {

constexpr int64_t kWinogradTile = 4;        // output rows and columns
constexpr int64_t kWinogradPositions = 36;  // of the input tile: 6 x 6

// Tiles of an N x H x W image.
inline int64_t winograd_tiles(int64_t n, int64_t h, int64_t w) {
  return n * ((h + kWinogradTile - 1) / kWinogradTile) * ((w + kWinogradTile - 1) / kWinogradTile);
}

struct WinogradWeightParams {
  const float* weight;  // [K, C, 3, 3]
  int64_t stride[4];    // elements
  float* u;             // [36, C, K] dense
  int64_t k;
  int64_t c;
  bool flipped;  // rows and columns of the filters: for the gradient of a convolution's input
  ParallelFor parallel;
};

// u = G w G^T of each filter.
void winograd_weight(const WinogradWeightParams& params);

// How transformed tiles lie: [tile, position, channel] or [position, tile, channel], dense.
struct WinogradLayout {
  int64_t tile_stride;  // elements
  int64_t position_stride;
};

struct WinogradInputParams {
  const void* x;     // [N, H, W, C]
  int64_t x_stride;  // elements from pixel to pixel, >= C
  float* v;          // [tiles, 36, C]
  WinogradLayout v_layout;
  DType dtype;  // of x
  int64_t h;
  int64_t w;
  int64_t c;
  int64_t first_tile;  // of x, is tile 0 of v
  int64_t tiles;
  bool relu;  // of x, on load
  ParallelFor parallel;
};

void winograd_input(const WinogradInputParams& params);

struct WinogradOutputParams {
  const float* m;  // [tiles, 36, K]
  WinogradLayout m_layout;
  const void* bias;  // [K]; nullptr: y = A^T m A
  void* y;           // [N, H, W, K]
  int64_t y_stride;  // >= K
  DType dtype;       // of bias and y
  int64_t h;
  int64_t w;
  int64_t k;
  int64_t first_tile;  // of y, is tile 0 of m
  int64_t tiles;
  ParallelFor parallel;
};

// y = relu(A^T m A + bias); NaN stays NaN.
void winograd_output(const WinogradOutputParams& params);

}  // namespace inception_ext::cpu
