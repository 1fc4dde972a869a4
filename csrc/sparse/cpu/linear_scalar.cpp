#include "sparse/cpu/linear.h"

namespace pyllmq::cpu {
namespace {

template <ValueType Type>
void expand_bitmap(const uint8_t* cell, int64_t slots, float* weights) {
  const uint8_t* values = cell + slots * 2;
  int64_t next = 0;
  const auto put = [&](int64_t slot, int row, bool kept) {
    weights[slot * kCellRows + row] = kept ? value_at(Type, values, next++) : 0.0f;
  };
  for (int64_t slot = 0; slot < slots; ++slot) {
    if constexpr (Type == ValueType::bf16) {
      const uint32_t mask = reinterpret_cast<const uint32_t*>(cell)[slot / 2];
      if (slot % 2 == 0)
        for (int bit = 0; bit < 32; ++bit) put(slot + bit % 2, bit / 2, mask >> bit & 1);
    } else {
      const uint16_t mask = reinterpret_cast<const uint16_t*>(cell)[slot];
      for (int row = 0; row < kCellRows; ++row) put(slot, row, mask >> row & 1);
    }
  }
}

template <ValueType Type>
void expand_24(const uint8_t* cell, int64_t slots, float* weights) {
  for (int64_t i = 0; i < slots * kCellRows; ++i) weights[i] = 0.0f;
  for (int64_t group = 0; group < slots / 4; ++group) {
    const uint8_t* batch = cell + group / 8 * batch_bytes(Type);
    const uint8_t* values = batch + 4 * kCellRows + group % 8 * 2 * kCellRows * value_bytes(Type);
    for (int row = 0; row < kCellRows; ++row) {
      const uint32_t positions = reinterpret_cast<const uint32_t*>(batch)[row] >> (4 * (group % 8));
      for (int which = 0; which < 2; ++which) {
        const int64_t slot = group * 4 + (positions >> (2 * which) & 3);
        const int64_t place = Type == ValueType::bf16 ? row * 2 + which : which * kCellRows + row;
        weights[slot * kCellRows + row] += value_at(Type, values, place);
      }
    }
  }
}

// Of one token x of 2:4 lies by slots in this order, too.
template <auto Expand>
void multiply(const CellWork& work) {
  alignas(64) float weights[kCellColumns * kCellRows];
  Expand(work.cell, work.slots, weights);
  for (int row = 0; row < kCellRows; ++row) {
    float sum = 0;
    for (int64_t slot = 0; slot < work.slots; ++slot) sum += weights[slot * kCellRows + row] * work.x[slot];
    work.sums[row] += sum;
  }
}

template <int Bits>
void multiply_codes(const CellWork& work) {
  for (int row = 0; row < kCellRows; ++row) {
    float sum = 0;
    for (int64_t group = 0; group < work.slots / 4; ++group) {
      const GroupCodes found = read_group(work.cell, work.order, Bits, group, row);
      const float* products = work.x + (group * 4 << Bits);
      for (int which = 0; which < 2; ++which) sum += products[(found.position[which] << Bits) + found.code[which]];
    }
    work.sums[row] += sum;
  }
}

template <int Bits>
void expand_codes(const uint8_t* cell, StepOrder order, int64_t slots, const uint16_t* codebook, float* weights) {
  for (int64_t i = 0; i < slots * kCellRows; ++i) weights[i] = 0.0f;
  for (int64_t group = 0; group < slots / 4; ++group)
    for (int row = 0; row < kCellRows; ++row) {
      const GroupCodes found = read_group(cell, order, Bits, group, row);
      for (int which = 0; which < 2; ++which) {
        const int64_t slot = group * 4 + found.position[which];
        weights[slot * kCellRows + row] += fp16_to_fp32(codebook[(slot << Bits) + found.code[which]]);
      }
    }
}

void build_products(const uint16_t* codebook, int bits, const float* x, float* products) {
  for (int i = 0; i < 4 << bits; ++i) products[i] = x[i >> bits] * fp16_to_fp32(codebook[i]);
}

template <ValueType Type>
float dot_columns(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x) {
  float sum[4] = {};
  for (int64_t i = 0; i < count; ++i) sum[i % 4] += value_at(Type, values, i) * x[column_at(columns, column_bytes, i)];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <ValueType Type>
void dot_tokens(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x, float* sums) {
  for (int64_t t = 0; t < kTokensSideBySide; ++t) sums[t] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float* own = x + column_at(columns, column_bytes, i) * kTokensSideBySide;
    for (int64_t t = 0; t < kTokensSideBySide; ++t) sums[t] += value_at(Type, values, i) * own[t];
  }
}

template <ValueType Type>
constexpr void set_type(SparseKernels& row) {
  constexpr int type = static_cast<int>(Type);
  row.bitmap[type][0] = multiply<expand_bitmap<Type>>;
  row.sparse24[type][0] = multiply<expand_24<Type>>;
  row.expand_bitmap[type] = expand_bitmap<Type>;
  row.expand_24[type] = expand_24<Type>;
  row.dot_columns[type] = dot_columns<Type>;
  row.dot_tokens[type] = dot_tokens<Type>;
}

constexpr SparseKernels kernels() {
  SparseKernels row{.codes = {{multiply_codes<2>}, {multiply_codes<3>}, {multiply_codes<4>}},
                    .expand_codes = {expand_codes<2>, expand_codes<3>, expand_codes<4>},
                    .build_products = build_products};
  set_type<ValueType::fp32>(row);
  set_type<ValueType::bf16>(row);
  set_type<ValueType::fp16>(row);
  set_type<ValueType::int8>(row);
  return row;
}

}  // namespace

constinit const SparseKernels kSparseScalar = kernels();

}  // namespace pyllmq::cpu
