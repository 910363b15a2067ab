// The same with vectors of 256 bits, which know no bfloat16: the numbers of a pair become floats, one after the other.
//
// Every output has one accumulator, which takes its products in the order of the inputs, for any number of rows: a row comes
// out the same to the bit, alone or among others.
#pragma once

#include "panels.h"

namespace specplug {

#if SPECPLUG_FLOAT_PAIRS

constexpr int64_t kMostRows = 6;     // 2 x 6 accumulators, 2 weight vectors and a broadcast fit 16 registers
constexpr int kRowsOfWhole = 3;      // up to which a panel's 32 outputs are taken together
constexpr int64_t kPairsAhead = 16;  // of a panel, whose lines are fetched before they are read

// The first, and the second, numbers of 8 pairs.
inline __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// `Vectors` x 8 outputs, from the panel's output `from` on.
template <int Rows, int Vectors>
inline void multiply_part(const bf16* x, int64_t stride, const bf16* panel, int64_t begin, int64_t end, bool first,
                          float* sums, int64_t from) {
  __m256 sum[Rows][Vectors];
#pragma GCC unroll 6
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      sum[row][v] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + row * kPanel + from + 8 * v);
  for (int64_t pair = begin; pair < end; ++pair) {
    const bf16* at = panel + pair * 2 * kPanel;
    _mm_prefetch(reinterpret_cast<const char*>(at + kPairsAhead * 2 * kPanel), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(at + kPairsAhead * 2 * kPanel + 32), _MM_HINT_T0);
    const __m256i* line = reinterpret_cast<const __m256i*>(at + 2 * from);
    const auto add = [&](auto half) __attribute__((always_inline)) {
      __m256 weight[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) weight[v] = half(_mm256_loadu_si256(line + v));
#pragma GCC unroll 6
      for (int row = 0; row < Rows; ++row) {
        const __m256 input = half(_mm256_set1_epi32(static_cast<int>(read_pair(x + row * stride + pair * 2))));
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[row][v] = _mm256_fmadd_ps(weight[v], input, sum[row][v]);
      }
    };
    add([](__m256i pairs) { return first_of(pairs); });
    add([](__m256i pairs) { return second_of(pairs); });
  }
#pragma GCC unroll 6
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) _mm256_storeu_ps(sums + row * kPanel + from + 8 * v, sum[row][v]);
}

// `Rows` rows against pairs [begin, end) of one panel; sums continue in `sums` [rows][32] unless this is the first pass.
template <int Rows>
inline void multiply_block(const bf16* x, int64_t stride, const bf16* panel, int64_t begin, int64_t end, bool first,
                           float* sums) {
  if constexpr (Rows <= kRowsOfWhole) return multiply_part<Rows, 4>(x, stride, panel, begin, end, first, sums, 0);
  multiply_part<Rows, 2>(x, stride, panel, begin, end, first, sums, 0);
  multiply_part<Rows, 2>(x, stride, panel, begin, end, first, sums, 16);
}

// Adds a panel's bias to sums [rows][32].
inline void add_bias(float* sums, int64_t rows, const Panel& panel) {
  if (!panel.bias) return;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < panel.width; ++n) sums[row * kPanel + n] += panel.bias[n];
}

// Sums [rows][32], bias added and rounded, go to the rows of the output from `first_row` on.
inline void store_sums(float* sums, int64_t rows, const Panel& panel, int64_t first_row) {
  add_bias(sums, rows, panel);
  for (int64_t row = 0; row < rows; ++row) {
    bf16 rounded[kPanel];
    for (int64_t n = 0; n < kPanel; ++n) rounded[n] = to_bf16(sums[row * kPanel + n]);
    std::copy(rounded, rounded + panel.width, panel.out + (first_row + row) * panel.stride);
  }
}

template <Activation kind>
inline void activate_rows(float* gates, const float* sums, int64_t rows) {
  for (int64_t at = 0; at < rows * kPanel; ++at) gates[at] = activate<kind>(gates[at]) * sums[at];
}

// The same for a gate and its panel: one output, where the gate's lies.
inline void store_gated(float* gates, float* sums, int64_t rows, const Pair& pair, Activation activation, int64_t first_row) {
  add_bias(gates, rows, pair.one);
  add_bias(sums, rows, pair.other);
  if (activation == Activation::kSilu) activate_rows<Activation::kSilu>(gates, sums, rows);
  else activate_rows<Activation::kGeluTanh>(gates, sums, rows);
  Panel out = pair.one;
  out.bias = nullptr;
  store_sums(gates, rows, out, first_row);
}

#endif

}  // namespace specplug
