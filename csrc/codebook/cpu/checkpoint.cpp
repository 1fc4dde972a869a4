#include "codebook/cpu/checkpoint.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "codebook/cpu/pack_codes.h"
#include "runtime/thread_pool.h"

namespace pyllmq::cpu {
namespace {

// ---- words ------------------------------------------------------------------------------------------------------

constexpr int64_t kTaskColumns = 64;  // a multiple of 8: its codes begin on a byte whatever their width

// Columns of one width that one task takes, and where they lie.
struct Task {
  int bits;
  int64_t first;  // their place among the columns of that width, a multiple of kTaskColumns
  std::vector<int32_t> column;
  std::vector<int32_t> entry;  // of the column's first centroid within a segment's codebook
};

struct Tasks {
  std::vector<Task> tasks;
  int64_t width_columns[9] = {};
  int64_t entries = 0;
};

// ---- loads ------------------------------------------------------------------------------------------------------

Tasks split(const CodebookCheckpoint& t) {
  Tasks found;
  int64_t open[9];
  std::fill(open, open + 9, -1);
  for (int64_t column = 0; column < t.columns; ++column) {
    const int bits = t.column_bits[column];
    if (bits < 1 || bits > 8 || !t.codes[bits])
      throw std::invalid_argument("column " + std::to_string(column) + " has " + std::to_string(bits) +
                                  " bits; allowed: 1..8, with codes of that width given");
    const int64_t place = found.width_columns[bits]++;
    if (place % kTaskColumns == 0) {
      open[bits] = static_cast<int64_t>(found.tasks.size());
      found.tasks.push_back({bits, place, {}, {}});
    }
    Task& task = found.tasks[open[bits]];
    task.column.push_back(static_cast<int32_t>(column));
    task.entry.push_back(static_cast<int32_t>(found.entries));
    found.entries += int64_t{1} << bits;
  }
  return found;
}

// ---- compute ----------------------------------------------------------------------------------------------------

// body(task, segment, row, codes) for every row, in order, the segments one after the other.
template <class Body>
void for_each_row(const CodebookCheckpoint& t, const Tasks& all, const Task& task, Body&& body) {
  const int64_t row_bytes = packed_row_bytes(all.width_columns[task.bits], task.bits);
  const uint8_t* packed = t.codes[task.bits] + task.first * task.bits / 8;
  uint8_t codes[kTaskColumns];
  int64_t row = 0;
  for (int64_t segment = 0; segment < t.segments; ++segment) {
    for (const int64_t end = row + t.segment_rows[segment]; row < end; ++row) {
      unpack_row(packed + row * row_bytes, codes, static_cast<int64_t>(task.column.size()), task.bits);
      body(segment, row, codes);
    }
  }
}

template <class Body>
void for_each_task(const CodebookCheckpoint& t, const Tasks& all, Body&& body) {
  const double cost_ns = 1.0 * static_cast<double>(t.rows) * static_cast<double>(t.columns);
  parallel_for(static_cast<int64_t>(all.tasks.size()), 1, cost_ns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(all.tasks[i]);
  });
}

}  // namespace

// ---- entry --------------------------------------------------------------------------------------------------------

void codebook_decode(const CodebookCheckpoint& t, const float* row_scale, const float* codebook, float* weight) {
  const Tasks all = split(t);
  for_each_task(t, all, [&](const Task& task) {
    const int64_t count = static_cast<int64_t>(task.column.size());
    for_each_row(t, all, task, [&](int64_t segment, int64_t row, const uint8_t* codes) {
      const float* book = codebook + segment * all.entries;
      const float scale = row_scale ? row_scale[row] : 1.0f;
      float* out = weight + row * t.columns;
      for (int64_t i = 0; i < count; ++i) out[task.column[i]] = scale * book[task.entry[i] + codes[i]];
    });
  });
}

void codebook_gradient(const CodebookCheckpoint& t, const float* row_scale, const float* weight_gradient, float* gradient) {
  const Tasks all = split(t);
  for_each_task(t, all, [&](const Task& task) {
    const int64_t count = static_cast<int64_t>(task.column.size());
    const int64_t size = int64_t{1} << task.bits;
    std::vector<double> sums(t.segments * count * size, 0.0);
    for_each_row(t, all, task, [&](int64_t segment, int64_t row, const uint8_t* codes) {
      double* of_segment = sums.data() + segment * count * size;
      const double scale = row_scale ? row_scale[row] : 1.0;
      const float* in = weight_gradient + row * t.columns;
      for (int64_t i = 0; i < count; ++i) of_segment[i * size + codes[i]] += scale * in[task.column[i]];
    });
    for (int64_t segment = 0; segment < t.segments; ++segment) {
      for (int64_t i = 0; i < count; ++i) {
        const double* from = sums.data() + (segment * count + i) * size;
        float* to = gradient + segment * all.entries + task.entry[i];
        std::transform(from, from + size, to, [](double sum) { return static_cast<float>(sum); });
      }
    }
  });
}

}  // namespace pyllmq::cpu
