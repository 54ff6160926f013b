// batch_norm against naive loops in double.
#include <vector>

#include "batch_norm.h"
#include "cpu_test_support.h"
#include "cpu_tests.h"

namespace inception_ext::cpu::test {
namespace {

constexpr double kEps = 1e-3;

struct Shape {
  int64_t pixels;
  int64_t channels;
  Layout layout;
};

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const int64_t channels : {1, 3, 5, 16, 17, 24, 48, 192}) {
    for (const int64_t pixels : {0, 1, 2, 7, 63, 64, 65, 200}) {
      for (const Layout layout : kLayouts) {
        const bool large = pixels * channels > 20000;
        if (!large || layout.gap == 5) all.push_back({pixels, channels, layout});
      }
    }
  }
  // Several chunks where channels are few, and the largest number of channels.
  all.push_back({9001, 1, {2, 1}});
  all.push_back({9001, 3, {0, 0}});
  all.push_back({9001, 17, {1, 0}});
  all.push_back({130, 1024, {0, 0}});
  return all;
}

std::string describe(const Shape& s) {
  return "P " + std::to_string(s.pixels) + " C " + std::to_string(s.channels) + " gap " +
         std::to_string(s.layout.gap) + " offset " + std::to_string(s.layout.offset);
}

// The kernels' buffers for one shape, and everything they compute from x and dy.
template <typename T>
struct Run {
  Shape shape;
  Slice<T> x, dy, y, dx, dx_eval;
  Slice<float> mean, m2, rstd, gamma, beta, sum_dy, sum_dy_xhat;
  bool affine = true;

  explicit Run(const Shape& s)
      : shape(s),
        x(s.pixels, s.channels, s.layout),
        dy(s.pixels, s.channels, other(s.layout, 1)),
        y(s.pixels, s.channels, other(s.layout, 2)),
        dx(s.pixels, s.channels, other(s.layout, 3)),
        dx_eval(s.pixels, s.channels, s.layout),
        mean(1, s.channels, {0, 0}),
        m2(1, s.channels, {0, 0}),
        rstd(1, s.channels, {0, 0}),
        gamma(1, s.channels, {0, 0}),
        beta(1, s.channels, {0, 0}),
        sum_dy(1, s.channels, {0, 0}),
        sum_dy_xhat(1, s.channels, {0, 0}) {}

  float* gamma_or_null() { return affine ? gamma.data() : nullptr; }
  float* beta_or_null() { return affine ? beta.data() : nullptr; }

  std::vector<float> workspace() const {
    return std::vector<float>(
        static_cast<size_t>(batch_norm_workspace(shape.pixels, shape.channels)), NAN);
  }

  void statistics(ParallelFor parallel) {
    std::vector<float> work = workspace();
    batch_norm_statistics({x.data(), x.stride(), dtype_of<T>(), shape.pixels, shape.channels,
                           mean.data(), m2.data(), work.data(), parallel});
  }

  void finalize() {
    batch_norm_finalize({mean.data(), m2.data(), shape.pixels, shape.channels, kEps, 0.1,
                         rstd.data(), nullptr, nullptr});
  }

  void apply(ParallelFor parallel) {
    batch_norm_relu_apply({x.data(), x.stride(), y.data(), y.stride(), dtype_of<T>(), shape.pixels,
                           shape.channels, mean.data(), rstd.data(), gamma_or_null(),
                           beta_or_null(), parallel});
  }

  void backward_reduce(ParallelFor parallel) {
    std::vector<float> work = workspace();
    BatchNormReluBackwardParams params = backward(parallel);
    params.sum_dy = sum_dy.data();
    params.sum_dy_xhat = sum_dy_xhat.data();
    params.workspace = work.data();
    batch_norm_relu_backward_reduce(params);
  }

  void backward_apply(Slice<T>& to, bool batch_statistics, ParallelFor parallel) {
    BatchNormReluBackwardParams params = backward(parallel);
    params.dx = to.data();
    params.dx_stride = to.stride();
    params.batch_statistics = batch_statistics;
    params.sum_dy = batch_statistics ? sum_dy.data() : nullptr;
    params.sum_dy_xhat = batch_statistics ? sum_dy_xhat.data() : nullptr;
    batch_norm_relu_backward_apply(params);
  }

  // What both halves read.
  BatchNormReluBackwardParams backward(ParallelFor parallel) {
    BatchNormReluBackwardParams params = {};
    params.x = x.data();
    params.x_stride = x.stride();
    params.dy = dy.data();
    params.dy_stride = dy.stride();
    params.dtype = dtype_of<T>();
    params.pixels = shape.pixels;
    params.channels = shape.channels;
    params.mean = mean.data();
    params.rstd = rstd.data();
    params.gamma = gamma_or_null();
    params.beta = beta_or_null();
    params.parallel = parallel;
    return params;
  }

  void everything(ParallelFor parallel) {
    statistics(parallel);
    finalize();
    apply(parallel);
    backward_reduce(parallel);
    backward_apply(dx, true, parallel);
    backward_apply(dx_eval, false, parallel);
  }

  double before_relu(int64_t p, int64_t c) {
    const double g = affine ? gamma.value(0, c) : 1.0;
    const double b = affine ? beta.value(0, c) : 0.0;
    return (x.value(p, c) - mean.value(0, c)) * rstd.value(0, c) * g + b;
  }

  void fill(Random& random) {
    for (int64_t c = 0; c < shape.channels; ++c) {
      gamma.at(0, c) = static_cast<float>(c % 7 == 3 ? -0.5 : 0.5 + 0.1 * random.normal());
      beta.at(0, c) = static_cast<float>(0.3 * random.normal());
    }
    x.fill([&](int64_t, int64_t c) { return 2.0 * static_cast<double>(c % 5) + random.normal(); });
    dy.fill([&](int64_t, int64_t) { return random.normal(); });
  }

  // Zeroes dy where rounding decides which side of the ReLU y is on.
  void avoid_ties() {
    for (int64_t p = 0; p < shape.pixels; ++p) {
      for (int64_t c = 0; c < shape.channels; ++c) {
        if (std::fabs(before_relu(p, c)) < 1e-4) dy.at(p, c) = from_double<T>(0);
      }
    }
  }
};

struct Moments {
  double mean;
  double m2;
};

template <typename T>
Moments naive_moments(Slice<T>& x, int64_t pixels, int64_t c) {
  if (pixels == 0) return {0, 0};
  long double sum = 0;
  for (int64_t p = 0; p < pixels; ++p) sum += x.value(p, c);
  const long double mean = sum / pixels;
  long double m2 = 0;
  for (int64_t p = 0; p < pixels; ++p) m2 += (x.value(p, c) - mean) * (x.value(p, c) - mean);
  return {static_cast<double>(mean), static_cast<double>(m2)};
}

template <typename T>
void check_statistics(Run<T>& run, double relative, const char* what) {
  for (int64_t c = 0; c < run.shape.channels; ++c) {
    const Moments expected = naive_moments(run.x, run.shape.pixels, c);
    const double deviation =
        std::sqrt(expected.m2 / static_cast<double>(std::max<int64_t>(1, run.shape.pixels)));
    check(close(run.mean.value(0, c), expected.mean, 1e-7, 1e-6 * deviation)) ||
        fail("%s: mean of c %lld is %.9g, not %.9g (%s)", what, static_cast<long long>(c),
             run.mean.value(0, c), expected.mean, describe(run.shape).c_str());
    check(close(run.m2.value(0, c), expected.m2, relative, 1e-30)) ||
        fail("%s: m2 of c %lld is %.9g, not %.9g (%s)", what, static_cast<long long>(c),
             run.m2.value(0, c), expected.m2, describe(run.shape).c_str());
  }
}

template <typename T>
void check_forward_and_backward(Run<T>& run) {
  const double ulp = std::is_same_v<T, bf16> ? 1.0 / 256 : 1e-6;
  const double pixels = static_cast<double>(run.shape.pixels);
  const std::string where = describe(run.shape) + " " + dtype_name<T>();
  for (int64_t c = 0; c < run.shape.channels; ++c) {
    const double mean = run.mean.value(0, c);
    const double rstd = run.rstd.value(0, c);
    const double gamma = run.affine ? run.gamma.value(0, c) : 1.0;
    double sum_dy = 0;
    double sum_dy_xhat = 0;
    double size = 0;
    const auto gradient = [&](int64_t p) {
      return run.before_relu(p, c) <= 0 ? 0.0 : run.dy.value(p, c);
    };
    for (int64_t p = 0; p < run.shape.pixels; ++p) {
      const double xhat = (run.x.value(p, c) - mean) * rstd;
      sum_dy += gradient(p);
      sum_dy_xhat += gradient(p) * xhat;
      size += std::fabs(gradient(p)) * (1 + std::fabs(xhat));
      check(close(run.y.value(p, c), std::fmax(0.0, run.before_relu(p, c)), ulp, 2e-6)) ||
          fail("apply: y[%lld, %lld] is %.9g, not %.9g (%s)", static_cast<long long>(p),
               static_cast<long long>(c), run.y.value(p, c), run.before_relu(p, c), where.c_str());
    }
    check(close(run.sum_dy.value(0, c), sum_dy, 0, 1e-6 * size + 1e-12)) ||
        fail("backward_reduce: sum_dy[%lld] is %.9g, not %.9g (%s)", static_cast<long long>(c),
             run.sum_dy.value(0, c), sum_dy, where.c_str());
    check(close(run.sum_dy_xhat.value(0, c), sum_dy_xhat, 0, 1e-6 * size + 1e-12)) ||
        fail("backward_reduce: sum_dy_xhat[%lld] is %.9g, not %.9g (%s)", static_cast<long long>(c),
             run.sum_dy_xhat.value(0, c), sum_dy_xhat, where.c_str());
    for (int64_t p = 0; p < run.shape.pixels; ++p) {
      const double xhat = (run.x.value(p, c) - mean) * rstd;
      const double scale = gamma * rstd;
      const double eval = scale * gradient(p);
      const double train = scale * (gradient(p) - sum_dy / pixels - xhat * sum_dy_xhat / pixels);
      const double noise = 4e-6 * std::fabs(scale) * (1 + std::fabs(xhat)) * (1 + size / pixels);
      check(close(run.dx_eval.value(p, c), eval, ulp, noise)) ||
          fail("backward_apply: eval dx[%lld, %lld] is %.9g, not %.9g (%s)",
               static_cast<long long>(p), static_cast<long long>(c), run.dx_eval.value(p, c), eval,
               where.c_str());
      check(close(run.dx.value(p, c), train, ulp, noise)) ||
          fail("backward_apply: dx[%lld, %lld] is %.9g, not %.9g (%s)", static_cast<long long>(p),
               static_cast<long long>(c), run.dx.value(p, c), train, where.c_str());
    }
  }
  check(run.y.intact() && run.dx.intact() && run.dx_eval.intact()) ||
      fail("wrote outside a slice (%s)", where.c_str());
}

template <typename T>
void test_against_naive() {
  Random random(1);
  for (const Shape& shape : shapes()) {
    for (const bool affine : {true, false}) {
      if (!affine && shape.layout.offset == 0) continue;
      Run<T> run(shape);
      run.affine = affine;
      run.fill(random);
      run.statistics(parallel_serial);
      check_statistics(run, 2e-6, "statistics");
      run.finalize();
      run.avoid_ties();
      run.everything(parallel_serial);
      check_forward_and_backward(run);
    }
  }
}

template <typename T>
void test_threads() {
  Random random(2);
  for (const Shape& shape : shapes()) {
    if (shape.pixels < 63) continue;
    Run<T> run(shape);
    run.fill(random);
    Run<T> other(shape);
    random = Random(3);
    run.fill(random);
    random = Random(3);
    other.fill(random);
    run.everything(parallel_serial);
    for (const ParallelFor parallel : kOtherParallels) {
      other.everything(parallel);
      check(run.mean.same_bits(other.mean) && run.m2.same_bits(other.m2) &&
            run.y.same_bits(other.y) && run.sum_dy.same_bits(other.sum_dy) &&
            run.sum_dy_xhat.same_bits(other.sum_dy_xhat) && run.dx.same_bits(other.dx) &&
            run.dx_eval.same_bits(other.dx_eval)) ||
          fail("threads change the result (%s %s)", describe(shape).c_str(), dtype_name<T>());
    }
  }
}

// Data on which E[x^2] - E[x]^2 has no correct digit.
void test_hard_statistics() {
  Random random(4);
  struct Case {
    const char* name;
    std::function<double(int64_t)> value;
  };
  const std::vector<Case> cases = {
      {"1e4 +- 1e-2", [&](int64_t) { return 1e4 + 1e-2 * random.normal(); }},
      {"-1e6 +- 1", [&](int64_t) { return -1e6 + random.normal(); }},
      {"constant", [&](int64_t) { return 3.3; }},
      {"first pixel far off", [&](int64_t p) { return p == 0 ? 0.0 : 1e4 + random.normal(); }},
      {"pixel 5 far off", [&](int64_t p) { return p == 5 ? -1e5 : random.normal(); }},
      {"ramp", [&](int64_t p) { return 100.0 * static_cast<double>(p); }},
      {"step", [&](int64_t p) { return (p < 500 ? 1e3 : -1e3) + 1e-2 * random.normal(); }},
      {"tiny", [&](int64_t) { return 1e-12 * random.normal(); }},
  };
  for (const Case& c : cases) {
    for (const int64_t channels : {1, 24}) {
      for (const int64_t pixels : {2, 64, 1000, 20000}) {
        Run<float> run({pixels, channels, {0, 0}});
        run.x.fill([&](int64_t p, int64_t) { return c.value(p); });
        run.statistics(parallel_serial);
        check_statistics(run, 1e-5, c.name);
      }
    }
  }
}

void test_special_values() {
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    Run<float> run({100, 20, {0, 0}});
    Random random(5);
    run.fill(random);
    run.x.at(70, 3) = static_cast<float>(bad);
    run.everything(parallel_serial);
    for (int64_t c = 0; c < 20; ++c) {
      const bool nan = c == 3;
      check(std::isnan(run.m2.value(0, c)) == nan) ||
          fail("m2 of c %d beside a %g", static_cast<int>(c), bad);
      check(std::isnan(run.y.value(0, c)) == nan) ||
          fail("relu loses the NaN of c %d", static_cast<int>(c));
      check(std::isnan(run.dx.value(0, c)) == nan) ||
          fail("dx of c %d beside a %g", static_cast<int>(c), bad);
    }
  }
  // Evaluation statistics: one NaN stays one NaN, and y = 0 passes no gradient.
  Run<float> run({10, 20, {0, 0}});
  run.x.fill([](int64_t, int64_t) { return 1.0; });
  run.dy.fill([](int64_t, int64_t) { return 2.0; });
  run.mean.fill([](int64_t, int64_t) { return 1.0; });
  run.rstd.fill([](int64_t, int64_t) { return 1.0; });
  run.gamma.fill([](int64_t, int64_t) { return 1.0; });
  run.beta.fill([](int64_t, int64_t c) { return c == 4 ? 1.0 : 0.0; });
  run.x.at(2, 7) = NAN;
  run.apply(parallel_serial);
  run.backward_apply(run.dx_eval, false, parallel_serial);
  for (int64_t p = 0; p < 10; ++p) {
    for (int64_t c = 0; c < 20; ++c) {
      const bool nan = p == 2 && c == 7;
      const double y = nan ? NAN : c == 4 ? 1.0 : 0.0;
      const double dx = nan || c == 4 ? 2.0 : 0.0;
      check(close(run.y.value(p, c), y, 0, 0)) ||
          fail("y[%d, %d] is %g, not %g", static_cast<int>(p), static_cast<int>(c),
               run.y.value(p, c), y);
      check(close(run.dx_eval.value(p, c), dx, 0, 0)) ||
          fail("dx[%d, %d] is %g, not %g", static_cast<int>(p), static_cast<int>(c),
               run.dx_eval.value(p, c), dx);
    }
  }
}

// y = relu(beta) in bfloat16, for values that round every way.
void test_bf16_rounding() {
  std::vector<uint32_t> bits = {0x3f800000, 0x3f807fff, 0x3f808000, 0x3f808001, 0x3f818000,
                                0x3f817fff, 0x7f7fffff, 0x7f800000, 0x7f800001, 0x7fffffff,
                                0x7fc00000, 0x00000001, 0x00008000, 0x00008001, 0x0000ffff,
                                0x00018000, 0x7f7f7fff, 0x7f7f8000, 0x3fffffff};
  Random random(6);
  while (bits.size() < 1000) bits.push_back(static_cast<uint32_t>(random.below(0x7f800000)));
  const int64_t channels = static_cast<int64_t>(bits.size());
  Run<bf16> run({1, channels, {0, 1}});
  run.x.fill([](int64_t, int64_t) { return 0.0; });
  std::memcpy(run.beta.data(), bits.data(), bits.size() * sizeof(float));
  run.mean.fill([](int64_t, int64_t) { return 0.0; });
  run.rstd.fill([](int64_t, int64_t) { return 1.0; });
  run.gamma.fill([](int64_t, int64_t) { return 1.0; });
  run.apply(parallel_serial);
  for (int64_t c = 0; c < channels; ++c) {
    const double expected = to_double(nearest_bf16(run.beta.value(0, c)));
    check(close(run.y.value(0, c), expected, 0, 0)) ||
        fail("float 0x%08x becomes bf16 %.9g, not %.9g", bits[static_cast<size_t>(c)],
             run.y.value(0, c), expected);
  }
}

template <typename T>
void test_in_place() {
  Random random(7);
  for (const Shape& shape : shapes()) {
    Run<T> run(shape);
    run.fill(random);
    run.everything(parallel_serial);
    Run<T> aliased(shape);
    const auto copy = [&](Slice<T>& to, Slice<T>& from) {
      to.fill([&](int64_t p, int64_t c) { return from.value(p, c); });
    };
    copy(aliased.y, run.x);
    batch_norm_relu_apply({aliased.y.data(), aliased.y.stride(), aliased.y.data(),
                           aliased.y.stride(), dtype_of<T>(), shape.pixels, shape.channels,
                           run.mean.data(), run.rstd.data(), run.gamma.data(), run.beta.data(),
                           parallel_serial});
    check(aliased.y.same_bits(run.y)) ||
        fail("apply in place differs (%s)", describe(shape).c_str());
    copy(aliased.dy, run.dy);
    copy(aliased.x, run.x);
    for (const bool over_dy : {true, false}) {
      Slice<T>& target = over_dy ? aliased.dy : aliased.x;
      BatchNormReluBackwardParams params = run.backward(parallel_serial);
      (over_dy ? params.dy : params.x) = params.dx = target.data();
      params.dx_stride = target.stride();
      params.batch_statistics = true;
      params.sum_dy = run.sum_dy.data();
      params.sum_dy_xhat = run.sum_dy_xhat.data();
      batch_norm_relu_backward_apply(params);
      check(target.same_bits(run.dx)) ||
          fail("backward_apply in place differs (%s)", describe(shape).c_str());
    }
  }
}

void test_finalize() {
  Slice<float> mean = channel_values(5, [](int64_t c) { return static_cast<double>(c); });
  Slice<float> m2 = channel_values(5, [](int64_t c) { return 10.0 * static_cast<double>(c); });
  for (const int64_t count : {0, 1, 2, 1000}) {
    Slice<float> rstd = channel_values(5, [](int64_t) { return -1.0; });
    Slice<float> running_mean = channel_values(5, [](int64_t) { return 2.0; });
    Slice<float> running_var = channel_values(5, [](int64_t) { return 3.0; });
    batch_norm_finalize({mean.data(), m2.data(), count, 5, kEps, 0.25, rstd.data(),
                         running_mean.data(), running_var.data()});
    const double n = static_cast<double>(count);
    for (int64_t c = 0; c < 5; ++c) {
      const double variance = count == 0 ? 0.0 : m2.value(0, c) / n;
      check(close(rstd.value(0, c), 1 / std::sqrt(variance + kEps), 1e-7, 0)) || fail("rstd");
      const double new_mean = count == 0 ? 2.0 : 0.75 * 2.0 + 0.25 * mean.value(0, c);
      check(close(running_mean.value(0, c), new_mean, 1e-7, 0)) || fail("running_mean");
      const double unbiased = m2.value(0, c) / (n - 1);
      const double new_var = count == 0 ? 3.0 : 0.75 * 3.0 + 0.25 * unbiased;
      check(close(running_var.value(0, c), new_var, 1e-7, 0)) ||
          fail("running_var is %g, not %g", running_var.value(0, c), new_var);
    }
    batch_norm_finalize(
        {mean.data(), m2.data(), count, 5, kEps, 0.25, rstd.data(), nullptr, nullptr});
    batch_norm_rstd({running_mean.data(), 5, kEps, rstd.data()});
    for (int64_t c = 0; c < 5; ++c) {
      check(close(rstd.value(0, c), 1 / std::sqrt(running_mean.value(0, c) + kEps), 1e-7, 0)) ||
          fail("rstd of evaluation mode");
    }
  }
}

}  // namespace

void test_batch_norm() {
  run_group("batch_norm: naive, float", test_against_naive<float>);
  run_group("batch_norm: naive, bf16", test_against_naive<bf16>);
  run_group("batch_norm: hard statistics", test_hard_statistics);
  run_group("batch_norm: threads, float", test_threads<float>);
  run_group("batch_norm: threads, bf16", test_threads<bf16>);
  run_group("batch_norm: in place, float", test_in_place<float>);
  run_group("batch_norm: in place, bf16", test_in_place<bf16>);
  run_group("batch_norm: NaN, infinity, y = 0", test_special_values);
  run_group("batch_norm: bf16 rounding", test_bf16_rounding);
  run_group("batch_norm: finalize", test_finalize);
}

}  // namespace inception_ext::cpu::test
