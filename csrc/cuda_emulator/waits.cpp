#include "cuda_emulator/waits.h"

#include <algorithm>

namespace pyllmq::cuda::emulator {

Waits waits;

namespace {

bool is_chosen(const Place& at) { return static_cast<int>(at.line()) == waits.line && waits.file == at.file_name(); }

}  // namespace

bool is_left_out(const Place& at) {
  if (waits.listed) {
    const std::pair<std::string, int> place{at.file_name(), static_cast<int>(at.line())};
    if (std::find(waits.places.begin(), waits.places.end(), place) == waits.places.end()) waits.places.push_back(place);
  }
  return !waits.only_weaker && is_chosen(at);
}

bool is_weaker(const Place& at) { return waits.only_weaker && is_chosen(at); }

}  // namespace pyllmq::cuda::emulator
