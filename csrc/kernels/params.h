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

struct GlobalAvgPoolParams {
  const void* x;     // [N, H * W, C], dtype
  void* y;           // [N, C], dtype
  int64_t x_stride;  // elements from one pixel to the next; images follow without a gap
  int64_t y_stride;  // elements from one image to the next
  int64_t batch;     // N
  int64_t pixels;    // H * W
  int64_t channels;  // C
  DType dtype;
};

struct LrnParams {
  const void* x;     // [N * H * W, C], dtype
  void* y;           // [N * H * W, C], dtype
  int64_t x_stride;  // elements from one pixel to the next
  int64_t y_stride;
  int64_t pixels;    // N * H * W
  int64_t channels;  // C
  int32_t size;      // channels in a window
  float alpha;
  float beta;
  float k;
  DType dtype;
};

}  // namespace inception_ext::kernels
