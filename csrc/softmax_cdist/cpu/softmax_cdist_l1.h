// D[i, j] = sum over v of |p[i, v] - q[j, v]| with p = softmax(x / T), q = softmax(y / T), and its gradient in x.
//
// Probabilities exist for one tile at a time: kTileRows rows of either side x kTileColumns columns, computed from the
// logits and two numbers per row (largest logit, 1 / sum of the exponentials), each used for kTileRows pairs.
//
//  forward    |p - q| = p + q - 2 min(p, q): two instructions per pair and column. The sums of p, of q and of the minima
//             run in the same order, so the distance of equal rows is exactly 0 and no distance is negative.
//  backward   h[i, v] = sum over j of G[i, j] sign(p[i, v] - q[j, v]), sign(0) = 0;
//             dL/dx = p (h - <p, h>) / T. h is written first, where the gradient will lie, <p, h> summed on the way.
//
// Sums of tiles are joined in double and in order: the same bits for any number of threads.
// Rejected: <p, h> from sums kept by the forward pass, three more instructions per pair there to save one pass over h.
#pragma once
#include <cstdint>

#include "runtime/half.h"
#include "runtime/isa.h"

namespace pyllmq::cpu {

constexpr int kCdistTileRows = 64;
constexpr int kCdistTileColumns = 512;  // two tiles and one of h: 384 KiB, within the L2 cache
constexpr int kCdistRowGroup = 4;       // tiles are padded to whole groups of rows, with zeros

struct RowStatistics {
  float largest;      // logit
  float inverse_sum;  // 1 / sum of exp((x - largest) / T)
};

// One row per instruction set. A tile holds fp32 rows kCdistTileColumns apart, columns behind the last are 0.
struct SoftmaxCdistKernels {
  float (*largest)(const float* x, int64_t count);  // -inf where there is none; NaNs may be passed over
  double (*sum_of_exponentials)(const float* x, int64_t count, float largest, float scale);  // NaN if an x is
  // p = exp((x - largest) * scale) * inverse_sum, at x = p too.
  void (*probabilities)(const float* x, int64_t count, RowStatistics row, float scale, float* p);
  // sums[i]: of one row, in the order of `overlaps`; has room for kCdistTileRows.
  void (*row_sums)(const float* p, int rows, float* sums);
  // overlaps[i * kCdistTileRows + j] = sum over the columns of min(p[i], q[j]); p_rows and q_rows whole groups.
  void (*overlaps)(const float* p, int p_rows, const float* q, int q_rows, float* overlaps);
  // h[i] += sum over j of weights[i * kCdistTileRows + j] * sign(p[i] - q[j]); p_rows whole groups.
  void (*add_signs)(const float* p, int p_rows, const float* q, int q_rows, const float* weights, float* h);
  float (*dot)(const float* p, const float* h);  // of one row of a tile
  // out = p * (h - dot) * scale, at out = h too.
  void (*softmax_gradient)(const float* p, const float* h, int64_t count, float dot, float scale, float* out);
};

template <Isa isa>
const SoftmaxCdistKernels& softmax_cdist_kernels();

// [batch, rows, columns] logits of `dtype`; statistics [batch, rows].
struct Logits {
  const void* values;
  DType dtype;
  int64_t rows;
  RowStatistics* statistics;
};

struct SoftmaxCdistProblem {
  Logits x, y;
  int64_t batch;
  int64_t columns;
  float inverse_temperature;
};

// Fills the statistics of both sides and distances [batch, x.rows, y.rows].
void softmax_cdist_l1(const SoftmaxCdistProblem& problem, float* distances);

// gradient: dL/dD [batch, x.rows, y.rows], finite or not; x_gradient [batch, x.rows, columns] of x's dtype. Statistics
// as the forward pass left them. A gradient in y is the same call with the sides exchanged.
void softmax_cdist_l1_backward(const SoftmaxCdistProblem& problem, const float* gradient, void* x_gradient);

}  // namespace pyllmq::cpu
