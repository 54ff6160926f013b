#pragma once

namespace inception_ext::cpu::test {

void test_batch_norm();
void test_max_pool();
void test_copy_channels();

}  // namespace inception_ext::cpu::test
