#pragma once

#include <cstdint>

namespace inception_ext::cpu {

enum class Isa : int32_t {
  kGeneric,  // what the compiler targets by default: SSE2 on x86-64, NEON on aarch64
  kAvx2,     // AVX2 + FMA
  kAvx512,   // AVX-512 F, BW, DQ, VL
};

// The best ISA of this CPU, or a lower one named by the environment variable
// INCEPTION_EXT_CPU_ISA=generic|avx2|avx512. A name above what the CPU has, or an unknown one,
// changes nothing. Read once, at the first call.
Isa active_isa();

// "generic", "avx2" or "avx512".
const char* isa_name();

}  // namespace inception_ext::cpu
