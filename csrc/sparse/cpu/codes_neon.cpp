// 2:4 codes by table lookups of bytes. Position and code of a kept weight are one index into the 4 << bits partial products of
// its group: 16, 32 or 64 of them, which one instruction looks up (tbl of one, two or four registers).
#include <arm_neon.h>

#include "codebook/cpu/bytes_neon.h"
#include "codebook/cpu/planes_neon.h"
#include "runtime/instances.h"
#include "runtime/prefetch.h"
#include "sparse/cpu/linear.h"

namespace pyllmq::cpu {
namespace {

// The products of a block, and the largest of their magnitudes, NaN if there is one.
template <int Bits>
float multiply_codebook(const uint16_t* codebook, const float* x, int64_t slots, float* products) {
  uint32x4_t largest = vdupq_n_u32(0);  // as integers, magnitudes order like floats and NaN comes out on top
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int i = 0; i < 1 << Bits; i += 4, codebook += 4, products += 4) {
      const float32x4_t product = vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(codebook))), x[slot]);
      vst1q_f32(products, product);
      largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(product)));
    }
  return bits_float(vmaxvq_u32(largest));
}

// Of each group plane by plane, 4 << Bits bytes each.
template <TableKind Kind, int Bits>
bool build_tables(const uint16_t* codebook, const float* x, int64_t slots, uint8_t* tables, float* unit) {
  constexpr int entries = 4 << Bits;
  alignas(64) float products[kCellColumns << Bits];
  const float bound = multiply_codebook<Bits>(codebook, x, slots, products);
  if (bound != 0 && !(bound >= kSmallestBound && bound <= kLargestBound)) return false;
  const float to_fixed = bound == 0 ? 0 : fixed_point_scale(Kind, bound);
  *unit = bound == 0 ? 0 : 1 / to_fixed;
  for (int64_t group = 0; group < slots / 4; ++group, tables += table_planes(Kind) * entries)
    for (int i = 0; i < entries; i += 16) {
      const float* own = products + group * entries + i;
      Sixteen scaled;
      for (int part = 0; part < 4; ++part) scaled.part[part] = vmulq_n_f32(vld1q_f32(own + 4 * part), to_fixed);
      uint8x16_t planes[table_planes(Kind)];
      cut_into_planes<Kind>(scaled, planes);
      for (int p = 0; p < table_planes(Kind); ++p) vst1q_u8(tables + p * entries + i, planes[p]);
    }
  return true;
}

template <TableKind Kind>
bool build(int bits, const uint16_t* codebook, const float* x, int64_t slots, uint8_t* tables, float* unit) {
  constexpr auto kBuild = instances<2, 4>([]<int Bits>() { return build_tables<Kind, Bits>; });
  return kBuild[bits](codebook, x, slots, tables, unit);
}

template <int Bits>
inline __attribute__((always_inline)) uint8x16_t look_up_index(const uint8_t* table, uint8x16_t index) {
  if constexpr (Bits == 2)
    return vqtbl1q_u8(vld1q_u8(table), index);
  else
    return look_up_bytes<Bits + 2>(table, index);
}

template <TableKind Kind, int Bits, int Tokens>
void look_up_tokens(const CodeWork& work, const TokenTables* tokens) {
  constexpr int entries = 4 << Bits, planes = table_planes(Kind);
  PlaneSums<Kind, 1> sums[Tokens];
  const uint8_t* table[Tokens];
#pragma GCC unroll 2
  for (int t = 0; t < Tokens; ++t) {
    sums[t].clear();
    table[t] = tokens[t].tables;
  }
  const auto add = [&](uint8x16_t first, uint8x16_t second) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
      for (int p = 0; p < planes; ++p, table[t] += entries)
        sums[t].add_two(p, 0, look_up_index<Bits>(table[t], first), look_up_index<Bits>(table[t], second));
  };
  const uint8_t* cell = work.cell;
  for (int64_t slot = 0; slot < work.slots; slot += kBatchColumns, cell += code_batch_bytes(Bits)) {
    for (int line = 0; line < code_batch_bytes(Bits); line += 64) prefetch(cell + line, kCellsNeon);
    for (int bytes = 0; bytes < 64; bytes += kCellRows) {
      const uint8x16_t a = vld1q_u8(cell + bytes), b = vld1q_u8(cell + 64 + bytes);
      if constexpr (Bits == 2) {
        add(low_nibbles(a), low_nibbles(b));
        add(high_nibbles(a), high_nibbles(b));
      } else {  // positions, first codes, second codes
        const uint8x16_t c = vld1q_u8(cell + 128 + bytes), three = vdupq_n_u8(3);
        const auto index = [](uint8x16_t codes, uint8x16_t position) { return vorrq_u8(codes, vshlq_n_u8(position, Bits)); };
        add(index(low_nibbles(b), vandq_u8(a, three)), index(low_nibbles(c), vandq_u8(vshrq_n_u8(a, 2), three)));
        add(index(high_nibbles(b), vandq_u8(vshrq_n_u8(a, 4), three)), index(high_nibbles(c), vshrq_n_u8(a, 6)));
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < Tokens; ++t) sums[t].flush(work.slots / 2, tokens[t].unit, tokens[t].y);
}

template <TableKind Kind, int Bits>
void look_up(const CodeWork& work) {
  run_in_groups(instances<1, 2>([]<int Tokens>() { return look_up_tokens<Kind, Bits, Tokens>; }), work);
}

template <TableKind Kind>
constexpr CodeTableKernels code_tables() {
  return {build<Kind>, {look_up<Kind, 2>, look_up<Kind, 3>, look_up<Kind, 4>}};
}

}  // namespace

const CodeTableKernels kCodeTablesNeon[kTableKinds] = {code_tables<TableKind::bits28>(), code_tables<TableKind::bits21>(),
                                                       code_tables<TableKind::bits16>(), code_tables<TableKind::bits14>()};

}  // namespace pyllmq::cpu
