// Products of rows with packed bfloat16 weights, at the speed at which the weights can be read.
//
// The packed weight is [panels][K / 2][32][2]: 32 output features side by side, in pairs along the input, so that one
// instruction multiplies a pair of one row with 16 outputs. A panel is read once, from front to back, for up to 14 rows at a
// time; with more rows it stays in the second-level cache between the passes. Sums are float32. Processors with matrix units
// multiply the same panels with those (`matrix.h`).
#pragma once

#include <vector>

#include "vector.h"

namespace specplug {

constexpr int64_t kPanel = 32;
constexpr int64_t kMostRows = 14;      // 2 x 14 accumulators, 2 weight vectors and a broadcast fit 32 registers
constexpr int64_t kRowChunk = 224;     // rows whose inputs stay in the second-level cache while panels pass
constexpr int64_t kDepth = 2048;       // inputs per pass of long rows

inline int64_t panel_elements(int64_t in_features) { return (in_features + 1) / 2 * 2 * kPanel; }

inline void pack_weight(const bf16* weight, int64_t out_features, int64_t in_features, bf16* packed) {
  const int64_t panels = (out_features + kPanel - 1) / kPanel, pairs = (in_features + 1) / 2;
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t n = 0; n < kPanel; ++n)
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t row = panel * kPanel + n, column = pair * 2 + half;
          *packed++ = row < out_features && column < in_features ? weight[row * in_features + column] : bf16{0};
        }
}

// One product of a call: its outputs begin with a panel of all products' panels.
struct Product {
  const bf16* weight;
  const float* bias;
  bf16* out;
  int64_t outs, first_panel;
};

// One panel: its weight, the bias of its outputs or null, and where these go.
struct Panel {
  const bf16* weight;
  const float* bias;
  bf16* out;
  int64_t width, stride;
};

// The panels of several products of the same rows, one after the other.
struct Panels {
  std::vector<Product> products;
  int64_t in_features = 0, count = 0;

  void add(const bf16* weight, const float* bias, bf16* out, int64_t outs) {
    products.push_back({weight, bias, out, outs, count});
    count += (outs + kPanel - 1) / kPanel;
  }
  Panel operator[](int64_t index) const {
    size_t of = products.size() - 1;
    while (products[of].first_panel > index) --of;
    const Product& product = products[of];
    const int64_t own = index - product.first_panel, first = own * kPanel;
    return {product.weight + own * panel_elements(in_features), product.bias ? product.bias + first : nullptr,
            product.out + first, std::min(kPanel, product.outs - first), product.outs};
  }
};

#if SPECPLUG_BF16_DOT

// Sums [rows][32], bias added and rounded, go to the rows of the output from `first_row` on.
inline void store_sums(const float* sums, int64_t rows, const Panel& panel, int64_t first_row) {
  const float* bias = panel.bias;
  for (int64_t row = 0; row < rows; ++row) {
    const float* sum = sums + row * kPanel;
    bf16* to = panel.out + (first_row + row) * panel.stride;
    if (panel.width == kPanel) {
      __m512 low = _mm512_loadu_ps(sum), high = _mm512_loadu_ps(sum + 16);
      if (bias) low = _mm512_add_ps(low, _mm512_loadu_ps(bias)), high = _mm512_add_ps(high, _mm512_loadu_ps(bias + 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), (__m256i)_mm512_cvtneps_pbh(high));
    } else {
      for (int64_t n = 0; n < panel.width; ++n) to[n] = to_bf16(sum[n] + (bias ? bias[n] : 0.0f));
    }
  }
}

// `Rows` rows against pairs [begin, end) of one panel; sums continue in `sums` [rows][32] unless this is the first pass.
template <int Rows>
inline void multiply_block(const bf16* x, int64_t stride, const bf16* panel, int64_t begin, int64_t end, bool first,
                           float* sums) {
  __m512 low[Rows], high[Rows];
#pragma GCC unroll 14
  for (int row = 0; row < Rows; ++row) {
    low[row] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * kPanel);
    high[row] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * kPanel + 16);
  }
  for (int64_t pair = begin; pair < end; ++pair) {
    const bf16* at = panel + pair * 2 * kPanel;
    const __m512i w0 = _mm512_loadu_si512(at), w1 = _mm512_loadu_si512(at + 32);
#pragma GCC unroll 14
    for (int row = 0; row < Rows; ++row) {
      const uint32_t inputs = read_pair(x + row * stride + pair * 2);
      low[row] = dot_pairs(low[row], w0, inputs);
      high[row] = dot_pairs(high[row], w1, inputs);
    }
  }
#pragma GCC unroll 14
  for (int row = 0; row < Rows; ++row) {
    _mm512_storeu_ps(sums + row * kPanel, low[row]);
    _mm512_storeu_ps(sums + row * kPanel + 16, high[row]);
  }
}

using Block = void (*)(const bf16*, int64_t, const bf16*, int64_t, int64_t, bool, float*);
inline Block block_of(int64_t rows) {
  static const Block blocks[] = {multiply_block<1>,  multiply_block<2>,  multiply_block<3>,  multiply_block<4>,
                                 multiply_block<5>,  multiply_block<6>,  multiply_block<7>,  multiply_block<8>,
                                 multiply_block<9>,  multiply_block<10>, multiply_block<11>, multiply_block<12>,
                                 multiply_block<13>, multiply_block<14>};
  return blocks[rows - 1];
}

// Rows [0, rows) of x [rows, in] times one panel; `first_row` is that of the output.
inline void multiply_panel(const bf16* x, int64_t rows, int64_t in_features, const Panel& panel, int64_t first_row) {
  float sums[kRowChunk * kPanel];
  const int64_t pairs = in_features / 2, passes = (rows + kMostRows - 1) / kMostRows;
  for (int64_t begin = 0; begin < pairs || begin == 0; begin += kDepth / 2) {
    const int64_t end = begin + kDepth / 2 < pairs ? begin + kDepth / 2 : pairs;
    int64_t row = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t count = (rows - row + passes - pass - 1) / (passes - pass);
      block_of(count)(x + row * in_features, in_features, panel.weight, begin, end, begin == 0, sums + row * kPanel);
      row += count;
    }
  }
  store_sums(sums, rows, panel, first_row);
}

#endif

}  // namespace specplug
