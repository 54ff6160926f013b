#pragma once

namespace inception_ext::cpu::test {

void test_batch_norm();
void test_max_pool();
void test_copy_channels();
void test_winograd();

}  // namespace inception_ext::cpu::test
