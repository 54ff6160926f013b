// ldmatrix and mma.sync: the last lane to arrive computes for the whole warp, straight from and to
// the registers of the others.
//
// Register layouts are those of the PTX ISA: with g = lane / 4 and t = lane % 4, a row of eight
// 32-bit words lies in the lanes of equal g, words t and t + 4 each.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstring>

#include "block.h"
#include "device.h"
#include "memory_access.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace inception_ext::emulator {
namespace {

struct LoadOperand {
  uint32_t* registers;
  const char* row;
  int count;
  bool transposed;
  Place place;
};

void load_for_warp(void* const* operands, uint32_t /*lanes*/) {
  Block& block = Block::current();
  const auto lane_of = [&](int lane) -> const LoadOperand& {
    return *static_cast<const LoadOperand*>(operands[lane]);
  };
  const auto [registers, row, count, transposed, place] = lane_of(0);
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t rows[8][8];
    uint32_t offsets[8];
    for (int i = 0; i < 8; ++i) {
      const char* pointer = lane_of(matrix * 8 + i).row;
      check_shared(block, pointer, sizeof(rows[i]), false,
                   {place, block.clocks().clock(block.warp()), Actor::warp(block.warp()), false});
      offsets[i] = static_cast<uint32_t>(pointer - block.shared().data());
      std::memcpy(rows[i], pointer, sizeof(rows[i]));
    }
    if (block.plan().counting) count_phase(offsets, 8, 16, place, block.counts());
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t pair[2] = {transposed ? rows[2 * t][g] : rows[g][2 * t],
                                transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1]};
      std::memcpy(lane_of(lane).registers + matrix, pair, sizeof(pair));
    }
  }
}

struct MmaOperand {
  MmaShape shape;
  float* c;           // [4]
  const uint32_t* a;  // [4], or [2] for m16n8k8 of 16-bit elements
  const uint32_t* b;  // [2], or [1]
};

// 16 elements of 16 bits to float.
template <MmaShape kShape>
void to_float(const uint16_t* from, float* to, int count) {
  if constexpr (kShape == MmaShape::kM16N8K16Bfloat16) {
    for (int i = 0; i < count; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i]} << 16);
  } else {
#ifdef __F16C__
    for (int i = 0; i < count; i += 8) {
      _mm256_storeu_ps(
          to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
#else
    for (int i = 0; i < count; ++i) to[i] = __half2float(__ushort_as_half(from[i]));
#endif
  }
}

// A [16, kK] and B [8, kK] as 32-bit words, one row of kWords after another, from the registers.
template <int kWords>
void gather(void* const* operands, uint32_t (&a)[16][kWords], uint32_t (&b)[8][kWords]) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& operand = *static_cast<const MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < kWords / 4; ++half) {
      a[g][t + 4 * half] = operand.a[2 * half];
      a[g + 8][t + 4 * half] = operand.a[2 * half + 1];
      b[g][t + 4 * half] = operand.b[half];
    }
  }
}

// C [16, 8] += A [16, kK] * B^T with B [8, kK], eight columns at a time.
template <int kK>
void multiply(void* const* operands, const float (&a)[16][kK], const float (&b)[8][kK]) {
  using Row = float __attribute__((vector_size(8 * sizeof(float))));
  Row columns[kK];  // [kK, 8]: B transposed
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < 8; ++n) columns[k][n] = b[n][k];
  }
  alignas(Row) float c[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const float* from = static_cast<const MmaOperand*>(operands[lane])->c;
    std::memcpy(&c[lane / 4][lane % 4 * 2], from, 2 * sizeof(float));
    std::memcpy(&c[lane / 4 + 8][lane % 4 * 2], from + 2, 2 * sizeof(float));
  }
  constexpr int kRows = 8;  // sums that stay in registers
  for (int first = 0; first < 16; first += kRows) {
    Row sums[kRows];
    std::memcpy(sums, c[first], sizeof(sums));
    for (int k = 0; k < kK; ++k) {
      for (int m = 0; m < kRows; ++m) sums[m] += a[first + m][k] * columns[k];
    }
    std::memcpy(c[first], sums, sizeof(sums));
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* to = static_cast<const MmaOperand*>(operands[lane])->c;
    std::memcpy(to, &c[lane / 4][lane % 4 * 2], 2 * sizeof(float));
    std::memcpy(to + 2, &c[lane / 4 + 8][lane % 4 * 2], 2 * sizeof(float));
  }
}

template <MmaShape kShape, int kK>
void multiply_16_bit(void* const* operands) {
  uint32_t a_words[16][kK / 2], b_words[8][kK / 2];
  gather(operands, a_words, b_words);
  uint16_t a_bits[16][kK], b_bits[8][kK];
  std::memcpy(a_bits, a_words, sizeof(a_bits));
  std::memcpy(b_bits, b_words, sizeof(b_bits));
  float a[16][kK], b[8][kK];
  to_float<kShape>(a_bits[0], a[0], 16 * kK);
  to_float<kShape>(b_bits[0], b[0], 8 * kK);
  multiply(operands, a, b);
}

void multiply_tf32(void* const* operands) {
  uint32_t a_words[16][8], b_words[8][8];
  gather(operands, a_words, b_words);
  constexpr uint32_t kTf32Bits = 0xffffe000;  // the tensor core ignores the rest
  float a[16][8], b[8][8];
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 8; ++k) a[m][k] = std::bit_cast<float>(a_words[m][k] & kTf32Bits);
  }
  for (int n = 0; n < 8; ++n) {
    for (int k = 0; k < 8; ++k) b[n][k] = std::bit_cast<float>(b_words[n][k] & kTf32Bits);
  }
  multiply(operands, a, b);
}

void multiply_for_warp(void* const* operands, uint32_t /*lanes*/) {
  constexpr int64_t kMacsPerK = 16 * 8;
  int64_t& macs = Block::current().counts().macs;
  switch (static_cast<const MmaOperand*>(operands[0])->shape) {
    case MmaShape::kM16N8K16Half:
      macs += kMacsPerK * 16;
      return multiply_16_bit<MmaShape::kM16N8K16Half, 16>(operands);
    case MmaShape::kM16N8K16Bfloat16:
      macs += kMacsPerK * 16;
      return multiply_16_bit<MmaShape::kM16N8K16Bfloat16, 16>(operands);
    case MmaShape::kM16N8K8Half:
      macs += kMacsPerK * 8;
      return multiply_16_bit<MmaShape::kM16N8K8Half, 8>(operands);
    case MmaShape::kM16N8K8Tf32:
      macs += kMacsPerK * 8;
      return multiply_tf32(operands);
  }
}

}  // namespace

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Place place) {
  LoadOperand operand{registers, static_cast<const char*>(row), count, transposed, place};
  Block::current().wait_for(
      {.kind = WaitKind::kMatrix, .mask = kFullWarp, .compute = load_for_warp, .place = place},
      &operand);
}

uint32_t round_to_tf32(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  constexpr uint32_t kExponent = 0x7f800000, kDropped = 0x1fff;
  if ((bits & kExponent) == kExponent) return bits;
  return (bits + (kDropped + 1) / 2) & ~kDropped;
}

void mma(MmaShape shape, float* c, const uint32_t* a, const uint32_t* b, Place place) {
  MmaOperand operand{shape, c, a, b};
  Block::current().wait_for(
      {.kind = WaitKind::kMma, .mask = kFullWarp, .compute = multiply_for_warp, .place = place},
      &operand);
}

}  // namespace inception_ext::emulator
