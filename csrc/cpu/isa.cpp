#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace inception_ext::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

Isa detect_and_override() {
  const Isa best = detect();
  const char* wanted = std::getenv("INCEPTION_EXT_CPU_ISA");
  if (wanted == nullptr) return best;
  if (std::strcmp(wanted, "generic") == 0) return Isa::kGeneric;
  if (std::strcmp(wanted, "avx2") == 0 && best >= Isa::kAvx2) return Isa::kAvx2;
  return best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect_and_override();
  return isa;
}

const char* isa_name() {
  switch (active_isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kGeneric:
      break;
  }
  return "generic";
}

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kGeneric:
      break;
  }
#endif
  return kGenericKernels;
}

}  // namespace inception_ext::cpu
