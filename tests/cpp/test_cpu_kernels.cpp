// Standalone test of the CPU kernels: no torch, no test framework. Runs the ISA that
// INCEPTION_EXT_CPU_ISA names; given an argument, fails unless that is the ISA that runs. With
// --isa prints its name and does nothing else.
#include <cstdio>
#include <cstring>

#include "cpu_test_support.h"
#include "cpu_tests.h"
#include "isa.h"

int main(int argc, char** argv) {
  using namespace inception_ext::cpu;
  if (argc > 1 && std::strcmp(argv[1], "--isa") == 0) {
    std::printf("%s\n", isa_name());
    return 0;
  }
  std::printf("isa %s\n", isa_name());
  if (argc > 1 && std::strcmp(argv[1], isa_name()) != 0) {
    std::fprintf(stderr, "FAILED: wanted isa %s\n", argv[1]);
    return 2;
  }
  test::test_batch_norm();
  test::test_max_pool();
  test::test_copy_channels();
  test::test_winograd();
  std::printf("%lld checks, %lld failures\n", static_cast<long long>(test::g_checks),
              static_cast<long long>(test::g_failures));
  return test::g_failures == 0 ? 0 : 1;
}
