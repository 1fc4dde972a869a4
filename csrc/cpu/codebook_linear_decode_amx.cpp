// Decoded weights in bf16 for AMX tiles (codebook_linear_decode.h): TDPBF16PS multiplies 16 tokens x 32 columns by
// 32 columns x 16 rows in 16 cycles, 16 times the rate of fp32 multiply-adds. The decoded pairs of columns of 16 rows
// are a tile as they are.
//
//   fast   x and W rounded to bf16, one product: error 1.7e-3 (2^-9 each, uniformly distributed, x and W together)
//   high   x = xh + xl, W = wh + wl, each bf16; xh wh + xl wh + xh wl: error 1e-5. An fp16 codebook entry has 11 bits,
//          so wh + wl is exact
//
// Sums are fp32, subnormals count as zero. x or a codebook that is not finite, or outside of 2^-90..2^100, is refused.
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>

#include "cpu/codebook_linear_decode_amx.h"
#include "cpu/codebook_pairs_avx512.h"

namespace pyllmq::cpu {
namespace {

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

template <int Width, int Planes>
void split_columns(const uint16_t* codebook, int64_t slots, uint8_t* split) {
  constexpr int64_t stride = split_bytes(Width), second = Width <= 4 ? 64 : stride / 2;
  BlockEntries<Width> planes[Planes];
  for (; slots > 0; slots -= kBlockColumns, codebook += kBlockColumns << Width, split += kBlockColumns * stride) {
    for (int first = 0; first < kBlockColumns << Width; first += 16) {
      const __m512 value = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codebook + first)));
      const __m512i high = to_bf16(value);
      const auto store = [&](int plane, __m512i entries) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(planes[plane].entries + first), _mm512_cvtepi32_epi16(entries));
      };
      store(0, high);
      if constexpr (Planes == 2) store(1, to_bf16(remainder_of(value, high)));
    }
    for (int plane = 0; plane < Planes; ++plane) split_pairs<Width>(planes[plane], stride, split + plane * second);
  }
}

struct WidthKernels {
  void (*split)(const uint16_t* codebook, int64_t slots, uint8_t* split);
  void (*decode)(const uint8_t* codes, const uint8_t* split, int64_t slots, uint16_t* weights);
};

template <int Width, int Planes>
constexpr WidthKernels width_kernels() {
  return {split_columns<Width, Planes>, decode_pairs<Width, Planes>};
}

template <int Planes>
constexpr WidthKernels kByWidth[8] = {
    width_kernels<1, Planes>(), width_kernels<2, Planes>(), width_kernels<3, Planes>(), width_kernels<4, Planes>(),
    width_kernels<5, Planes>(), width_kernels<6, Planes>(), width_kernels<7, Planes>(), width_kernels<8, Planes>()};

template <int Planes>
void split_any(int width, const uint16_t* codebook, const float*, int64_t slots, uint8_t* split) {
  kByWidth<Planes>[width - 1].split(codebook, slots, split);
}

template <int Planes>
void decode_any(int width, StepOrder, const uint8_t* tile_codes, int64_t slot, const uint8_t* split, int64_t slots,
                const float*, uint8_t* weights) {
  kByWidth<Planes>[width - 1].decode(tile_codes + slot / group_columns(width) * group_bytes(width), split, slots,
                                     reinterpret_cast<uint16_t*>(weights));
}

template <int Planes>
void put_outlier(uint8_t* to, int64_t slot, int row, float value) {
  auto* weights = reinterpret_cast<uint16_t*>(to);
  const int64_t place = pair_place(slot, row);
  weights[place] = fp32_to_bf16(value);
  if constexpr (Planes == 2) weights[kDecodedWeights + place] = fp32_to_bf16(value - bf16_to_fp32(weights[place]));
}

// --- x -------------------------------------------------------------------------------------------------------------

// Of a group of up to 16 tokens: [plane, 32 columns, 16 tokens, column]; groups stand side by side as whole tiles.
template <int Planes>
constexpr int64_t group_elements = Planes* kDecodedColumns* kTileTokens;

template <int Planes>
int64_t packed_bytes(int64_t tokens) {
  return TokenGroups{tokens, kTileTokens}.count() * group_elements<Planes> * 2;
}

template <int Planes>
bool pack(const float* x, int64_t slots, const TokenGroups& groups, int64_t group, uint8_t* packed) {
  auto* to = reinterpret_cast<uint16_t*>(packed) + group * group_elements<Planes>;
  const __m512 smallest = _mm512_set1_ps(0x1p-90f), largest = _mm512_set1_ps(0x1p100f);
  __mmask16 outside = 0;
  for (int64_t t = 0; t < groups.largest(); ++t)
    for (int64_t slot = 0; slot < slots; slot += 16) {
      __m512 value = _mm512_setzero_ps();
      if (t < groups.size(group)) value = _mm512_loadu_ps(x + t * kDecodedColumns + slot);
      const __m512 magnitude = _mm512_abs_ps(value);
      outside |= _mm512_cmp_ps_mask(magnitude, largest, _CMP_NLE_UQ);
      outside |= _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(magnitude, _mm512_setzero_ps(), _CMP_NEQ_UQ), magnitude,
                                         smallest, _CMP_LT_OQ);
      uint16_t* row = to + slot / kTileColumns * kTileElements + t * kTileColumns + slot % kTileColumns;
      const __m512i high = to_bf16(value);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_cvtepi32_epi16(high));
      if constexpr (Planes == 2)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + kDecodedColumns * kTileTokens),
                            _mm512_cvtepi32_epi16(to_bf16(remainder_of(value, high))));
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
  _tile_loadconfig(&config);
}

void end_chunk() { _tile_release(); }

constexpr int64_t kSumsStride = kTileRows * 4;
constexpr int64_t kHalfWeights = kDecodedColumns * kHalfRows;

// One or two groups of tokens x 32 rows.
template <int Groups>
inline void load_x(const uint16_t* x, int64_t group) {
  _tile_loadd(4, x, 64);
  if constexpr (Groups == 2) _tile_loadd(5, x + group, 64);
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

template <int Planes, int Groups>
void multiply_groups(const uint16_t* weights, const uint16_t* x, int64_t slots, float* sums, float* next_sums) {
  constexpr int64_t group = group_elements<Planes>, x_plane = kDecodedColumns * kTileTokens;
  _tile_loadd(0, sums, kSumsStride);
  _tile_loadd(1, sums + kHalfRows, kSumsStride);
  if constexpr (Groups == 2) {
    _tile_loadd(2, next_sums, kSumsStride);
    _tile_loadd(3, next_sums + kHalfRows, kSumsStride);
  }
  for (; slots > 0; slots -= kTileColumns, weights += kTileColumns * kHalfRows, x += kTileElements) {
    load_weights(weights);
    if constexpr (Planes == 2) {
      load_x<Groups>(x + x_plane, group);
      multiply_tiles<Groups>();
    }
    load_x<Groups>(x, group);
    multiply_tiles<Groups>();
    if constexpr (Planes == 2) {
      load_weights(weights + kDecodedWeights);
      multiply_tiles<Groups>();
    }
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
template <int Planes>
void multiply(const uint8_t* from, const uint8_t* packed, int64_t slots, int64_t tokens, float* sums) {
  const TokenGroups groups{tokens, kTileTokens};
  const auto* weights = reinterpret_cast<const uint16_t*>(from);
  const auto* x = reinterpret_cast<const uint16_t*>(packed);
  for (int64_t g = 0; g < groups.count(); g += 2, x += 2 * group_elements<Planes>) {
    float* group_sums = sums + groups.begin(g) * kTileRows;
    if (g + 1 < groups.count())
      multiply_groups<Planes, 2>(weights, x, slots, group_sums, sums + groups.begin(g + 1) * kTileRows);
    else
      multiply_groups<Planes, 1>(weights, x, slots, group_sums, nullptr);
  }
}

bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

template <int Planes>
constexpr DecodeKernels row() {
  return {kTileTokens,       2,          Planes,  kTileColumns, false, true, packed_bytes<Planes>, pack<Planes>, split_any<Planes>,
          decode_any<Planes>, put_outlier<Planes>, multiply<Planes>, nullptr, begin_chunk, end_chunk};
}

}  // namespace

bool amx_permitted() {
  static const bool permitted = ask_for_tiles();
  return permitted;
}

const DecodeKernels kDecodeAmxFast = row<1>();
const DecodeKernels kDecodeAmxHigh = row<2>();

}  // namespace pyllmq::cpu
