// Decoded weights in bf16 for AMX tiles (codebook_linear_decode.h): TDPBF16PS multiplies 16 tokens x 32 columns by
// 32 columns x 16 rows in 16 cycles, 16 times the rate of AVX-512 fp32 multiply-adds. The decoded pairs of columns of 16 rows
// are a tile as they are.
//
//   x = xh + xl, W = wh + wl, each bf16; xh wh + xl wh + xh wl: error 1e-5. An fp16 codebook entry has 11 bits, so wh + wl
//   is exact.
//
// The same for `high` and `fast`: two products, xh wh + xl wh, have an error of 1.7e-3, but 3e-3 where one channel
// dwarfs the others and the rounding of its weights does not average out.
// Sums are fp32, subnormals count as zero: x outside of 2^-90..2^60, or not finite, is refused. (An outlier divided by
// its row scale may be 2^40.)
#include <immintrin.h>

#include "cpu/codebook_linear_decode.h"
#include "cpu/codebook_pairs_avx512.h"

namespace pyllmq::cpu {
namespace {

constexpr int kPlanes = 2;  // high and low parts of weights and of x
constexpr int64_t kTileTokens = 16, kTileColumns = 32;
constexpr int64_t kTileElements = kTileTokens * kTileColumns;

// --- decode --------------------------------------------------------------------------------------------------------

// Rounded to nearest even like fp32_to_bf16, for finite values; in the low words.
inline __m512i to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
}
inline __m512 remainder_of(__m512 value, __m512i high) {
  return _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
}

template <int Width>
void split_columns(const uint16_t* codebook, int64_t slots, uint8_t* split) {
  constexpr int64_t stride = split_bytes(Width), second = Width <= 4 ? 64 : stride / 2;
  BlockEntries<Width> planes[kPlanes];
  for (; slots > 0; slots -= kBlockColumns, codebook += kBlockColumns << Width, split += kBlockColumns * stride) {
    for (int first = 0; first < kBlockColumns << Width; first += 16) {
      const __m512 value = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + first)));
      const __m512i high = to_bf16(value);
      const auto store = [&](int plane, __m512i entries) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(planes[plane].entries + first), _mm512_cvtepi32_epi16(entries));
      };
      store(0, high);
      store(1, to_bf16(remainder_of(value, high)));
    }
    for (int plane = 0; plane < kPlanes; ++plane) split_pairs<Width>(planes[plane], stride, split + plane * second);
  }
}

struct WidthKernels {
  void (*split)(const uint16_t* codebook, int64_t slots, uint8_t* split);
  void (*decode)(const uint8_t* codes, const uint8_t* split, int64_t slots, uint16_t* weights);
};

template <int Width>
constexpr WidthKernels width_kernels() {
  return {split_columns<Width>, decode_pairs<Width, kPlanes>};
}

constexpr WidthKernels kByWidth[8] = {width_kernels<1>(), width_kernels<2>(), width_kernels<3>(), width_kernels<4>(),
                                      width_kernels<5>(), width_kernels<6>(), width_kernels<7>(), width_kernels<8>()};

void split_any(int width, const uint16_t* codebook, const float*, int64_t slots, uint8_t* split) {
  kByWidth[width - 1].split(codebook, slots, split);
}

void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots,
                const float*, uint8_t* weights) {
  kByWidth[width - 1].decode(tile_codes + slot / group_columns(width) * group_bytes(width), split, slots,
                             reinterpret_cast<uint16_t*>(weights));
}

void put_outlier(uint8_t* to, int64_t slot, int row, float value) {
  auto* weights = reinterpret_cast<uint16_t*>(to);
  const int64_t place = pair_place(slot, row);
  weights[place] = fp32_to_bf16(value);
  weights[kDecodedWeights + place] = fp32_to_bf16(value - bf16_to_fp32(weights[place]));
}

// --- x -------------------------------------------------------------------------------------------------------------

// Of a group of up to 16 tokens: [high and low part, 32 columns, 16 tokens, column], whole tiles.
constexpr int64_t kPlaneX = kDecodedColumns * kTileTokens, kGroupX = kPlanes * kPlaneX;

int64_t packed_bytes(int64_t tokens) { return TokenGroups{tokens, kTileTokens}.count() * kGroupX * 2; }

bool pack(const float* x, int64_t slots, const TokenGroups& groups, int64_t group, uint8_t* packed) {
  auto* to = reinterpret_cast<uint16_t*>(packed) + group * kGroupX;
  const __m512 smallest = _mm512_set1_ps(0x1p-90f), largest = _mm512_set1_ps(0x1p60f), zero = _mm512_setzero_ps();
  const int64_t rows = groups.largest(), count = groups.size(group);
  __mmask16 outside = 0;
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t slot = 0; slot < slots; slot += 16) {
      const __m512 value = t < count ? _mm512_loadu_ps(x + t * kDecodedColumns + slot) : zero;
      const __m512 magnitude = _mm512_abs_ps(value);
      outside |= _mm512_cmp_ps_mask(magnitude, largest, _CMP_NLE_UQ);
      outside |= _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(value, zero, _CMP_NEQ_UQ), magnitude, smallest, _CMP_LT_OQ);
      uint16_t* row = to + slot / kTileColumns * kTileElements + t * kTileColumns + slot % kTileColumns;
      const __m512i high = to_bf16(value), low = to_bf16(remainder_of(value, high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_cvtepi32_epi16(high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + kPlaneX), _mm512_cvtepi32_epi16(low));
    }
  return outside == 0;
}

// --- multiply ------------------------------------------------------------------------------------------------------

// Tiles 0..3: sums [2 groups of tokens][2 halves]; 4, 5: x of the two groups; 6, 7: weights of the two halves.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void begin_chunk(int64_t tokens) {
  const auto rows = static_cast<uint8_t>(TokenGroups{tokens, kTileTokens}.largest());
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = tile < 6 ? rows : 16;
  }
  asm volatile("" ::"r"(&config) : "memory");  // gcc 12 believes that the next instruction reads 8 bytes of the 64
  _tile_loadconfig(&config);
}

void end_chunk() { _tile_release(); }

constexpr int64_t kSumsStride = kTileRows * 4;
constexpr int64_t kHalfWeights = kDecodedColumns * kHalfRows;

// One or two groups of tokens x 32 rows.
template <int Groups>
inline void load_x(const uint16_t* x) {
  _tile_loadd(4, x, 64);
  if constexpr (Groups == 2) _tile_loadd(5, x + kGroupX, 64);
}
inline void load_weights(const uint16_t* weights) {
  _tile_loadd(6, weights, 64);
  _tile_loadd(7, weights + kHalfWeights, 64);
}
template <int Groups>
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (Groups == 2) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <int Groups>
void multiply_groups(const uint16_t* weights, const uint16_t* x, int64_t slots, float* sums, float* next_sums) {
  _tile_loadd(0, sums, kSumsStride);
  _tile_loadd(1, sums + kHalfRows, kSumsStride);
  if constexpr (Groups == 2) {
    _tile_loadd(2, next_sums, kSumsStride);
    _tile_loadd(3, next_sums + kHalfRows, kSumsStride);
  }
  for (; slots > 0; slots -= kTileColumns, weights += kTileColumns * kHalfRows, x += kTileElements) {
    load_weights(weights);
    load_x<Groups>(x + kPlaneX);
    multiply_tiles<Groups>();
    load_x<Groups>(x);
    multiply_tiles<Groups>();
    load_weights(weights + kDecodedWeights);
    multiply_tiles<Groups>();
  }
  _tile_stored(0, sums, kSumsStride);
  _tile_stored(1, sums + kHalfRows, kSumsStride);
  if constexpr (Groups == 2) {
    _tile_stored(2, next_sums, kSumsStride);
    _tile_stored(3, next_sums + kHalfRows, kSumsStride);
  }
}

// A group smaller than the largest also loads, leaves and stores the first sums of the next one; its x is zero there.
// Sums of a later group are therefore stored after those of an earlier one.
void multiply(const uint8_t* from, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const TokenGroups groups{tokens, kTileTokens};
  const auto* weights = reinterpret_cast<const uint16_t*>(from);
  const auto* x = reinterpret_cast<const uint16_t*>(packed);
  for (int64_t g = 0; g < groups.count(); g += 2, x += 2 * kGroupX) {
    float* group_sums = sums + groups.begin(g) * kTileRows;
    if (g + 1 < groups.count())
      multiply_groups<2>(weights, x, slots, group_sums, sums + groups.begin(g + 1) * kTileRows);
    else
      multiply_groups<1>(weights, x, slots, group_sums, nullptr);
  }
}

}  // namespace

const DecodeKernels kDecodeAmx = {kTileTokens, 2,           kPlanes,  kTileColumns, false,       true, packed_bytes, pack, split_any,
                                  decode_any,  put_outlier, multiply, nullptr,      begin_chunk, end_chunk};

}  // namespace pyllmq::cpu
