// max_pool against torch's rules in naive loops, exactly.
#include <vector>

#include "cpu_test_support.h"
#include "cpu_tests.h"
#include "max_pool.h"

namespace inception_ext::cpu::test {
namespace {

struct Window {
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  bool ceil_mode;
};

const std::vector<Window> kWindows = {
    {3, 3, 1, 1, 1, 1, true},  {3, 3, 2, 2, 0, 0, true},  {2, 2, 2, 2, 0, 0, true},
    {3, 3, 2, 2, 1, 1, false}, {2, 3, 2, 1, 1, 0, false}, {5, 5, 1, 1, 2, 2, false},
    {1, 1, 1, 1, 0, 0, false}, {1, 1, 3, 2, 0, 0, true},  {15, 17, 1, 2, 7, 8, true},
    {3, 3, 3, 3, 1, 1, true},  {2, 2, 3, 3, 0, 0, false}, {3, 1, 1, 1, 1, 0, false},
    {2, 2, 1, 1, 1, 1, false}, {4, 4, 2, 2, 2, 2, false},
};

// torch's pooling_output_shape.
int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t span = size + 2 * padding - kernel + (ceil_mode ? stride - 1 : 0);
  if (span < 0) return 0;
  int64_t out = span / stride + 1;
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;
  return out;
}

MaxPoolShape make_shape(int64_t n, int64_t h, int64_t w, int64_t c, const Window& k) {
  return {n,
          h,
          w,
          c,
          output_size(h, k.kernel_h, k.stride_h, k.padding_h, k.ceil_mode),
          output_size(w, k.kernel_w, k.stride_w, k.padding_w, k.ceil_mode),
          k.kernel_h,
          k.kernel_w,
          k.stride_h,
          k.stride_w,
          k.padding_h,
          k.padding_w};
}

std::string describe(const MaxPoolShape& s) {
  std::string text;
  for (const int64_t v : {s.n, s.h, s.w, s.c}) text += std::to_string(v) + " ";
  text += "->";
  for (const int64_t v : {s.out_h, s.out_w}) text += " " + std::to_string(v);
  text += ", kernel";
  for (const int64_t v : {s.kernel_h, s.kernel_w, s.stride_h, s.stride_w, s.padding_h, s.padding_w})
    text += " " + std::to_string(v);
  return text;
}

enum class Values { kNormal, kTies, kSpecial };

double draw(Random& random, Values values) {
  switch (values) {
    case Values::kNormal:
      return random.normal();
    case Values::kTies:
      return static_cast<double>(random.below(3)) - 1.0;
    case Values::kSpecial:
      break;
  }
  const int64_t kind = random.below(12);
  return kind == 0 ? NAN : kind < 6 ? -INFINITY : kind == 6 ? INFINITY : kind == 7 ? -0.0 : 0.0;
}

bool same_value(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Value and window index of one output element.
template <typename T>
void naive_element(Slice<T>& x, const MaxPoolShape& s, int64_t pixel, int64_t c, double* value,
                   int64_t* index) {
  const int64_t ow = pixel % s.out_w;
  const int64_t oh = pixel / s.out_w % s.out_h;
  const int64_t n = pixel / s.out_w / s.out_h;
  *index = -1;
  for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
    for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
      const int64_t ih = oh * s.stride_h - s.padding_h + kh;
      const int64_t iw = ow * s.stride_w - s.padding_w + kw;
      if (ih < 0 || ih >= s.h || iw < 0 || iw >= s.w) continue;
      const double v = x.value((n * s.h + ih) * s.w + iw, c);
      if (*index < 0 || v > *value || std::isnan(v)) {
        *value = v;
        *index = kh * s.kernel_w + kw;
      }
    }
  }
}

template <typename T>
struct Run {
  MaxPoolShape shape;
  Slice<T> x, y, y_alone, dy, dx;
  Slice<uint8_t> argmax;

  Run(const MaxPoolShape& s, Layout layout)
      : shape(s),
        x(s.n * s.h * s.w, s.c, layout),
        y(s.n * s.out_h * s.out_w, s.c, other(layout, 1)),
        y_alone(s.n * s.out_h * s.out_w, s.c, layout),
        dy(s.n * s.out_h * s.out_w, s.c, other(layout, 2)),
        dx(s.n * s.h * s.w, s.c, other(layout, 3)),
        argmax(s.n * s.out_h * s.out_w, s.c, {0, 0}) {}

  void fill(Random& random, Values values) {
    x.fill([&](int64_t, int64_t) { return draw(random, values); });
    dy.fill([&](int64_t, int64_t) { return random.normal(); });
  }

  void forward(ParallelFor parallel) {
    max_pool_forward({shape, x.data(), x.stride(), y.data(), y.stride(), argmax.data(),
                      dtype_of<T>(), parallel});
    max_pool_forward({shape, x.data(), x.stride(), y_alone.data(), y_alone.stride(), nullptr,
                      dtype_of<T>(), parallel});
  }

  void backward(bool accumulate, ParallelFor parallel) {
    max_pool_backward({shape, dy.data(), dy.stride(), argmax.data(), dx.data(), dx.stride(),
                       accumulate, dtype_of<T>(), parallel});
  }
};

template <typename T>
void check_forward(Run<T>& run) {
  const MaxPoolShape& s = run.shape;
  for (int64_t pixel = 0; pixel < s.n * s.out_h * s.out_w; ++pixel) {
    for (int64_t c = 0; c < s.c; ++c) {
      double value = 0;
      int64_t index = 0;
      naive_element(run.x, s, pixel, c, &value, &index);
      check(same_value(run.y.value(pixel, c), value) && run.argmax.at(pixel, c) == index) ||
          fail("max_pool: pixel %lld c %lld is %g at %d, not %g at %lld (%s %s)",
               static_cast<long long>(pixel), static_cast<long long>(c), run.y.value(pixel, c),
               run.argmax.at(pixel, c), value, static_cast<long long>(index), describe(s).c_str(),
               dtype_name<T>());
      check(same_value(run.y_alone.value(pixel, c), value)) ||
          fail("max_pool without argmax: pixel %lld c %lld is %g, not %g (%s %s)",
               static_cast<long long>(pixel), static_cast<long long>(c),
               run.y_alone.value(pixel, c), value, describe(s).c_str(), dtype_name<T>());
    }
  }
  check(run.y.intact() && run.y_alone.intact()) || fail("max_pool wrote outside its slice");
}

// In the order the header promises, in float: equal to the bit.
template <typename T>
void check_backward(Run<T>& run, bool accumulate, const std::vector<float>& before) {
  const MaxPoolShape& s = run.shape;
  std::vector<float> expected(before.size(), 0.0f);
  for (int64_t pixel = 0; pixel < s.n * s.out_h * s.out_w; ++pixel) {
    const int64_t ow = pixel % s.out_w;
    const int64_t oh = pixel / s.out_w % s.out_h;
    const int64_t n = pixel / s.out_w / s.out_h;
    for (int64_t c = 0; c < s.c; ++c) {
      const int64_t index = run.argmax.at(pixel, c);
      const int64_t ih = oh * s.stride_h - s.padding_h + index / s.kernel_w;
      const int64_t iw = ow * s.stride_w - s.padding_w + index % s.kernel_w;
      expected[static_cast<size_t>(((n * s.h + ih) * s.w + iw) * s.c + c)] +=
          static_cast<float>(run.dy.value(pixel, c));
    }
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const int64_t pixel = static_cast<int64_t>(i) / s.c;
    const int64_t c = static_cast<int64_t>(i) % s.c;
    const float sum = accumulate ? expected[i] + before[i] : expected[i];
    const double rounded = to_double(from_double<T>(sum));
    check(run.dx.value(pixel, c) == rounded) ||
        fail("max_pool backward: pixel %lld c %lld is %.9g, not %.9g (%s %s)",
             static_cast<long long>(pixel), static_cast<long long>(c), run.dx.value(pixel, c),
             rounded, describe(s).c_str(), dtype_name<T>());
  }
  check(run.dx.intact()) || fail("max_pool backward wrote outside its slice");
}

template <typename T>
void test_case(Random& random, const MaxPoolShape& shape, Layout layout, Values values) {
  Run<T> run(shape, layout);
  run.fill(random, values);
  run.forward(parallel_serial);
  check_forward(run);
  std::vector<float> before;
  run.dx.fill([&](int64_t, int64_t) { return random.normal(); });
  for (int64_t pixel = 0; pixel < shape.n * shape.h * shape.w; ++pixel) {
    for (int64_t c = 0; c < shape.c; ++c) {
      before.push_back(static_cast<float>(run.dx.value(pixel, c)));
    }
  }
  run.backward(true, parallel_serial);
  check_backward(run, true, before);
  run.backward(false, parallel_serial);
  check_backward(run, false, before);
}

template <typename T>
void test_against_naive() {
  Random random(11);
  for (const Window& window : kWindows) {
    size_t turn = 0;
    for (const int64_t size : {1, 2, 3, 4, 7, 8, 13}) {
      for (const int64_t channels : {1, 5, 16, 24, 70}) {
        const int64_t h = size;
        const int64_t w = 1 + (size * 5 + channels) % 9;
        const MaxPoolShape shape = make_shape(1 + size % 3, h, w, channels, window);
        if (shape.out_h <= 0 || shape.out_w <= 0) continue;
        const Values values = static_cast<Values>(turn % 3);
        test_case<T>(random, shape, kLayouts[turn / 3 % kLayouts.size()], values);
        ++turn;
      }
    }
  }
}

template <typename T>
void test_channels() {
  Random random(12);
  for (const int64_t channels : {1, 3, 5, 15, 16, 17, 24, 31, 48, 65, 192, 530}) {
    for (size_t window = 0; window < 3; ++window) {
      for (const Layout layout : kLayouts) {
        test_case<T>(random, make_shape(2, 5, 6, channels, kWindows[window]), layout,
                     Values::kTies);
      }
    }
  }
  // Rows too wide for one strip of any scratch memory.
  for (size_t window = 0; window < 5; ++window) {
    test_case<T>(random, make_shape(1, 3, 1100, 18, kWindows[window]), {0, 0}, Values::kNormal);
  }
}

template <typename T>
void test_threads() {
  for (const Window& window : kWindows) {
    const MaxPoolShape shape = make_shape(3, 14, 13, 96, window);
    if (shape.out_h <= 0 || shape.out_w <= 0) continue;
    Run<T> run(shape, {0, 0});
    Run<T> other(shape, {0, 0});
    Random random(13);
    run.fill(random, Values::kNormal);
    random = Random(13);
    other.fill(random, Values::kNormal);
    run.forward(parallel_serial);
    run.backward(false, parallel_serial);
    for (const ParallelFor parallel : kOtherParallels) {
      other.forward(parallel);
      other.backward(false, parallel);
      check(run.y.same_bits(other.y) && run.y_alone.same_bits(other.y_alone) &&
            run.argmax.same_bits(other.argmax) && run.dx.same_bits(other.dx)) ||
          fail("threads change the result (%s %s)", describe(shape).c_str(), dtype_name<T>());
    }
  }
}

void test_empty() {
  for (const MaxPoolShape& shape :
       {make_shape(0, 4, 4, 3, kWindows[0]), make_shape(2, 4, 4, 0, kWindows[0])}) {
    max_pool_forward({shape, nullptr, 3, nullptr, 3, nullptr, DType::kFloat32, parallel_serial});
    max_pool_backward(
        {shape, nullptr, 3, nullptr, nullptr, 3, false, DType::kFloat32, parallel_serial});
  }
  // No output: a gradient of zero.
  MaxPoolShape shape = make_shape(1, 4, 4, 3, kWindows[0]);
  shape.out_h = 0;
  Slice<float> dx(16, 3, {0, 0});
  max_pool_backward(
      {shape, nullptr, 3, nullptr, dx.data(), 3, false, DType::kFloat32, parallel_serial});
  for (int64_t pixel = 0; pixel < 16; ++pixel)
    check(dx.value(pixel, 1) == 0) || fail("dx without output");
}

}  // namespace

void test_max_pool() {
  run_group("max_pool: naive, float", test_against_naive<float>);
  run_group("max_pool: naive, bf16", test_against_naive<bf16>);
  run_group("max_pool: channels and wide rows, float", test_channels<float>);
  run_group("max_pool: channels and wide rows, bf16", test_channels<bf16>);
  run_group("max_pool: threads, float", test_threads<float>);
  run_group("max_pool: threads, bf16", test_threads<bf16>);
  run_group("max_pool: empty", test_empty);
}

}  // namespace inception_ext::cpu::test
