// What a weight costs by tables and by decoding, as `python -m pyllmq.benchmarks.path_cost` prints it: an Intel server of 2 cores
// with AMX, 4096 x 4096 (scalar 128 x 512), fits of 1..32 tokens.
#pragma once
#include "linear_operand.h"
#include "runtime/isa.h"

namespace pyllmq::cpu {

// ps per weight on 2 threads, index [width - 1].
struct PathCost {
  double table_pass[8];    // per pass of kMaxTokenBlock tokens: reading and unpacking codes
  double table_token[8];   // per token: building its tables, looking up
  double decode[8];        // once
  double decode_token[8];  // per token: multiplying
};

constexpr PathCost kMeasuredCost[5][3] = {
    // [Isa][Precision], x86-64
    {
        // scalar
        {{82, 101, 28, 95.9, 119, 93.7, 106, 125},
         {505, 889, 4650, 1580, 1360, 1670, 1680, 1670},
         {3890, 3880, 4270, 3880, 3790, 3900, 3990, 4310},
         {517, 502, 491, 511, 508, 503, 504, 497}},  // exact
        {{69.6, 122, 0, 222, 104, 110, 117, 138},
         {431, 734, 3050, 1210, 1370, 1670, 1680, 1660},
         {3890, 3880, 4270, 3880, 3790, 3900, 3990, 4310},
         {517, 502, 491, 511, 508, 503, 504, 497}},  // high
        {{70.8, 84.2, 187, 209, 127, 117, 165, 117},
         {440, 748, 3100, 1270, 1360, 1660, 1660, 1660},
         {3890, 3880, 4270, 3880, 3790, 3900, 3990, 4310},
         {517, 502, 491, 511, 508, 503, 504, 497}},  // fast
    },
    {
        // avx2
        {{0.249, 1.79, 1.24, 0.755, 45, 64.9, 115, 255},
         {6.5, 12.2, 26.3, 25.2, 20.4, 19.8, 20.5, 22},
         {41.1, 41.6, 46.7, 51, 66.2, 96, 155, 344},
         {10.1, 9.7, 10.5, 10.6, 10.9, 10.6, 11.1, 11.3}},  // exact
        {{0.836, 1.54, 3.49, 3.47, 44.8, 64.1, 120, 268},
         {3.98, 8.18, 16.9, 16.3, 21.5, 22.3, 20.7, 20.8},
         {24.8, 26.4, 30.5, 32.5, 63.8, 107, 216, 458},
         {8.09, 8.29, 8.47, 8.6, 8.46, 8.23, 8.47, 7.93}},  // high
        {{1.59, 2.63, 2.99, 4.31, 45.8, 63, 130, 270},
         {3.28, 6.4, 13.6, 12.8, 20, 21.9, 19.3, 18.5},
         {20.4, 20.1, 23.2, 24.5, 50.4, 81.3, 162, 329},
         {5.23, 5.34, 5.45, 5.17, 5.82, 6.1, 5.93, 4.6}},  // fast
    },
    {
        // avx_vnni: a Zen 5 server of 2 cores; exact is the AVX2 code
        {{0.37, 0.105, 0.724, 0.38, 27.3, 47.8, 72.2, 149},
         {4.05, 8.2, 16.8, 16.2, 11.4, 10.8, 11.3, 12.1},
         {26.3, 26.1, 27.7, 27.2, 43.1, 69, 97.3, 185},
         {7.63, 7.78, 7.75, 7.76, 7.98, 7.74, 8.03, 8.3}},  // exact
        {{0.314, 0.289, 0.336, 0.428, 28.7, 42, 72.2, 153},
         {2.85, 5.71, 12.3, 11.3, 11.4, 11.3, 11.8, 11.7},
         {16.6, 17, 20.5, 20.1, 38.4, 63.1, 121, 264},
         {4.3, 4.38, 4.36, 4.35, 4.49, 4.31, 4.55, 4.46}},  // high
        {{0, 0.142, 0, 0.295, 28.2, 41, 72.7, 151},
         {2.73, 5.01, 11, 9.8, 11.6, 11.5, 11.7, 12},
         {11.8, 12.6, 15.7, 15.8, 30.7, 49.1, 89, 181},
         {2.4, 2.26, 2.3, 2.28, 2.44, 2.39, 2.53, 2.7}},  // fast
    },
    {
        // avx512
        {{0.723, 2.21, 3.07, 3.83, 35.5, 54.3, 95.7, 103},
         {3.81, 7.5, 15.3, 14.1, 13.7, 14.2, 13.5, 14},
         {35.4, 43.9, 47.6, 51.3, 56.5, 63.3, 83, 124},
         {5.98, 5.91, 5.88, 5.63, 5.36, 5.73, 5.76, 5.56}},  // exact
        {{1.34, 2.88, 4, 4.83, 34.5, 58.9, 96.8, 107},
         {1.85, 3.63, 7.56, 7.08, 14.4, 14, 12.7, 12.8},
         {14.9, 16.8, 21.5, 22.3, 41.1, 57.8, 92.7, 156},
         {3.06, 3.2, 3.01, 3.05, 3.3, 3.26, 3.32, 4.09}},  // high
        {{1.39, 2.66, 4.18, 5.1, 36.1, 57.7, 94.2, 103},
         {1.9, 3.65, 7.78, 7.22, 14.7, 14, 13, 13.4},
         {10.9, 12.4, 12.8, 15.2, 29.3, 35.9, 50.4, 87.3},
         {1.82, 1.82, 1.87, 1.83, 1.93, 1.93, 2, 2.29}},  // fast
    },
    {
        // amx
        {{0.79, 1.99, 3.62, 2.91, 35.1, 54.8, 93.4, 108},
         {3.8, 7.32, 14.9, 14.6, 14.5, 14.6, 14.5, 15},
         {34.8, 40, 46.6, 47.8, 56.6, 62.6, 78.8, 125},
         {6.07, 5.9, 5.77, 5.63, 5.45, 5.66, 6.33, 6.6}},  // exact
        {{1.31, 2.63, 3.7, 4.71, 39.2, 56.3, 93.9, 104},
         {1.98, 3.81, 7.78, 7.37, 14.8, 14.3, 13.9, 14.1},
         {21.5, 22.5, 20.2, 22.5, 53.5, 88.8, 123, 182},
         {0.745, 0.94, 1.15, 1.18, 1.28, 0.76, 0.793, 0.456}},  // high
        {{1.28, 2.86, 3.67, 4.72, 38.1, 56.2, 93.1, 103},
         {2.06, 3.63, 7.74, 7.12, 13.9, 14, 13.6, 14.7},
         {22.7, 21.2, 19.9, 21.4, 64.5, 89.3, 118, 178},
         {0.717, 0.965, 1.11, 1.18, 0.613, 0.753, 0.698, 0.643}},  // fast
    },
};

// ARM was never measured. What decides is the ratio of tables to decoding, and that is taken from AVX2, whose inner loops take as
// many instructions for each byte of a register (docs/kernels-arm.md): tables as there; decoded in fp32, or in bytes, whose
// multiply-adds are 4 (sdot) or 8 (smmla) to one of fp32.
constexpr PathCost path_cost(Isa isa, Precision precision) {
  if (isa < Isa::neon) return kMeasuredCost[static_cast<int>(isa)][static_cast<int>(precision)];
  const auto& avx2 = kMeasuredCost[static_cast<int>(Isa::avx2)];
  const PathCost &tables = avx2[static_cast<int>(precision)], &fp32 = avx2[static_cast<int>(Precision::exact)];
  const double faster = precision != Precision::fast || isa == Isa::neon ? 1 : isa == Isa::neon_dotprod ? 4 : 8;
  PathCost cost = tables;
  for (int w = 0; w < 8; ++w) {
    cost.decode[w] = fp32.decode[w];
    cost.decode_token[w] = fp32.decode_token[w] / faster;
  }
  return cost;
}

}  // namespace pyllmq::cpu
