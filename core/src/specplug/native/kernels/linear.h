// Products of rows with packed bfloat16 weights, at the speed at which the weights can be read.
//
// A panel is read once, from front to back, for as many rows as there are registers for; with more rows it stays in the
// second-level cache between the passes. Sums are float32. Processors with matrix units multiply the same panels with those
// (`matrix.h`).
#pragma once

#include <utility>

#include "narrow.h"
#include "wide.h"

namespace specplug {

#if SPECPLUG_PACKS_BF16

constexpr int64_t kDepth = 2048;  // inputs per pass of long rows

// What a pair's sums become.
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

// `rows` rows times one panel: sums [rows][32]. Where it pays, the next panel is fetched meanwhile.
inline void multiply_panel(const Inputs& x, int64_t rows, int64_t in_features, const bf16* weight, const bf16* next,
                           float* sums) {
  const int64_t pairs = in_features / 2, passes = (rows + kMostRows - 1) / kMostRows;
  for (int64_t begin = 0; begin < pairs || begin == 0; begin += kDepth / 2) {
    const int64_t end = begin + kDepth / 2 < pairs ? begin + kDepth / 2 : pairs;
    Fetching fetching{reinterpret_cast<const char*>(next + begin * 2 * kPanel), 4 * kPanel / passes};
    each_pass(rows, kMostRows, [&](int64_t row, int64_t count) {
      block_of(count)(x.pass(row, in_features), in_features, weight, begin, end, begin == 0, sums + row * kPanel, fetching);
      fetching.at += fetching.step * (end - begin);
    });
  }
}

// Rows [0, rows) of x times units [begin, end); `first_row` is that of the output.
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
