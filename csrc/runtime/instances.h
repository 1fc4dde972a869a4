// Instances of a function template by number: kernels whose loops are unrolled for it. In an anonymous namespace for the reason
// that simd.h gives.
#pragma once
#include <cstdint>
#include <utility>

namespace pyllmq::cpu {
namespace {

template <class Function, int First, int Count>
struct Instances {
  static constexpr int64_t kLast = First + Count - 1;
  Function found[Count];

  constexpr Function operator[](int64_t number) const { return found[number - First]; }
};

// of.operator()<number>() for the numbers from First to Last.
template <int First, int Last, class Of>
constexpr auto instances(Of of) {
  using Function = decltype(of.template operator()<First>());
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    return Instances<Function, First, Last - First + 1>{{of.template operator()<First + I>()...}};
  }(std::make_integer_sequence<int, Last - First + 1>());
}

// All tokens of a work, as many at once as there are instances for.
template <class Table, class Work>
void run_in_groups(const Table& of_tokens, const Work& work) {
  for (int64_t t = 0, count; t < work.count; t += count) {
    count = work.count - t < Table::kLast ? work.count - t : Table::kLast;
    of_tokens[count](work, work.tokens + t);
  }
}

}  // namespace
}  // namespace pyllmq::cpu
