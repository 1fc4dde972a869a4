// vpdpwssd: 32 multiply-adds of int16 in one instruction, twice the fp32 rate. 12 tokens x 32 rows in 24 registers.
#include <immintrin.h>

#include "cpu/codebook_linear_decode_int16.h"
#include "cpu/codebook_pairs_avx512.h"

namespace pyllmq::cpu {
namespace {

// --- decode --------------------------------------------------------------------------------------------------------

template <int Width>
void quantize_block(const uint16_t* codebook, const float* max_magnitude, BlockEntries<Width>& block) {
  alignas(64) float factors[16] = {};
  for (int column = 0; column < kBlockColumns; ++column) factors[column] = to_int16(max_magnitude[column]);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int first = 0; first < kBlockColumns << Width; first += 16) {
    const __m512i column = _mm512_srli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(first)), Width);
    const __m512 factor = _mm512_permutexvar_ps(column, _mm512_load_ps(factors));
    const __m512 values = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + first)));
    const __m512i entries = _mm512_cvtps_epi32(_mm512_mul_ps(values, factor));
    _mm256_store_si256(reinterpret_cast<__m256i*>(block.entries + first), _mm512_cvtepi32_epi16(entries));
  }
}

template <int Width>
void split_columns(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  BlockEntries<Width> block;
  for (; slots > 0; slots -= kBlockColumns, codebook += kBlockColumns << Width, max_magnitude += kBlockColumns,
                    split += kBlockColumns * split_bytes(Width)) {
    quantize_block<Width>(codebook, max_magnitude, block);
    split_pairs<Width>(block, split_bytes(Width), split);
  }
}

struct WidthKernels {
  void (*split)(const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split);
  void (*decode)(const uint8_t* codes, const uint8_t* split, int64_t slots, uint16_t* weights);
};

template <int Width>
constexpr WidthKernels width_kernels() {
  return {split_columns<Width>, decode_pairs<Width, 1>};
}

constexpr WidthKernels kByWidth[8] = {width_kernels<1>(), width_kernels<2>(), width_kernels<3>(), width_kernels<4>(),
                                      width_kernels<5>(), width_kernels<6>(), width_kernels<7>(), width_kernels<8>()};

void split_any(int width, const uint16_t* codebook, const float* max_magnitude, int64_t slots, uint8_t* split) {
  kByWidth[width - 1].split(codebook, max_magnitude, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots,
                const float*, uint8_t* weights) {
  kByWidth[width - 1].decode(tile_codes + slot / group_columns(width) * group_bytes(width), split, slots,
                             reinterpret_cast<uint16_t*>(weights));
}

// --- multiply ------------------------------------------------------------------------------------------------------

template <int Tokens>
void multiply_group(const int16_t* weights, const PackedGroup& group, int64_t slots, float* sums) {
  const int32_t* x = group.pairs;
  const float* units = group.units;
  for (; slots > 0; slots -= kFlushColumns, units += Tokens) {
    asm volatile("" ::: "memory");  // else gcc 12 carries the fp32 sums from chain to chain on the stack
    __m512i sum[Tokens][2];
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_si512();
    for (int64_t chain = slots < kFlushColumns ? slots : kFlushColumns; chain > 0;
         chain -= 2, weights += 2 * kHalfRows, x += Tokens) {
      const __m512i w0 = load_64(weights), w1 = load_64(weights + kDecodedColumns * kHalfRows);
#pragma GCC unroll 12
      for (int t = 0; t < Tokens; ++t) {
        const __m512i x_t = _mm512_set1_epi32(x[t]);
        sum[t][0] = _mm512_dpwssd_epi32(sum[t][0], x_t, w0);
        sum[t][1] = _mm512_dpwssd_epi32(sum[t][1], x_t, w1);
        asm("" : "+v"(sum[t][0]), "+v"(sum[t][1]));  // stay in their registers (gcc 12 spills and copies them)
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = sums + t * kTileRows + half * kHalfRows;
        const __m512 total = _mm512_cvtepi32_ps(sum[t][half]);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(total, _mm512_set1_ps(units[t]), _mm512_loadu_ps(to)));
      }
  }
}

constexpr int64_t kTokenGroup = 12;
using GroupKernel = void (*)(const int16_t* weights, const PackedGroup& group, int64_t slots, float* sums);
constexpr GroupKernel kGroup[kTokenGroup + 1] = {
    nullptr,           multiply_group<1>, multiply_group<2>, multiply_group<3>,  multiply_group<4>,
    multiply_group<5>, multiply_group<6>, multiply_group<7>, multiply_group<8>,  multiply_group<9>,
    multiply_group<10>, multiply_group<11>, multiply_group<12>};

void multiply(const uint8_t* weights, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const TokenGroups groups{tokens, kTokenGroup};
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t begin = groups.begin(g), count = groups.size(g);
    kGroup[count](reinterpret_cast<const int16_t*>(weights), packed_group(packed, slots, begin, count), slots,
                  sums + begin * kTileRows);
  }
}

void add_outliers(const RowOutliers& outliers, const float* x, int64_t count, float* sums) {
  add_outliers_loop(outliers, x, count, sums);
}

}  // namespace

const DecodeKernels kDecodeInt16Avx512 = {kTokenGroup, 2,       1,        8,       true, true, packed_int16_bytes, pack_int16, split_any,
                                          decode_any,  nullptr, multiply, add_outliers, nullptr, nullptr};

}  // namespace pyllmq::cpu
