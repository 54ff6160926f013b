// What the CPU kernel tests share: checks that say what and where, buffers of exactly the size a
// kernel may touch, and several ways to run a parallel loop.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "dtype.h"
#include "parallel.h"

namespace inception_ext::cpu::test {

// ---- checks -------------------------------------------------------------------------------------

inline int64_t g_checks = 0;
inline int64_t g_failures = 0;

// check(condition) || fail(format, ...): the message is put together only where it is needed.
inline bool check(bool ok) {
  ++g_checks;
  return ok;
}

[[gnu::format(printf, 1, 2)]] inline bool fail(const char* format, ...) {
  if (++g_failures > 20) return false;
  std::va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "FAILED: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  return false;
}

inline void run_group(const char* name, const std::function<void()>& body) {
  const int64_t checks = g_checks;
  const int64_t failures = g_failures;
  body();
  std::printf("%-44s %9lld checks %s\n", name, static_cast<long long>(g_checks - checks),
              g_failures == failures ? "ok" : "FAILED");
  std::fflush(stdout);
}

inline bool close(double got, double expected, double relative, double absolute) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::fabs(got - expected) <= relative * std::fabs(expected) + absolute;
}

// ---- values -------------------------------------------------------------------------------------

inline double to_double(float v) { return v; }
inline double to_double(uint8_t v) { return v; }
inline double to_double(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// To nearest even, by search: the oracle for what the kernels do with bit tricks.
inline bf16 nearest_bf16(double v) {
  if (std::isnan(v)) return bf16{0x7fc0};
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const double a = std::fabs(v);
  int low = 0;
  int high = 0x7f80;  // infinity, which stands for 2^128 here
  const auto value = [](int bits) {
    return bits == 0x7f80 ? std::ldexp(1.0, 128) : to_double(bf16{static_cast<uint16_t>(bits)});
  };
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (value(middle) <= a ? low : high) = middle;
  }
  const double to_low = a - value(low);
  const double to_high = value(high) - a;
  const bool up = to_high < to_low || (to_high == to_low && high % 2 == 0);
  return bf16{static_cast<uint16_t>(sign | (up ? high : low))};
}

template <typename T>
T from_double(double v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return nearest_bf16(v);
  } else {
    return static_cast<T>(v);
  }
}

template <typename T>
constexpr DType dtype_of() {
  return std::is_same_v<T, bf16>    ? DType::kBFloat16
         : std::is_same_v<T, float> ? DType::kFloat32
                                    : DType::kUInt8;
}

template <typename T>
const char* dtype_name() {
  return std::is_same_v<T, bf16> ? "bf16" : std::is_same_v<T, float> ? "float" : "uint8";
}

// ---- buffers ------------------------------------------------------------------------------------

// How a slice lies in memory.
struct Layout {
  int64_t gap;     // stride - C
  int64_t offset;  // elements before the first, so that it is misaligned
};

// A different one, so that a stride used in place of another shows.
inline Layout other(Layout layout, int64_t extra) { return {layout.gap + extra, layout.offset}; }

inline const std::vector<Layout> kLayouts = {{0, 0}, {0, 1}, {5, 1}, {64, 0}};

// P pixels of C channels on the heap, ending with the last element a kernel may touch, so that
// AddressSanitizer sees the next. What lies between the pixels holds a pattern; intact() tells
// whether it still does.
template <typename T>
class Slice {
 public:
  Slice(int64_t pixels, int64_t channels, Layout layout)
      : pixels_(pixels),
        channels_(channels),
        stride_(channels + layout.gap),
        offset_(layout.offset) {
    const bool empty = pixels <= 0 || channels <= 0;
    size_ = empty ? 0 : std::max<int64_t>(0, offset_ + (pixels - 1) * stride_ + channels);
    memory_ = std::make_unique<T[]>(static_cast<size_t>(size_));
    std::memset(static_cast<void*>(memory_.get()), kPattern,
                static_cast<size_t>(size_) * sizeof(T));
  }

  T* data() { return size_ > 0 ? memory_.get() + offset_ : nullptr; }
  T& at(int64_t pixel, int64_t c) { return memory_[offset_ + pixel * stride_ + c]; }
  double value(int64_t pixel, int64_t c) { return to_double(at(pixel, c)); }
  int64_t stride() const { return stride_; }

  void fill(const std::function<double(int64_t, int64_t)>& value_of) {
    for (int64_t p = 0; p < pixels_; ++p) {
      for (int64_t c = 0; c < channels_; ++c) at(p, c) = from_double<T>(value_of(p, c));
    }
  }

  bool intact() const {
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t within = (i - offset_) % stride_;
      if (i >= offset_ && within < channels_) continue;
      unsigned char bytes[sizeof(T)];
      std::memcpy(bytes, &memory_[i], sizeof(T));
      for (const unsigned char byte : bytes) {
        if (byte != kPattern) return false;
      }
    }
    return true;
  }

  bool same_bits(Slice& that) {
    for (int64_t p = 0; p < pixels_; ++p) {
      if (channels_ > 0 && std::memcmp(&at(p, 0), &that.at(p, 0), channels_ * sizeof(T)) != 0) {
        return false;
      }
    }
    return pixels_ == that.pixels_ && channels_ == that.channels_;
  }

 private:
  static constexpr unsigned char kPattern = 0xa5;
  int64_t pixels_;
  int64_t channels_;
  int64_t stride_;
  int64_t offset_;
  int64_t size_;
  std::unique_ptr<T[]> memory_;
};

// [C] of exactly that size.
template <typename T = float>
Slice<T> channel_values(int64_t channels, const std::function<double(int64_t)>& value) {
  Slice<T> slice(1, channels, {0, 0});
  slice.fill([&](int64_t, int64_t c) { return value(c); });
  return slice;
}

// ---- random numbers -----------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  // Nearly: the sum of three numbers that are uniform, of mean 0 and variance 1.
  double normal() {
    const uint64_t bits = engine_();
    const uint64_t sum = (bits & 0x1fffff) + (bits >> 21 & 0x1fffff) + (bits >> 42 & 0x1fffff);
    return (static_cast<double>(sum) / 0x1fffff - 1.5) * 2;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }

 private:
  std::mt19937_64 engine_;
};

// ---- threads ------------------------------------------------------------------------------------

inline void parallel_serial(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  if (begin < end) body(begin, end, context);
}

// The smallest parts allowed, last first.
inline void parallel_backwards(int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                               void* context) {
  for (int64_t part = (end - begin - 1) / grain; part >= 0; --part) {
    const int64_t part_begin = begin + part * grain;
    body(part_begin, std::min(part_begin + grain, end), context);
  }
}

template <int kThreads>
void parallel_threads(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  const int64_t size = std::max(grain, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t part = begin; part < end; part += size) {
    threads.emplace_back(body, part, std::min(part + size, end), context);
  }
  for (std::thread& thread : threads) thread.join();
}

inline const std::vector<ParallelFor> kOtherParallels = {parallel_backwards, parallel_threads<2>,
                                                         parallel_threads<3>};

}  // namespace inception_ext::cpu::test
