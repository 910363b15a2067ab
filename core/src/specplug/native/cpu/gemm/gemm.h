// Matmul of activation rows with packed bfloat16 weights, at memory bandwidth for few rows.
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

// Epilogue: bias, gate and rounding of a pair of panels.
inline void store_pair(float* sums, float* other_sums, int64_t rows, const Pair& pair, const Panels& panels,
                       int64_t first_row) {
  if (panels.gate) return store_gated(sums, other_sums, rows, pair, *panels.gate, first_row);
  store_sums(sums, rows, pair.one, first_row);
  if (pair.both) store_sums(other_sums, rows, pair.other, first_row);
}

using Block = decltype(&multiply_block<1>);
template <int... Less>
inline Block block_of(int64_t rows, std::integer_sequence<int, Less...>) {
  static const Block blocks[] = {multiply_block<Less + 1>...};
  return blocks[rows - 1];
}
inline Block block_of(int64_t rows) { return block_of(rows, std::make_integer_sequence<int, kMostRows>()); }

// `rows` rows times one panel: sums [rows][32]. Prefetches the next panel where that helps.
inline void multiply_panel(const Inputs& x, int64_t rows, int64_t in_features, const bf16* weight, const bf16* next,
                           float* sums) {
  const int64_t pairs = in_features / 2, passes = (rows + kMostRows - 1) / kMostRows;
  for (int64_t begin = 0; begin < pairs || begin == 0; begin += kDepth / 2) {
    const int64_t end = begin + kDepth / 2 < pairs ? begin + kDepth / 2 : pairs;
    Prefetch prefetch{reinterpret_cast<const char*>(next + begin * 2 * kPanel), 4 * kPanel / passes};
    each_pass(rows, kMostRows, [&](int64_t row, int64_t count) {
      block_of(count)(x.pass(row, in_features), in_features, weight, begin, end, begin == 0, sums + row * kPanel, prefetch);
      prefetch.at += prefetch.step * (end - begin);
    });
  }
}

// Rows [0, rows) of x times units [begin, end); `first_row` is the first output row.
inline void multiply_units(const bf16* x, int64_t rows, const Panels& panels, int64_t begin, int64_t end, int64_t first_row) {
  float sums[2][kRowChunk * kPanel];
  const Inputs inputs(x, rows, panels.in_features);
  for (int64_t unit = begin; unit < end; ++unit) {
    const Pair pair = Pairs(panels, unit, unit + 1)[0];
    const bf16 *one = pair.one.weight, *other = pair.other.weight;
    const bf16* next = unit + 1 < end ? Pairs(panels, unit + 1, unit + 2)[0].one.weight : one;
    multiply_panel(inputs, rows, panels.in_features, one, panels.gate ? other : next, sums[0]);
    if (panels.gate) multiply_panel(inputs, rows, panels.in_features, other, next, sums[1]);
    store_pair(sums[0], sums[1], rows, pair, panels, first_row);
  }
}

#endif

}  // namespace specplug
