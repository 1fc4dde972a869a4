// Tests only: the waits and barriers that kernels come to, by their place in the source, and one of them left out.
#pragma once
#include <source_location>
#include <string>
#include <utility>
#include <vector>

namespace pyllmq::cuda::emulator {

using Place = std::source_location;

struct Waits {
  bool listed = false;  // whether `places` are written down
  std::vector<std::pair<std::string, int>> places;
  std::string file;  // with line: of the one that kernels do without; none: no file
  int line = 0;
  bool only_weaker = false;  // it lets one group more be under way instead
};
extern Waits waits;

bool is_left_out(const Place& at);
bool is_weaker(const Place& at);  // of those that count groups

}  // namespace pyllmq::cuda::emulator
