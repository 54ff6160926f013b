// Winograd's transforms, with naive products between them, against the plain convolution in double.
#include <array>
#include <cmath>
#include <limits>
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

double plain_convolution(const WinogradCase& t, Slice<float>& x, const Weights& weights,
                         int64_t pixel, int64_t k) {
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

void run(const WinogradCase& t, Slice<float>& x, const Weights& weights, Slice<float>& bias,
         Slice<float>& y) {
  const int64_t tiles = kN * ((t.h + 3) / 4) * ((t.w + 3) / 4);
  for (int64_t first = 0; first < tiles; first += t.chunk) {
    const int64_t count = std::min(t.chunk, tiles - first);
    Slice<float> v(count * 36, t.c, {0, 0}), m(count * 36, t.k, {0, 0});
    winograd_input(
        {x.data(), x.stride(), v.data(), t.h, t.w, t.c, first, count, t.relu, t.parallel});
    for (int64_t i = 0; i < count * 36; ++i) {
      for (int64_t k = 0; k < t.k; ++k) {
        double sum = 0;
        const double* u = &weights.transformed[(i % 36 * t.k + k) * t.c];
        for (int64_t c = 0; c < t.c; ++c) sum += v.value(i, c) * u[c];
        m.at(i, k) = static_cast<float>(sum);
      }
    }
    winograd_output(
        {m.data(), bias.data(), y.data(), y.stride(), t.h, t.w, t.k, first, count, t.parallel});
  }
}

void test_case(const WinogradCase& t, Random& random) {
  const int64_t pixels = kN * t.h * t.w;
  Slice<float> x(pixels, t.c, t.layout), y(pixels, t.k, other(t.layout, 2));
  x.fill([&](int64_t, int64_t) { return random.normal(); });
  Slice<float> bias = channel_values(t.k, [&](int64_t) { return random.normal(); });
  const Weights weights(t.k, t.c, random);
  run(t, x, weights, bias, y);
  const double tolerance = 64 * std::numeric_limits<float>::epsilon() * std::sqrt(9.0 * t.c);
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

void test_shapes() {
  Random random(31);
  const std::vector<std::array<int64_t, 2>> sizes = {{1, 1}, {3, 9}, {4, 4}, {5, 7}, {13, 8}};
  for (const auto& [h, w] : sizes) {
    for (const int64_t c : {1, 5, 16, 35}) {
      for (const int64_t k : {1, 17, 32}) {
        for (const Layout layout : kLayouts) {
          const bool relu = (h + c) % 2 == 0;
          test_case({h, w, c, k, layout, relu, 3, parallel_backwards}, random);
        }
      }
    }
  }
}

void test_threads() {
  Random random(32);
  WinogradCase t = {14, 14, 24, 16, {0, 0}, false, 100, parallel_serial};
  Slice<float> x(kN * t.h * t.w, t.c, t.layout);
  x.fill([&](int64_t, int64_t) { return random.normal(); });
  Slice<float> bias = channel_values(t.k, [&](int64_t) { return 0.1; });
  const Weights weights(t.k, t.c, random);
  Slice<float> expected(kN * t.h * t.w, t.k, t.layout);
  run(t, x, weights, bias, expected);
  for (const ParallelFor parallel : kOtherParallels) {
    Slice<float> y(kN * t.h * t.w, t.k, t.layout);
    t.parallel = parallel;
    t.chunk = 7;
    run(t, x, weights, bias, y);
    check(y.same_bits(expected)) || fail("winograd: other bits with other threads");
  }
}

// A NaN reaches every output that reads it, and no other image.
void test_nan() {
  Random random(33);
  for (const bool relu : {false, true}) {
    const WinogradCase t = {9, 9, 4, 3, {0, 0}, relu, 100, parallel_serial};
    const int64_t pixels = t.h * t.w;
    Slice<float> x(kN * pixels, t.c, t.layout), y(kN * pixels, t.k, t.layout);
    x.fill([&](int64_t, int64_t) { return random.normal(); });
    x.at(pixels + 4 * t.w + 4, 2) = std::numeric_limits<float>::quiet_NaN();
    Slice<float> bias = channel_values(t.k, [&](int64_t) { return 0.0; });
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

}  // namespace

void test_winograd() {
  run_group("winograd: shapes", test_shapes);
  run_group("winograd: threads", test_threads);
  run_group("winograd: NaN", test_nan);
}

}  // namespace inception_ext::cpu::test
