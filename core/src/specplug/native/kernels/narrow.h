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
    __m256 weight[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) weight[v] = first_of(_mm256_loadu_si256(line + v));
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
      const __m256 input = first_of(_mm256_set1_epi32(static_cast<int>(read_pair(x + row * stride + pair * 2))));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[row][v] = _mm256_fmadd_ps(weight[v], input, sum[row][v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) weight[v] = second_of(_mm256_loadu_si256(line + v));
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
      const __m256 input = second_of(_mm256_set1_epi32(static_cast<int>(read_pair(x + row * stride + pair * 2))));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[row][v] = _mm256_fmadd_ps(weight[v], input, sum[row][v]);
    }
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

// Sums [rows][32], bias added and rounded, go to the rows of the output from `first_row` on.
inline void store_sums(const float* sums, int64_t rows, const Panel& panel, int64_t first_row) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* sum = sums + row * kPanel;
    bf16* to = panel.out + (first_row + row) * panel.stride;
    for (int64_t n = 0; n < panel.width; ++n) to[n] = to_bf16(panel.bias ? sum[n] + panel.bias[n] : sum[n]);
  }
}

// The same for a gate and its panel: one output, where the gate's lies.
inline void store_gated(const float* gates, const float* sums, int64_t rows, const Pair& pair, Activation activation,
                        int64_t first_row) {
  const float *gate_bias = pair.one.bias, *bias = pair.other.bias;
  for (int64_t row = 0; row < rows; ++row) {
    const float *of_gate = gates + row * kPanel, *sum = sums + row * kPanel;
    bf16* to = pair.one.out + (first_row + row) * pair.one.stride;
    for (int64_t n = 0; n < pair.one.width; ++n) {
      const float gate = activate(gate_bias ? of_gate[n] + gate_bias[n] : of_gate[n], activation);
      to[n] = to_bf16(gate * (bias ? sum[n] + bias[n] : sum[n]));
    }
  }
}

#endif

}  // namespace specplug
