// y[M,N] = x[M,K] @ W^T + bias for the sparse formats (layout.h draws the cells).
//
//  * few tokens   the packed weight is read once: a column (or pair) of 16 rows is expanded in registers and multiplied
//                 by the broadcast x of all tokens. 2:4 expands nothing: the positions of a group pick from its four x
//                 by an in-lane permute. Codes are looked up in tables of partial products x_k * C_k[c] of the group: in
//                 fp32, or (AVX2, NEON) by byte shuffles in fixed point cut into planes, as codebook/cpu/linear.h describes them.
//  * more tokens  32 rows x 256 columns are expanded into the L1 cache once and multiplied by all tokens, with the
//                 register-blocked product of codebook/cpu/decode.h; bf16 x and values of at most 8 bits significand
//                 (bf16, int8) by AMX tiles, whose products are exact as well.
//
// Nothing is rounded but the sums, which are fp32, and the fixed point, whose width is what a caller's precision permits.
#pragma once
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "codebook/cpu/linear.h"
#include "codebook/cpu/decode.h"
#include "runtime/half.h"
#include "sparse/cpu/layout.h"

namespace pyllmq::cpu {

constexpr int64_t kMostFewTokens = 8;

// x of the tokens of one block, padded with zeros, in the order that a kind's kernels read:
//   bitmap     [slot, token]
//   sparse24   [group of four, token, 4]
//   codes      [group of four, token, 4 << bits]: the partial products
struct CellWork {
  const uint8_t* cell;
  StepOrder order;  // of codes
  int64_t slots;
  const float* x;
  float* sums;  // [token, kTileRows]; of the cell's half
};

// Codes in tables of fixed point.
struct CodeWork {
  const uint8_t* cell;
  int64_t slots;
  const TokenTables* tokens;  // y: of the cell's half
  int64_t count;
};

static inline float value_at(ValueType type, const uint8_t* values, int64_t i) {
  if (type == ValueType::fp32) return reinterpret_cast<const float*>(values)[i];
  if (type == ValueType::int8) return reinterpret_cast<const int8_t*>(values)[i];
  const uint16_t half = reinterpret_cast<const uint16_t*>(values)[i];
  if (type == ValueType::bf16) return bf16_to_fp32(half);
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  return fp16_to_fp32(half);
#endif
}

// One row per TableKind.
struct CodeTableKernels {
  // Tables of a block and one token, code_table_bytes; false where x or its range leaves the fixed point.
  bool (*build)(int bits, const uint16_t* codebook, const float* x, int64_t slots, uint8_t* tables, float* unit);
  void (*lookup[3])(const CodeWork& work);  // [bits - 2]
};
static constexpr int64_t code_table_bytes(TableKind kind, int64_t bits) {
  return kCellColumns / 4 * (bits == 4 ? 5 : bits - 1) * table_planes(kind) * kTableEntries;
}

// One row per ISA.
struct SparseKernels {
  int64_t few_tokens = 1, few_code_tokens = 1;    // at most so many share a pass
  const CodeTableKernels* code_tables = nullptr;  // [TableKind]; null: `codes` looks up products in fp32
  // Index [tokens - 1]; null: not instantiated.
  using Multiply = void (*)(const CellWork& work);
  Multiply bitmap[4][kMostFewTokens] = {};    // [ValueType]
  Multiply sparse24[4][kMostFewTokens] = {};  // [ValueType]
  Multiply codes[3][kMostFewTokens] = {};     // [bits - 2]; where there are code_tables, null
  // Weights [slots, 16] in fp32.
  void (*expand_bitmap[4])(const uint8_t* cell, int64_t slots, float* weights) = {};
  void (*expand_24[4])(const uint8_t* cell, int64_t slots, float* weights) = {};
  // Index [bits - 2]; codebook fp16 of the cell's first column on.
  void (*expand_codes[3])(const uint8_t* cell, StepOrder order, int64_t slots, const uint16_t* codebook, float* weights);
  // products[4 << bits] of a group; where there are code_tables, null.
  void (*build_products)(const uint16_t* codebook, int bits, const float* x, float* products) = nullptr;
  // Sum over the kept weights of one row, by ValueType; columns uint16 or uint32.
  float (*dot_columns[4])(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x) = {};
  // The same for kTokensSideBySide tokens at once: x [columns, kTokensSideBySide], sums [kTokensSideBySide].
  void (*dot_tokens[4])(const uint8_t* values, const uint8_t* columns, int column_bytes, int64_t count, const float* x,
                        float* sums) = {};
};

extern const SparseKernels kSparseScalar;  // reads codes in both orders
extern const SparseKernels kSparseAvx2;    // rows
extern const SparseKernels kSparseAvx512;  // fours
extern const SparseKernels kSparseNeon;    // rows
extern const CodeTableKernels kCodeTablesAvx2[kTableKinds];
extern const CodeTableKernels kCodeTablesNeon[kTableKinds];

// AMX: fp32 weights that are exact in bf16 [slots, 16] -> bf16 pairs [slots / 2, 16, 2]; x bf16 [tokens, stride] ->
// [group of 16 tokens, slots / 32, 16, 32]; sums [tokens filled up to 16, kTileRows] += both halves.
struct BFloat16Tiles {
  void (*pack_weights)(const float* weights, int64_t slots, uint16_t* pairs);
  // Of bf16 values: pairs as they are.
  void (*expand_bitmap)(const uint8_t* cell, int64_t slots, uint16_t* pairs);
  void (*expand_24)(const uint8_t* cell, int64_t slots, uint16_t* pairs);
  int64_t (*packed_bytes)(int64_t tokens);  // of a block
  void (*pack_x)(const uint16_t* x, int64_t stride, int64_t tokens, int64_t columns, int64_t slots, uint16_t* packed);
  void (*multiply)(const uint16_t* pairs, const uint16_t* packed, int64_t slots, int64_t tokens, float* sums);
  void (*begin_chunk)();
  void (*end_chunk)();
};

extern const BFloat16Tiles kBFloat16TilesAmx;

// x and y [tokens, columns] and [tokens, rows], both of x_dtype; bias [rows] or null; tokens > 0.
void sparse_linear(const SparseView& view, const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype,
                   void* y, Precision precision);

// W [rows, columns] in `dtype`.
void sparse_dequantize(const SparseView& view, void* out, DType dtype);

}  // namespace pyllmq::cpu
