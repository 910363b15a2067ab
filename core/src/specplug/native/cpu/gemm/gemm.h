// Matmul of activation rows with packed weights (bfloat16 or int8), at memory bandwidth for few rows.
//
// A panel is read once, sequentially, for as many rows as there are registers; with more rows it stays in L2 between passes. Sums
// are float32. CPUs with AMX use the same packed weights (`gemm_amx.h`).
#pragma once

#include <utility>

#include "gemm/gemm_avx2.h"
#include "gemm/gemm_avx512.h"

namespace specplug {

#if SPECPLUG_PACKS_BF16

constexpr int64_t kDepth = 2048;  // inputs per pass of long rows

// Multiplies the sums [rows][32] of int8 weights by their scales.
inline void apply_scales(float* sums, int64_t rows, const Panel& panel) {
  if (!panel.scales) return;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < kPanel; ++n) sums[row * kPanel + n] *= panel.scales[n] * (1 / kInt8Unit);
}

// Epilogue: scales, bias, gate and rounding of a pair of panels.
inline void store_pair(float* sums, float* other_sums, int64_t rows, const Pair& pair, const Panels& panels,
                       int64_t first_row) {
  apply_scales(sums, rows, pair.one);
  if (panels.gate || pair.both) apply_scales(other_sums, rows, pair.other);
  if (panels.gate) return store_gated(sums, other_sums, rows, pair, *panels.gate, first_row);
  store_sums(sums, rows, pair.one, first_row);
  if (pair.both) store_sums(other_sums, rows, pair.other, first_row);
}

template <typename Weight>
using Block = decltype(&multiply_block<1, Weight>);
template <typename Weight, int... Less>
inline Block<Weight> block_of(int64_t rows, std::integer_sequence<int, Less...>) {
  static const Block<Weight> blocks[] = {multiply_block<Less + 1, Weight>...};
  return blocks[rows - 1];
}
template <typename Weight>
inline Block<Weight> block_of(int64_t rows) {
  return block_of<Weight>(rows, std::make_integer_sequence<int, kMostRows>());
}

// `rows` rows times one panel: sums [rows][32]. Prefetches the next panel where that helps.
template <typename Weight>
inline void multiply_panel(const Inputs& x, int64_t rows, int64_t in_features, const Weight* weight, const char* next,
                           float* sums) {
  const int64_t pairs = in_features / 2, passes = (rows + kMostRows - 1) / kMostRows;
  for (int64_t begin = 0; begin < pairs || begin == 0; begin += kDepth / 2) {
    const int64_t end = begin + kDepth / 2 < pairs ? begin + kDepth / 2 : pairs;
    const int64_t bytes = 2 * kPanel * static_cast<int64_t>(sizeof(Weight));  // per pair
    Prefetch prefetch{next + begin * bytes, bytes / passes};
    each_pass(rows, kMostRows, [&](int64_t row, int64_t count) {
      block_of<Weight>(count)(x.pass(row, in_features), in_features, weight, begin, end, begin == 0, sums + row * kPanel, prefetch);
      prefetch.at += prefetch.step * (end - begin);
    });
  }
}

inline void multiply_panel(const Inputs& x, int64_t rows, int64_t in_features, const Panel& panel, const char* next,
                           float* sums) {
  if (panel.quantised) return multiply_panel(x, rows, in_features, panel.quantised, next, sums);
  multiply_panel(x, rows, in_features, panel.weight, next, sums);
}

// Rows [0, rows) of x times units [begin, end); `first_row` is the first output row.
inline void multiply_units(const bf16* x, int64_t rows, const Panels& panels, int64_t begin, int64_t end, int64_t first_row) {
  float sums[2][kRowChunk * kPanel];
  const Inputs inputs(x, rows, panels.in_features);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Pair pair = Pairs(panels, unit, unit + 1)[0];
    const Panel &one = pair.one, &other = pair.other;
    const char* next = unit + 1 < end ? Pairs(panels, unit + 1, unit + 2)[0].one.start() : one.start();
    multiply_panel(inputs, rows, panels.in_features, one, panels.gate ? other.start() : next, sums[0]);
    if (panels.gate) multiply_panel(inputs, rows, panels.in_features, other, next, sums[1]);
    store_pair(sums[0], sums[1], rows, pair, panels, first_row);
  }
}

#endif

}  // namespace specplug
