// Vectors of INCEPTION_EXT_LANES float32 over the vector extensions of GCC and clang, with
// intrinsics only where the compilers do badly without: masks, and partial loads and stores.
// Part of kernels_impl.h.
#pragma once

#include <cstdint>

#include "dtype.h"

#define INCEPTION_EXT_INLINE inline __attribute__((always_inline))
// Before a loop that often has a fixed, small number of rounds; clang sees that by itself.
#if defined(__clang__)
#define INCEPTION_EXT_UNROLL
#else
#define INCEPTION_EXT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace inception_ext::cpu::INCEPTION_EXT_ISA {

constexpr int kLanes = INCEPTION_EXT_LANES;

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vuint16 __attribute__((vector_size(2 * kLanes)));
typedef uint8_t vuint8 __attribute__((vector_size(kLanes)));
// Half as many lanes: a double vector of the register's width, and the floats it converts from.
typedef float vfloat_half __attribute__((vector_size(2 * kLanes)));
typedef double vdouble __attribute__((vector_size(4 * kLanes)));

template <typename Vector, typename Memory>
INCEPTION_EXT_INLINE Vector load_bytes_as(const Memory* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename To, typename From>
INCEPTION_EXT_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

INCEPTION_EXT_INLINE vfloat broadcast(float value) { return value - vfloat{}; }
INCEPTION_EXT_INLINE vint broadcast_int(int32_t value) { return value - vint{}; }

// ---- masks --------------------------------------------------------------------------------------

#if INCEPTION_EXT_LANES == 16

typedef __mmask16 vmask;

INCEPTION_EXT_INLINE vmask greater(vfloat a, vfloat b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
}
INCEPTION_EXT_INLINE vmask equal(vfloat a, vfloat b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ);
}
// a > b, or one of them is a NaN.
INCEPTION_EXT_INLINE vmask not_less_equal(vfloat a, vfloat b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ);
}
// One of them is a NaN.
INCEPTION_EXT_INLINE vmask unordered(vfloat a, vfloat b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q);
}
INCEPTION_EXT_INLINE vmask either(vmask a, vmask b) { return _kor_mask16(a, b); }
INCEPTION_EXT_INLINE bool any(vmask mask) { return mask != 0; }
INCEPTION_EXT_INLINE vfloat select(vmask mask, vfloat yes, vfloat no) {
  return (vfloat)_mm512_mask_mov_ps((__m512)no, mask, (__m512)yes);
}
INCEPTION_EXT_INLINE vint select(vmask mask, vint yes, vint no) {
  return (vint)_mm512_mask_mov_epi32((__m512i)no, mask, (__m512i)yes);
}
INCEPTION_EXT_INLINE vfloat value_or_zero(vmask mask, vfloat value) {
  return (vfloat)_mm512_maskz_mov_ps(mask, (__m512)value);
}
INCEPTION_EXT_INLINE vfloat add_where(vmask mask, vfloat a, vfloat b) {
  return (vfloat)_mm512_mask_add_ps((__m512)a, mask, (__m512)a, (__m512)b);
}
INCEPTION_EXT_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

#else

typedef vint vmask;

INCEPTION_EXT_INLINE vmask greater(vfloat a, vfloat b) { return a > b; }
INCEPTION_EXT_INLINE vmask equal(vfloat a, vfloat b) { return a == b; }
INCEPTION_EXT_INLINE vmask either(vmask a, vmask b) { return a | b; }
INCEPTION_EXT_INLINE vfloat value_or_zero(vmask mask, vfloat value) {
  return bit_cast<vfloat>(mask & bit_cast<vint>(value));
}
// a + b, and a where the mask is off.
INCEPTION_EXT_INLINE vfloat add_where(vmask mask, vfloat a, vfloat b) {
  return a + value_or_zero(mask, b);
}

#if INCEPTION_EXT_LANES == 8

INCEPTION_EXT_INLINE vmask not_less_equal(vfloat a, vfloat b) {
  return (vmask)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ);
}
INCEPTION_EXT_INLINE vmask unordered(vfloat a, vfloat b) {
  return (vmask)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q);
}
INCEPTION_EXT_INLINE bool any(vmask mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
INCEPTION_EXT_INLINE vfloat select(vmask mask, vfloat yes, vfloat no) {
  return (vfloat)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask);
}
INCEPTION_EXT_INLINE vint select(vmask mask, vint yes, vint no) {
  return (vint)_mm256_blendv_epi8((__m256i)no, (__m256i)yes, (__m256i)mask);
}
INCEPTION_EXT_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

#else

INCEPTION_EXT_INLINE vmask not_less_equal(vfloat a, vfloat b) { return ~(a <= b); }
INCEPTION_EXT_INLINE vmask unordered(vfloat a, vfloat b) { return (a != a) | (b != b); }
INCEPTION_EXT_INLINE bool any(vmask mask) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
}
INCEPTION_EXT_INLINE vfloat select(vmask mask, vfloat yes, vfloat no) { return mask ? yes : no; }
INCEPTION_EXT_INLINE vint select(vmask mask, vint yes, vint no) { return mask ? yes : no; }
// Rounds the product: no fused instruction can be taken for granted here.
INCEPTION_EXT_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }

#endif
#endif

// ---- arithmetic ---------------------------------------------------------------------------------

// b where one of them is a NaN.
INCEPTION_EXT_INLINE vfloat max(vfloat a, vfloat b) {
#if INCEPTION_EXT_LANES == 16
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif INCEPTION_EXT_LANES == 8
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// A NaN in either gives a NaN.
INCEPTION_EXT_INLINE vfloat max_or_nan(vfloat a, vfloat b) {
#if INCEPTION_EXT_LANES == 16
  const __mmask16 ordered = _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_ORD_Q);
  return (vfloat)_mm512_mask_max_ps((__m512)a, ordered, (__m512)a, (__m512)b);
#else
  return select(unordered(a, a), a, max(a, b));
#endif
}

// NaN stays NaN.
INCEPTION_EXT_INLINE vfloat relu(vfloat v) { return max(vfloat{}, v); }

// ---- bfloat16 -----------------------------------------------------------------------------------

INCEPTION_EXT_INLINE vfloat widen(vuint16 v) {
#if INCEPTION_EXT_LANES == 16
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#elif INCEPTION_EXT_LANES == 8
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
#else
  return bit_cast<vfloat>(__builtin_convertvector(v, vuint) << 16);
#endif
}

// For values that are bfloat16 already.
INCEPTION_EXT_INLINE vuint16 narrow_exact(vfloat v) {
#if INCEPTION_EXT_LANES == 16
  const vuint odd_words = {0x00030001, 0x00070005, 0x000b0009, 0x000f000d,
                           0x00130011, 0x00170015, 0x001b0019, 0x001f001d};
  return (vuint16)_mm512_castsi512_si256(_mm512_permutexvar_epi16((__m512i)odd_words, (__m512i)v));
#elif INCEPTION_EXT_LANES == 8
  const __m256i high = _mm256_srli_epi32((__m256i)v, 16);
  const __m256i packed = _mm256_packus_epi32(high, high);  // by halves of 128 bits, twice
  return (vuint16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(bit_cast<vuint>(v) >> 16, vuint16);
#endif
}

// To nearest, ties to even; every NaN becomes the same one, as in torch.
INCEPTION_EXT_INLINE vuint16 narrow(vfloat v) {
  const vuint bits = bit_cast<vuint>(v);
#if INCEPTION_EXT_LANES == 16
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  const __m512i up = (__m512i)(bits + 0x7fffu);
  const vfloat rounded = (vfloat)_mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
#else
  const vfloat rounded = bit_cast<vfloat>(bits + 0x7fffu + ((bits >> 16) & 1u));
#endif
  const vfloat nan = bit_cast<vfloat>(broadcast_int(0x7fc00000));
  return narrow_exact(select(unordered(v, v), nan, rounded));
}

// ---- bytes --------------------------------------------------------------------------------------

INCEPTION_EXT_INLINE vint widen_bytes(vuint8 v) {
#if INCEPTION_EXT_LANES == 16
  return (vint)_mm512_cvtepu8_epi32((__m128i)v);
#elif INCEPTION_EXT_LANES == 8
  return (vint)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(v)));
#else
  return __builtin_convertvector(v, vint);
#endif
}

INCEPTION_EXT_INLINE vuint8 narrow_to_bytes(vint v) {
#if INCEPTION_EXT_LANES == 8
  const __m256i halves = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  const __m128i words = _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
  return bit_cast<vuint8>((int64_t)_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#else
  return __builtin_convertvector(v, vuint8);
#endif
}

// ---- loads and stores ---------------------------------------------------------------------------

// All lanes of a vector. FirstLanes below has the same members.
struct AllLanes {
  INCEPTION_EXT_INLINE vfloat load(const float* from) const { return load_bytes_as<vfloat>(from); }
  INCEPTION_EXT_INLINE vfloat load(const bf16* from) const {
    return widen(load_bytes_as<vuint16>(from));
  }
  INCEPTION_EXT_INLINE vfloat load(const uint8_t* from) const {
    return __builtin_convertvector(widen_bytes(load_bytes_as<vuint8>(from)), vfloat);
  }
  INCEPTION_EXT_INLINE void store(float* to, vfloat v) const { __builtin_memcpy(to, &v, sizeof v); }
  INCEPTION_EXT_INLINE void store(bf16* to, vfloat v) const { store_raw(to, narrow(v)); }
  INCEPTION_EXT_INLINE void store_exact(float* to, vfloat v) const { store(to, v); }
  INCEPTION_EXT_INLINE void store_exact(bf16* to, vfloat v) const {
    store_raw(to, narrow_exact(v));
  }
  INCEPTION_EXT_INLINE void store_bytes(uint8_t* to, vint v) const {
    store_raw(to, narrow_to_bytes(v));
  }
  // Lanes whose byte equals `value`.
  INCEPTION_EXT_INLINE vmask bytes_equal(const uint8_t* from, uint8_t value) const {
#if INCEPTION_EXT_LANES == 16
    return _mm_cmpeq_epi8_mask(_mm_loadu_si128((const __m128i*)from), _mm_set1_epi8((char)value));
#else
    return widen_bytes(load_bytes_as<vuint8>(from)) == broadcast_int(value);
#endif
  }

 private:
  template <typename Memory, typename Vector>
  INCEPTION_EXT_INLINE void store_raw(Memory* to, Vector v) const {
    __builtin_memcpy(to, &v, sizeof v);
  }
};

// The first `count` lanes, 0 < count < kLanes: the others load as 0 and are not stored, and their
// memory is not touched.
#if INCEPTION_EXT_LANES == 16

struct FirstLanes {
  INCEPTION_EXT_INLINE explicit FirstLanes(int64_t count) : mask((__mmask16)((1u << count) - 1)) {}
  INCEPTION_EXT_INLINE vfloat load(const float* from) const {
    return (vfloat)_mm512_maskz_loadu_ps(mask, from);
  }
  INCEPTION_EXT_INLINE vfloat load(const bf16* from) const {
    return widen((vuint16)_mm256_maskz_loadu_epi16(mask, from));
  }
  INCEPTION_EXT_INLINE void store(float* to, vfloat v) const {
    _mm512_mask_storeu_ps(to, mask, (__m512)v);
  }
  INCEPTION_EXT_INLINE void store(bf16* to, vfloat v) const {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)narrow(v));
  }
  INCEPTION_EXT_INLINE void store_exact(float* to, vfloat v) const { store(to, v); }
  INCEPTION_EXT_INLINE void store_exact(bf16* to, vfloat v) const {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)narrow_exact(v));
  }
  INCEPTION_EXT_INLINE void store_bytes(uint8_t* to, vint v) const {
    _mm_mask_storeu_epi8(to, mask, (__m128i) __builtin_convertvector(v, vuint8));
  }
  INCEPTION_EXT_INLINE vmask bytes_equal(const uint8_t* from, uint8_t value) const {
    return _mm_mask_cmpeq_epi8_mask(mask, _mm_maskz_loadu_epi8(mask, from),
                                    _mm_set1_epi8((char)value));
  }

  __mmask16 mask;
};

#else

struct FirstLanes {
  INCEPTION_EXT_INLINE explicit FirstLanes(int64_t n) : count((unsigned)n) {}
  template <typename T>
  INCEPTION_EXT_INLINE vfloat load(const T* from) const {
    T lanes[kLanes] = {};
    copy(lanes, from);
    return AllLanes{}.load(lanes);
  }
  template <typename T>
  INCEPTION_EXT_INLINE void store(T* to, vfloat v) const {
    T lanes[kLanes];
    AllLanes{}.store(lanes, v);
    copy(to, lanes);
  }
  template <typename T>
  INCEPTION_EXT_INLINE void store_exact(T* to, vfloat v) const {
    T lanes[kLanes];
    AllLanes{}.store_exact(lanes, v);
    copy(to, lanes);
  }
  INCEPTION_EXT_INLINE void store_bytes(uint8_t* to, vint v) const {
    uint8_t lanes[kLanes];
    AllLanes{}.store_bytes(lanes, v);
    copy(to, lanes);
  }
  INCEPTION_EXT_INLINE vmask bytes_equal(const uint8_t* from, uint8_t value) const {
    uint8_t lanes[kLanes] = {};
    copy(lanes, from);
    return AllLanes{}.bytes_equal(lanes, value);
  }

  unsigned count;

 private:
  // A loop of element moves, which beats a memcpy call at these lengths.
  template <typename T>
  INCEPTION_EXT_INLINE void copy(T* to, const T* from) const {
    for (unsigned i = 0; i < count; ++i) to[i] = from[i];
  }
};

#endif

}  // namespace inception_ext::cpu::INCEPTION_EXT_ISA
