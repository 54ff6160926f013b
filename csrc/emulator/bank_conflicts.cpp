#include "bank_conflicts.h"

#include <algorithm>
#include <bit>

namespace inception_ext::emulator {
namespace {

constexpr int kBanks = 32;
constexpr int kBankBytes = 4;

// Whether every bank is asked for at most once: the usual case, told quickly.
bool all_banks_differ(const uint32_t* offsets, int count, int bytes) {
  uint32_t seen = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t first = offsets[i] / kBankBytes;
    const uint32_t words = (offsets[i] + bytes - 1) / kBankBytes - first + 1;
    const uint32_t banks = std::rotl((1u << words) - 1, static_cast<int>(first % kBanks));
    if (seen & banks) return false;
    seen |= banks;
  }
  return true;
}

}  // namespace

void count_phase(const uint32_t* offsets, int count, int bytes, const Place& place,
                 Counts& counts) {
  counts.shared_passes += 1;
  if (all_banks_differ(offsets, count, bytes)) return;
  // The words that each bank has to deliver; one word serves every lane that asks for it.
  std::array<uint8_t, kBanks> words = {};
  std::array<uint32_t, kBanks * kBanks> wanted;
  int passes = 1;
  for (int i = 0; i < count; ++i) {
    const uint32_t first = offsets[i] / kBankBytes;
    const uint32_t last = (offsets[i] + bytes - 1) / kBankBytes;
    for (uint32_t word = first; word <= last; ++word) {
      const uint32_t bank = word % kBanks;
      uint32_t* begin = &wanted[bank * kBanks];
      uint32_t* end = begin + words[bank];
      if (std::find(begin, end, word) != end) continue;
      *end = word;
      passes = std::max<int>(passes, ++words[bank]);
    }
  }
  if (passes > 1) {
    counts.bank_conflicts += passes - 1;
    counts.conflict_places[place_text(place)] += passes - 1;
  }
}

void WarpAccesses::add(int lane, uint32_t offset, int bytes, const Place& place, Counts& counts) {
  Site& site = site_of(place, bytes);
  const uint32_t index = site.executed[lane]++;
  if (index >= site.instructions.size()) site.instructions.resize(index + 1);
  Instruction& instruction = site.instructions[index];
  instruction.offsets[lane] = offset;
  instruction.lanes |= 1u << lane;
  dirty_ = true;
  if (instruction.lanes == 0xffffffffu) {
    count(site, instruction, counts);
    instruction.lanes = 0;
  }
}

void WarpAccesses::flush(Counts& counts) {
  if (!dirty_) return;
  for (Site& site : sites_) {
    for (const Instruction& instruction : site.instructions) {
      if (instruction.lanes != 0) count(site, instruction, counts);
    }
    site.instructions.clear();
    site.executed.fill(0);
  }
  dirty_ = false;
}

void WarpAccesses::count(const Site& site, const Instruction& instruction, Counts& counts) {
  const int lanes = site.bytes <= 4 ? 32 : site.bytes <= 8 ? 16 : 8;
  for (int first = 0; first < 32; first += lanes) {
    std::array<uint32_t, 32> offsets;
    int taking_part = 0;
    for (int lane = first; lane < first + lanes; ++lane) {
      if (instruction.lanes >> lane & 1) offsets[taking_part++] = instruction.offsets[lane];
    }
    if (taking_part > 0) {
      count_phase(offsets.data(), taking_part, site.bytes, site.place, counts);
    }
  }
}

void WarpAccesses::start_launch() {
  sites_.clear();
  last_ = 0;
}

WarpAccesses::Site& WarpAccesses::site_of(const Place& place, int bytes) {
  const auto matches = [&](const Site& site) {
    return site.bytes == bytes && same_place(site.place, place);
  };
  if (last_ < sites_.size() && matches(sites_[last_])) return sites_[last_];
  const auto found = std::find_if(sites_.begin(), sites_.end(), matches);
  last_ = found - sites_.begin();
  if (found == sites_.end()) sites_.push_back({place, bytes, {}, {}});
  return sites_[last_];
}

}  // namespace inception_ext::emulator
