#include "kmeans/cpu/split.h"

namespace pyllmq::cpu {
namespace {

Split one(const SplitTerms& t, int64_t end, int64_t first, int64_t last) {
  Split best{-1.0, first};  // every gain is >= 0
  for (int64_t at = first; at <= last; ++at) {
    const double s = t.sum[end] - t.sum[at];
    const double share = t.inverse ? s * s * t.inverse[end - at] : s * s / (t.mass[end] - t.mass[at]);
    const double value = t.gain[at] + share;
    if (value > best.gain) best = {value, at};
  }
  return best;
}

void group(const SplitTerms& t, int64_t end, int64_t first, int64_t last, double* gains, int64_t* ats) {
  for (int i = 0; i < kGroup; ++i) {
    const Split best = one(t, end + i, first, last);
    gains[i] = best.gain;
    ats[i] = best.at;
  }
}

}  // namespace

const SplitKernels kSplitScalar{one, group};

}  // namespace pyllmq::cpu
