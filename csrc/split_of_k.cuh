// What a split has of K.
#pragma once
#include "runtime/cuda/words.cuh"

namespace pyllmq::cuda {

struct Range {
  int begin, end;
};

// Of so many units of K: as many as the others have, or one more.
PYLLMQ_DEVICE Range of_split(int units, int splits, int split) {
  const int least = units / splits, rest = units % splits, begin = split * least + (split < rest ? split : rest);
  return {begin, begin + least + (split < rest ? 1 : 0)};
}

}  // namespace pyllmq::cuda
