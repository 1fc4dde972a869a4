// How a projection of the experts of one kind is cut into work, and its launch (multiply.cuh).
#pragma once
#include <cstdint>

#include "experts/cuda/routed_experts.h"

namespace pyllmq::cuda {

struct Multiplication;

// What is to be multiplied, by numbers that the host knows.
struct MultiplyProblem {
  WeightKind weights;
  int64_t rows, columns;
  int64_t tokens, tile_pairs;  // pairs: at most
  int64_t planes;              // of x in the numbers that these weights meet
  int64_t likely_tiles;
};

struct MultiplyPlan {
  int64_t pairs_at_once;  // of a tile
  int64_t part_rows, parts;
  int64_t splits;  // wanted; the experts of a projection have one number
  int64_t stage;   // units of K whose x is in shared memory at once
  int64_t x_bytes, shared_bytes, warps;
  int64_t slots;  // blocks that run at once
};

// splits: of the projection, 0: not known yet.
MultiplyPlan plan_codebook(const MultiplyProblem& problem, int64_t splits);
MultiplyPlan plan_cells(const MultiplyProblem& problem, int64_t splits);
MultiplyPlan plan_columns(const MultiplyProblem& problem, int64_t splits);

// A launch of at most `items` pieces of work.
void multiply_codebook(const Multiplication& m, const MultiplyPlan& plan, int64_t items, uintptr_t stream);
void multiply_cells(const Multiplication& m, const MultiplyPlan& plan, int64_t items, uintptr_t stream);
void multiply_columns(const Multiplication& m, const MultiplyPlan& plan, int64_t items, uintptr_t stream);

}  // namespace pyllmq::cuda
