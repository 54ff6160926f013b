// copy_channels and image_to_nhwc against naive loops, exactly.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "copy_channels.h"
#include "cpu_test_support.h"
#include "cpu_tests.h"

namespace inception_ext::cpu::test {
namespace {

template <typename T>
void test_copy() {
  Random random(21);
  for (const int64_t channels : {1, 3, 5, 16, 17, 24, 48, 192, 3000}) {
    for (const int64_t pixels : {0, 1, 2, 7, 65, 1000}) {
      if (channels * pixels > 200000) continue;
      for (const Layout from : kLayouts) {
        for (const Layout to : kLayouts) {
          Slice<T> x(pixels, channels, from);
          Slice<T> y(pixels, channels, to);
          x.fill([&](int64_t, int64_t) { return static_cast<double>(random.below(200)); });
          copy_channels({x.data(), x.stride(), y.data(), y.stride(), dtype_of<T>(), pixels,
                         channels, parallel_backwards});
          bool equal = y.intact();
          for (int64_t p = 0; p < pixels; ++p) {
            for (int64_t c = 0; c < channels; ++c) equal &= x.value(p, c) == y.value(p, c);
          }
          check(equal) || fail("copy_channels of %s: P %d C %d", dtype_name<T>(),
                               static_cast<int>(pixels), static_cast<int>(channels));
        }
      }
    }
  }
}

// relu_channels, onto another slice and onto itself.
template <typename T>
void test_relu() {
  Random random(23);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const int64_t channels : {1, 5, 16, 37, 192}) {
    for (const int64_t pixels : {0, 1, 7, 65}) {
      for (const Layout from : kLayouts) {
        Slice<T> x(pixels, channels, from);
        Slice<T> y(pixels, channels, other(from, 3));
        x.fill([&](int64_t, int64_t) { return random.below(9) == 0 ? nan : random.normal(); });
        const CopyChannelsParams params = {x.data(),      x.stride(), y.data(), y.stride(),
                                           dtype_of<T>(), pixels,     channels, parallel_backwards};
        relu_channels(params);
        bool equal = y.intact();
        for (int64_t p = 0; p < pixels; ++p) {
          for (int64_t c = 0; c < channels; ++c) {
            const double v = x.value(p, c);
            equal &= std::isnan(v) ? std::isnan(y.value(p, c)) : y.value(p, c) == std::max(v, 0.0);
          }
        }
        CopyChannelsParams onto_itself = params;
        onto_itself.y = x.data();
        onto_itself.y_stride = x.stride();
        relu_channels(onto_itself);
        check(equal && x.intact() && x.same_bits(y)) ||
            fail("relu_channels of %s: P %d C %d", dtype_name<T>(), static_cast<int>(pixels),
                 static_cast<int>(channels));
      }
    }
  }
}

struct ImageCase {
  int64_t n, c, h, w;
  bool channels_last;
  bool affine;
  bool transposed;  // w is the slow axis of x
  Layout layout;    // of x where it is channels_last, and of y
};

template <typename From, typename To>
void test_image(const ImageCase& t, Random& random) {
  const int64_t pixels = t.n * t.h * t.w;
  // NCHW is NHWC with pixels of one channel, c times as many.
  Slice<From> x = t.channels_last ? Slice<From>(pixels, t.c, t.layout)
                                  : Slice<From>(pixels * t.c, 1, {0, t.layout.offset});
  x.fill([&](int64_t, int64_t) {
    return std::is_same_v<From, uint8_t> ? static_cast<double>(random.below(256)) : random.normal();
  });
  const int64_t element = t.channels_last ? x.stride() : 1;
  const int64_t stride_c = t.channels_last ? 1 : t.h * t.w;
  const int64_t stride_n = (t.channels_last ? 1 : t.c) * t.h * t.w * element;
  const int64_t stride_h = t.transposed ? element : t.w * element;
  const int64_t stride_w = t.transposed ? t.h * element : element;
  Slice<float> scale = channel_values(t.c, [&](int64_t) { return random.normal(); });
  Slice<float> shift = channel_values(t.c, [&](int64_t) { return random.normal(); });
  Slice<To> y(pixels, t.c, other(t.layout, 1));
  for (const ParallelFor parallel : {parallel_serial, parallel_backwards}) {
    image_to_nhwc({x.data(), dtype_of<From>(), stride_n, stride_c, stride_h, stride_w, y.data(),
                   dtype_of<To>(), y.stride(), t.n, t.c, t.h, t.w,
                   t.affine ? scale.data() : nullptr, t.affine ? shift.data() : nullptr, parallel});
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < t.c; ++c) {
        const int64_t w = p % t.w;
        const int64_t h = p / t.w % t.h;
        const int64_t n = p / t.w / t.h;
        const double v =
            to_double(x.data()[n * stride_n + c * stride_c + h * stride_h + w * stride_w]);
        volatile float product = static_cast<float>(v) * (t.affine ? scale.at(0, c) : 1.0f);
        const float sum = product + (t.affine ? shift.at(0, c) : 0.0f);
        check(y.value(p, c) == to_double(from_double<To>(sum))) ||
            fail("image_to_nhwc %s -> %s: [%d %d %d %d] is %.9g, not %.9g (C %d W %d)",
                 dtype_name<From>(), dtype_name<To>(), static_cast<int>(n), static_cast<int>(h),
                 static_cast<int>(w), static_cast<int>(c), y.value(p, c),
                 to_double(from_double<To>(sum)), static_cast<int>(t.c), static_cast<int>(t.w));
      }
    }
    check(y.intact()) || fail("image_to_nhwc wrote outside its slice");
  }
}

template <typename From>
void test_images() {
  Random random(22);
  for (const int64_t w : {1, 5, 16, 63, 64, 65, 130}) {
    for (const int64_t c : {1, 3, 4}) {
      for (const bool channels_last : {false, true}) {
        for (const bool transposed : {false, true}) {
          for (const Layout layout : kLayouts) {
            const ImageCase t = {2, c, 3, w, channels_last, w != 5, transposed, layout};
            test_image<From, float>(t, random);
            test_image<From, bf16>(t, random);
          }
        }
      }
    }
  }
  image_to_nhwc({nullptr, dtype_of<From>(), 0, 0, 0, 0, nullptr, DType::kFloat32, 3, 0, 3, 4, 4,
                 nullptr, nullptr, parallel_serial});
}

}  // namespace

void test_copy_channels() {
  run_group("copy_channels: float", test_copy<float>);
  run_group("copy_channels: bf16", test_copy<bf16>);
  run_group("copy_channels: uint8", test_copy<uint8_t>);
  run_group("relu_channels: float", test_relu<float>);
  run_group("relu_channels: bf16", test_relu<bf16>);
  run_group("image_to_nhwc: float", test_images<float>);
  run_group("image_to_nhwc: bf16", test_images<bf16>);
  run_group("image_to_nhwc: uint8", test_images<uint8_t>);
}

}  // namespace inception_ext::cpu::test
