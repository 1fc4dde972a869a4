// The usual solver: greedy k-means++ and Lloyd's iteration, on sorted points.
#pragma once

#include <cstdint>

#include "kmeans/cpu/points.h"

namespace pyllmq::cpu {

// Writes bounds[0 .. k]; a cluster may be empty.
void lloyd_bounds(const Points& points, int k, uint64_t seed, int64_t* bounds);

}  // namespace pyllmq::cpu
