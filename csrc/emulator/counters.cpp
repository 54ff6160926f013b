#include "counters.h"

#include <mutex>
#include <utility>

namespace inception_ext::emulator {
namespace {

std::mutex mutex;
std::vector<LaunchRecord> launches;

}  // namespace

std::vector<LaunchRecord> take_launches() {
  const std::lock_guard lock(mutex);
  return std::exchange(launches, {});
}

void add_launch(LaunchRecord record) {
  const std::lock_guard lock(mutex);
  launches.push_back(std::move(record));
}

}  // namespace inception_ext::emulator
