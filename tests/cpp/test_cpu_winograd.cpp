// Winograd's transforms, with naive products between them, against the plain convolution in double.
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu_test_support.h"
#include "cpu_tests.h"
#include "winograd.h"

namespace inception_ext::cpu::test {
namespace {

constexpr int64_t kN = 2;

struct WinogradCase {
  int64_t h, w, c, k;
  Layout layout;
  bool relu;
  int64_t chunk;  // tiles at a time
  ParallelFor parallel;
  bool by_position = false;  // layout of the transformed tiles

  WinogradLayout layout_of(int64_t count, int64_t channels) const {
    return by_position ? WinogradLayout{channels, count * channels}
                       : WinogradLayout{36 * channels, channels};
  }
  int64_t row(int64_t count, int64_t tile, int64_t position) const {
    return by_position ? position * count + tile : tile * 36 + position;
  }
};

struct Weights {
  Weights(int64_t k, int64_t c, Random& random)
      : channels(c), plain(k * c * 9), transformed(36 * k * c) {
    const double a = std::sqrt(0.5), b = std::sqrt(2.0);
    const double g[6][3] = {{1, 0, 0},
                            {-2.0 / 3, -2.0 / 3 * a, -1.0 / 3},
                            {-2.0 / 3, 2.0 / 3 * a, -1.0 / 3},
                            {1.0 / 6, b / 6, 1.0 / 3},
                            {1.0 / 6, -b / 6, 1.0 / 3},
                            {0, 0, 1}};
    for (double& v : plain) v = static_cast<float>(random.normal());
    for (int64_t pair = 0; pair < k * c; ++pair) {
      for (int i = 0; i < 6; ++i) {
        for (int j = 0; j < 6; ++j) {
          double sum = 0;
          for (int r = 0; r < 3; ++r) {
            for (int s = 0; s < 3; ++s) sum += g[i][r] * plain[pair * 9 + r * 3 + s] * g[j][s];
          }
          transformed[(i * 6 + j) * k * c + pair] = sum;
        }
      }
    }
  }

  int64_t channels;
  std::vector<double> plain;        // [K, C, 3, 3]
  std::vector<double> transformed;  // [36, K, C]
};

template <typename T>
double plain_convolution(const WinogradCase& t, Slice<T>& x, const Weights& weights, int64_t pixel,
                         int64_t k) {
  const int64_t row = pixel / t.w % t.h, column = pixel % t.w;
  double sum = 0;
  for (int r = -1; r <= 1; ++r) {
    for (int s = -1; s <= 1; ++s) {
      if (row + r < 0 || row + r >= t.h || column + s < 0 || column + s >= t.w) continue;
      for (int64_t c = 0; c < t.c; ++c) {
        double value = x.value(pixel + r * t.w + s, c);
        if (t.relu && value < 0) value = 0;
        sum += value * weights.plain[(k * t.c + c) * 9 + (r + 1) * 3 + s + 1];
      }
    }
  }
  return sum;
}

template <typename T>
void run(const WinogradCase& t, Slice<T>& x, const Weights& weights, Slice<T>& bias, Slice<T>& y) {
  const int64_t tiles = kN * ((t.h + 3) / 4) * ((t.w + 3) / 4);
  for (int64_t first = 0; first < tiles; first += t.chunk) {
    const int64_t count = std::min(t.chunk, tiles - first);
    Slice<float> v(count * 36, t.c, {0, 0}), m(count * 36, t.k, {0, 0});
    winograd_input({x.data(), x.stride(), v.data(), t.layout_of(count, t.c), dtype_of<T>(), t.h,
                    t.w, t.c, first, count, t.relu, t.parallel});
    for (int64_t i = 0; i < count * 36; ++i) {
      const int64_t row = t.row(count, i / 36, i % 36);
      for (int64_t k = 0; k < t.k; ++k) {
        double sum = 0;
        const double* u = &weights.transformed[(i % 36 * t.k + k) * t.c];
        for (int64_t c = 0; c < t.c; ++c) sum += v.value(row, c) * u[c];
        m.at(row, k) = static_cast<float>(sum);
      }
    }
    winograd_output({m.data(), t.layout_of(count, t.k), bias.data(), y.data(), y.stride(),
                     dtype_of<T>(), t.h, t.w, t.k, first, count, t.parallel});
  }
}

template <typename T>
void test_case(const WinogradCase& t, Random& random) {
  const int64_t pixels = kN * t.h * t.w;
  Slice<T> x(pixels, t.c, t.layout), y(pixels, t.k, other(t.layout, 2));
  x.fill([&](int64_t, int64_t) { return random.normal(); });
  Slice<T> bias = channel_values<T>(t.k, [&](int64_t) { return random.normal(); });
  const Weights weights(t.k, t.c, random);
  run(t, x, weights, bias, y);
  // The transforms' rounding, then that of y.
  const double tolerance = 64 * std::numeric_limits<float>::epsilon() * std::sqrt(9.0 * t.c) +
                           (std::is_same_v<T, bf16> ? 1.0 / 256 : 0.0);
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t k = 0; k < t.k; ++k) {
      const double expected =
          std::max(0.0, plain_convolution(t, x, weights, p, k) + bias.value(0, k));
      check(close(y.value(p, k), expected, tolerance, tolerance)) ||
          fail("winograd: H %d W %d C %d K %d relu %d: [%d, %d] is %.9g, not %.9g",
               static_cast<int>(t.h), static_cast<int>(t.w), static_cast<int>(t.c),
               static_cast<int>(t.k), t.relu, static_cast<int>(p), static_cast<int>(k),
               y.value(p, k), expected);
    }
  }
  check(y.intact()) || fail("winograd_output wrote outside its slice");
}

template <typename T>
void test_shapes() {
  Random random(31);
  const std::vector<std::array<int64_t, 2>> sizes = {{1, 1}, {3, 9}, {4, 4}, {5, 7}, {13, 8}};
  for (const auto& [h, w] : sizes) {
    for (const int64_t c : {1, 5, 16, 35}) {
      for (const int64_t k : {1, 17, 32}) {
        for (const Layout layout : kLayouts) {
          const bool relu = (h + c) % 2 == 0;
          const bool by_position = (w + k) % 2 == 0;
          test_case<T>({h, w, c, k, layout, relu, 3, parallel_backwards, by_position}, random);
        }
      }
    }
  }
}

template <typename T>
void test_threads() {
  Random random(32);
  WinogradCase t = {14, 14, 24, 16, {0, 0}, false, 100, parallel_serial};
  Slice<T> x(kN * t.h * t.w, t.c, t.layout);
  x.fill([&](int64_t, int64_t) { return random.normal(); });
  Slice<T> bias = channel_values<T>(t.k, [&](int64_t) { return 0.1; });
  const Weights weights(t.k, t.c, random);
  Slice<T> expected(kN * t.h * t.w, t.k, t.layout);
  run(t, x, weights, bias, expected);
  for (const ParallelFor parallel : kOtherParallels) {
    Slice<T> y(kN * t.h * t.w, t.k, t.layout);
    t.parallel = parallel;
    t.chunk = 7;
    run(t, x, weights, bias, y);
    check(y.same_bits(expected)) || fail("winograd: other bits with other threads");
  }
}

// A NaN reaches every output that reads it, and no other image.
template <typename T>
void test_nan() {
  Random random(33);
  for (const bool relu : {false, true}) {
    const WinogradCase t = {9, 9, 4, 3, {0, 0}, relu, 100, parallel_serial};
    const int64_t pixels = t.h * t.w;
    Slice<T> x(kN * pixels, t.c, t.layout), y(kN * pixels, t.k, t.layout);
    x.fill([&](int64_t, int64_t) { return random.normal(); });
    x.at(pixels + 4 * t.w + 4, 2) = from_double<T>(std::numeric_limits<double>::quiet_NaN());
    Slice<T> bias = channel_values<T>(t.k, [&](int64_t) { return 0.0; });
    run(t, x, Weights(t.k, t.c, random), bias, y);
    for (int64_t k = 0; k < t.k; ++k) {
      for (int64_t p = 0; p < pixels; ++p) {
        check(!std::isnan(y.value(p, k))) || fail("winograd: NaN in another image");
        const int64_t row = p / t.w, column = p % t.w;
        if (row < 3 || row > 5 || column < 3 || column > 5) continue;
        check(std::isnan(y.value(pixels + p, k))) || fail("winograd: NaN lost");
      }
    }
  }
}

// Without a bias it is the plain sum: no ReLU.
void test_without_bias() {
  Random random(34);
  const WinogradCase t = {6, 9, 5, 17, {0, 0}, false, 100, parallel_serial};
  Slice<float> x(kN * t.h * t.w, t.c, t.layout), y(kN * t.h * t.w, t.k, t.layout);
  x.fill([&](int64_t, int64_t) { return random.normal(); });
  Slice<float> none(0, 0, {0, 0});
  const Weights weights(t.k, t.c, random);
  run(t, x, weights, none, y);
  int negative = 0;
  for (int64_t p = 0; p < kN * t.h * t.w; ++p) {
    for (int64_t k = 0; k < t.k; ++k) {
      const double expected = plain_convolution(t, x, weights, p, k);
      check(close(y.value(p, k), expected, 1e-4, 1e-4)) || fail("winograd: without bias");
      negative += expected < 0;
    }
  }
  check(negative > 0) || fail("winograd: nothing for a ReLU to change");
}

// [K, C, 3, 3] in both layouts, as it is and for the gradient of the input.
void test_weight() {
  Random random(35);
  for (const int64_t k : {1, 16, 37}) {
    for (const bool channels_last : {false, true}) {
      const int64_t c = 5;
      const Weights weights(k, c, random);
      std::vector<float> w(static_cast<size_t>(k * c * 9)), u(static_cast<size_t>(36 * k * c));
      const int64_t stride[] = {9 * c, channels_last ? 1 : 9, channels_last ? 3 * c : 3,
                                channels_last ? c : 1};
      for (const bool flipped : {false, true}) {
        for (int64_t i = 0; i < k * c * 9; ++i) {
          const int64_t tap = flipped ? 8 - i % 9 : i % 9;
          w[i / 9 / c * stride[0] + i / 9 % c * stride[1] + tap / 3 * stride[2] +
            tap % 3 * stride[3]] = static_cast<float>(weights.plain[i]);
        }
        winograd_weight({w.data(),
                         {stride[0], stride[1], stride[2], stride[3]},
                         u.data(),
                         k,
                         c,
                         flipped,
                         parallel_backwards});
        for (int64_t i = 0; i < 36 * k * c; ++i) {
          const int64_t position = i / (k * c), row = i / k % c, filter = i % k;
          const double expected = weights.transformed[(position * k + filter) * c + row];
          check(close(u[i], expected, 1e-6, 1e-6)) ||
              fail("winograd_weight: K %d flipped %d: [%d] is %.9g, not %.9g", static_cast<int>(k),
                   flipped, static_cast<int>(i), u[i], expected);
        }
      }
    }
  }
}

}  // namespace

void test_winograd() {
  run_group("winograd: shapes", test_shapes<float>);
  run_group("winograd: shapes, bf16", test_shapes<bf16>);
  run_group("winograd: without bias", test_without_bias);
  run_group("winograd: weight", test_weight);
  run_group("winograd: threads", test_threads<float>);
  run_group("winograd: threads, bf16", test_threads<bf16>);
  run_group("winograd: NaN", test_nan<float>);
  run_group("winograd: NaN, bf16", test_nan<bf16>);
}

}  // namespace inception_ext::cpu::test
