// Plain parameter structs of the CUDA launchers: no torch, no CUDA, C-compatible layout.
//
// Activations are NHWC with channel stride 1 and any pixel strides, so that a pointer and three
// strides describe a channel slice of a wider tensor. Strides count elements, not bytes. A dense
// [N, H, W, C] tensor has strides {H * W * C, W * C, C}.
#pragma once

#include <cstdint>

namespace inception_ext::kernels {

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// Element strides of an NHWC tensor; the channel stride is 1.
struct PixelStrides {
  int64_t n;
  int64_t h;
  int64_t w;
};

// kernel 2 or 3, stride 1 or 2, 0 <= 2 * padding <= kernel; height and width may differ. The output
// size is the caller's, so ceil mode needs no flag: every window has to reach at least one pixel,
// (output_h - 1) * stride_h - padding_h < input_h.
struct PoolWindow {
  int32_t kernel_h;
  int32_t kernel_w;
  int32_t stride_h;
  int32_t stride_w;
  int32_t padding_h;
  int32_t padding_w;
};

struct MaxPoolForwardParams {
  const void* x;    // [N, H, W, C], dtype
  void* y;          // [N, OH, OW, C], dtype
  uint8_t* argmax;  // [N, OH, OW, C] dense, kh * kernel_w + kw; may be nullptr (inference)
  PixelStrides x_stride;
  PixelStrides y_stride;
  int64_t batch;     // N
  int64_t channels;  // C
  int64_t input_h;   // H
  int64_t input_w;   // W
  int64_t output_h;  // OH
  int64_t output_w;  // OW
  PoolWindow window;
  DType dtype;
};

struct MaxPoolBackwardParams {
  const void* grad_y;     // [N, OH, OW, C], dtype
  const uint8_t* argmax;  // [N, OH, OW, C] dense, as the forward wrote it
  void* grad_x;           // [N, H, W, C], dtype
  PixelStrides grad_y_stride;
  PixelStrides grad_x_stride;
  int64_t batch;     // N
  int64_t channels;  // C
  int64_t input_h;   // H
  int64_t input_w;   // W
  int64_t output_h;  // OH
  int64_t output_w;  // OW
  PoolWindow window;
  DType dtype;
  bool accumulate;  // false: grad_x = result (zeros included); true: grad_x += result
};

// The images that the stem reads: uint8 or floating, in any layout.
enum class ImageDType : int32_t { kUint8 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat32 = 3 };

struct ImageStrides {
  int64_t n;
  int64_t c;
  int64_t h;
  int64_t w;
};

// conv 7x7, stride 2, padding 3 of x * scale + shift, + bias + ReLU, max pool 3x3, stride 2.
struct StemConvPoolParams {
  const void* x;       // [N, 3, H, W], x_dtype
  const void* weight;  // [64, 152], dtype: row k is filter k in (r, s, c) order, then 5 of padding
  const float* bias;   // [64]
  void* y;             // [N, P, Q, 64], dtype
  ImageStrides x_stride;
  int64_t y_stride;  // elements from one pixel to the next; rows and images follow without a gap
  float scale[3];
  float shift[3];
  int64_t batch;     // N
  int32_t input_h;   // H
  int32_t input_w;   // W
  int32_t conv_h;    // (H + 1) / 2
  int32_t conv_w;    // (W + 1) / 2
  int32_t output_h;  // P; its windows start inside of conv_h
  int32_t output_w;  // Q
  ImageDType x_dtype;
  DType dtype;
  bool exact;  // float32 products in fp32; else on tensor cores, rounded to TF32
};

// conv 1x1 (64 -> 64) + bias + ReLU, conv 3x3, padding 1 (64 -> 192) + bias + ReLU, max pool 3x3,
// stride 2.
struct StemConvConvPoolParams {
  const void* x;        // [N, H, W, 64], dtype
  const void* weight1;  // [64, 64], dtype
  const float* bias1;   // [64]
  const void* weight2;  // [192, 576], dtype: row k is filter k in (r, s, c) order
  const float* bias2;   // [192]
  void* y;              // [N, P, Q, 192], dtype
  int64_t x_stride;     // elements from one pixel to the next; rows and images follow without a gap
  int64_t y_stride;
  int64_t batch;     // N
  int32_t input_h;   // H
  int32_t input_w;   // W
  int32_t output_h;  // P; its windows start inside of H
  int32_t output_w;  // Q
  DType dtype;
  bool exact;  // float32 products in fp32; else on tensor cores, rounded to TF32
};

// Windows along one axis of an average pool: window i covers [floor(i * step / parts),
// ceil((i * step + length) / parts)) of the input and nothing outside of it.
//   kernel and stride: step = stride, parts = 1, length = kernel
//   adaptive:          step = length = input, parts = output
//   global:            the adaptive ones with output = 1
struct AvgPoolAxis {
  int32_t input;
  int32_t output;
  int32_t step;
  int32_t parts;
  int32_t length;
};

// Forward from x to y, backward from the gradient of y to that of x.
struct AvgPoolParams {
  const void* from;     // forward [N, H, W, C], backward [N, P, Q, C], dtype
  void* to;             // forward [N, P, Q, C], backward [N, H, W, C], dtype
  int64_t from_stride;  // elements from one pixel to the next; rows and images without a gap
  int64_t to_stride;
  int64_t batch;     // N
  int64_t channels;  // C
  AvgPoolAxis h;     // from H to P
  AvgPoolAxis w;     // from W to Q
  DType dtype;
};

struct LrnWindow {
  int32_t size;  // channels
  float alpha;
  float beta;
  float k;
};

struct LrnForwardParams {
  const void* x;     // [N * H * W, C], dtype
  void* y;           // [N * H * W, C], dtype
  int64_t x_stride;  // elements from one pixel to the next
  int64_t y_stride;
  int64_t pixels;    // N * H * W
  int64_t channels;  // C
  LrnWindow window;
  DType dtype;
};

struct LrnBackwardParams {
  const void* grad_y;     // [N * H * W, C], dtype
  const void* x;          // [N * H * W, C], dtype
  void* grad_x;           // [N * H * W, C], dtype
  int64_t grad_y_stride;  // elements from one pixel to the next
  int64_t x_stride;
  int64_t grad_x_stride;
  int64_t pixels;    // N * H * W
  int64_t channels;  // C
  LrnWindow window;
  DType dtype;
};

// Channels of a convolution's output that lie in one tensor, from the channel on where the segment
// before it ends.
struct ConvSegment {
  void* y;         // [N, P, Q, channels], dtype
  int64_t stride;  // elements from one pixel to the next
  int32_t channels;
};

// conv + bias + ReLU. Its pixels m = (n * P + p) * Q + q are the rows of a GEMM, its filters k the
// columns, and the products run over (r, s, c).
struct ConvProblem {
  const void* x;       // [N, H, W, C], dtype
  const void* weight;  // [K, R * S * C rounded up to 8], dtype; the rest of a row is 0
  const float* bias;   // [K]
  int64_t x_stride;    // elements from one pixel to the next; rows and images follow without a gap
  int32_t batch;       // N
  int32_t input_h;     // H
  int32_t input_w;     // W
  int32_t channels;    // C
  int32_t output_h;    // P
  int32_t output_w;    // Q
  int32_t filters;     // K
  int32_t kernel_h;    // R
  int32_t kernel_w;    // S
  int32_t stride_h;
  int32_t stride_w;
  int32_t padding_h;
  int32_t padding_w;
  // Reads the 3x3 max pool of x (stride 1, padding 1) in the place of x. Only for 1x1, stride 1.
  bool max_pool;
  bool relu;
  int32_t segments;  // that hold the K channels
  ConvSegment segment[3];
};

constexpr int kMaxConvSide = 1 << 14;  // H + 2 * padding_h, W + 2 * padding_w, R and S
constexpr int kMaxConvProblems = 8;
constexpr int kMaxConvSegments = 3;
// The memory that split-K takes: counters, which start as 0 and are left so, then partial sums.
constexpr int64_t kConvCounterBytes = 16 << 10;
constexpr int64_t kConvPartialBytes = 16 << 20;

struct ConvGroupParams {
  ConvProblem problem[kMaxConvProblems];
  int32_t problems;
  DType dtype;
  bool exact;         // float32 products in fp32; else on tensor cores, rounded to TF32
  int32_t* counters;  // kConvCounterBytes; may be nullptr: then K is not split
  float* partials;    // kConvPartialBytes
};

}  // namespace inception_ext::kernels
