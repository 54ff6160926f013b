// Where in the source something happens: what every report names.
#pragma once

#include <source_location>
#include <string>

namespace inception_ext::emulator {

// As a default argument, `Place place = Place::current()` is the place of the call.
using Place = std::source_location;

inline bool same_place(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

// "max_pool.cu:120"
inline std::string place_text(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

}  // namespace inception_ext::emulator
