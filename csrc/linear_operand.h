// A packed weight of any format, bound once: its layout was checked when the object was made, so that a call checks its own
// arguments only. The object does not own the layout: whoever makes it keeps that memory alive and in its place.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "runtime/half.h"
#include "runtime/trace.h"

namespace pyllmq::cpu {

// What a caller permits; a kernel may be more exact.
enum class Precision { exact = 0, high = 1, fast = 2 };

class LinearOperand {
 public:
  virtual ~LinearOperand() = default;
  LinearOperand(const LinearOperand&) = delete;
  LinearOperand& operator=(const LinearOperand&) = delete;

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  // False where the memory holds another layout than the one that was checked.
  bool is_intact() const { return *checksum_ == checked_; }

  // Are its bytes in the order that the kernels of the active instruction set read? Scalar code reads any, 30 times as slowly.
  virtual bool is_native() const { return true; }

  // y [tokens, rows] = x [tokens, columns] @ W^T + bias [rows]; x and y of x_dtype, bias may be null.
  void linear(const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype, void* y,
              Precision precision) const {
    const Traced traced(Part::linear);
    if (may_run(x, tokens, y)) run(x, x_dtype, tokens, bias, bias_dtype, y, precision);
  }

 protected:
  // checksum: that of the layout's header, in place.
  LinearOperand(int64_t rows, int64_t columns, const uint64_t& checksum)
      : rows_(rows), columns_(columns), checksum_(&checksum), checked_(checksum) {}

  void require_intact() const {
    if (!is_intact()) throw std::invalid_argument("the layout was overwritten after it was bound; bind it again");
  }
  // False where there is nothing to do; throws where a pointer is missing or the layout has changed.
  bool may_run(const void* x, int64_t tokens, const void* y) const {
    if (tokens < 0) throw std::invalid_argument("tokens = " + std::to_string(tokens) + "; must be >= 0");
    if (tokens == 0) return false;
    if (x == nullptr || y == nullptr) throw std::invalid_argument("x and y must not be null when there are tokens");
    require_intact();
    return true;
  }
  // Of checked arguments and at least one token.
  virtual void run(const void* x, DType x_dtype, int64_t tokens, const void* bias, DType bias_dtype, void* y,
                   Precision precision) const = 0;

 private:
  const int64_t rows_, columns_;
  const uint64_t* const checksum_;
  const uint64_t checked_;
};

}  // namespace pyllmq::cpu
