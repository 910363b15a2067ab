// Products of rows with packed bfloat16 weights, at the speed at which the weights can be read.
//
// The packed weight is [panels][K / 2][32][2]: 32 output features side by side, in pairs along the input, so that one
// instruction multiplies a pair of one row with 16 outputs. A panel is read once, from front to back, for up to 14 rows at a
// time; with more rows it stays in the second-level cache between the passes. Sums are float32. Processors with matrix units
// multiply the same panels with those (`matrix.h`).
#pragma once

#include <optional>
#include <vector>

#include "gate.h"

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
  std::optional<Activation> gate;  // if so: of two products of one size, of which the first is the other's gate

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
  // What threads divide: panels, or gates with what they are the gates of.
  int64_t units() const { return gate ? count / 2 : count; }
};

// Two panels that are multiplied side by side; without the second, the first stands in for it.
struct Pair {
  Panel one, other;
  bool both;
};

// Units [begin, end) as pairs: a gate and its panel, or two panels that lie far apart.
class Pairs {
 public:
  Pairs(const Panels& panels, int64_t begin, int64_t end)
      : panels_(panels), begin_(begin), end_(end), apart_(panels.gate ? panels.units() : (end - begin + 1) / 2) {}

  int64_t count() const { return panels_.gate ? end_ - begin_ : apart_; }
  Pair operator[](int64_t index) const {
    const int64_t one = begin_ + index, other = one + apart_;
    const bool both = panels_.gate || other < end_;
    return {panels_[one], panels_[both ? other : one], both};
  }

 private:
  const Panels& panels_;
  int64_t begin_, end_, apart_;
};

#if SPECPLUG_BF16_DOT

// A panel's bias in full width: behind its last output lie zeros.
class PanelBias {
 public:
  explicit PanelBias(const Panel& panel) : given_(panel.bias) {
    if (!given_ || panel.width == kPanel) return;
    std::copy(panel.bias, panel.bias + panel.width, padded_);
    given_ = padded_;
  }
  PanelBias(const PanelBias&) = delete;
  PanelBias& operator=(const PanelBias&) = delete;
  const float* low() const { return given_; }
  const float* high() const { return given_ ? given_ + 16 : nullptr; }

 private:
  float padded_[kPanel] = {};
  const float* given_;
};

// The sums of 16 outputs, with their bias.
inline __m512 with_bias(const float* sum, const float* bias) {
  return bias ? _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_loadu_ps(bias)) : _mm512_loadu_ps(sum);
}

// The first `width` of 16 outputs, rounded.
inline void store_some(bf16* to, __m512 values, int64_t width) {
  if (width >= 16) return store_rounded(to, values);
  alignas(32) bf16 rounded[16];
  store_rounded(rounded, values);
  std::copy(rounded, rounded + std::max<int64_t>(width, 0), to);
}

// Sums [rows][32], bias added and rounded, go to the rows of the output from `first_row` on.
inline void store_sums(const float* sums, int64_t rows, const Panel& panel, int64_t first_row) {
  const PanelBias bias(panel);
  for (int64_t row = 0; row < rows; ++row) {
    const float* sum = sums + row * kPanel;
    bf16* to = panel.out + (first_row + row) * panel.stride;
    store_some(to, with_bias(sum, bias.low()), panel.width);
    store_some(to + 16, with_bias(sum + 16, bias.high()), panel.width - 16);
  }
}

// The same for a gate and its panel: one output, where the gate's lies.
inline void store_gated(const float* gates, const float* sums, int64_t rows, const Pair& pair, Activation activation,
                        int64_t first_row) {
  const PanelBias gate(pair.one), bias(pair.other);
  for (int64_t row = 0; row < rows; ++row) {
    const float *of_gate = gates + row * kPanel, *sum = sums + row * kPanel;
    bf16* to = pair.one.out + (first_row + row) * pair.one.stride;
    const __m512 low = activate(with_bias(of_gate, gate.low()), activation);
    const __m512 high = activate(with_bias(of_gate + 16, gate.high()), activation);
    store_some(to, _mm512_mul_ps(low, with_bias(sum, bias.low())), pair.one.width);
    store_some(to + 16, _mm512_mul_ps(high, with_bias(sum + 16, bias.high())), pair.one.width - 16);
  }
}

// What a pair's sums become.
inline void store_pair(const float* sums, const float* other_sums, int64_t rows, const Pair& pair, const Panels& panels,
                       int64_t first_row) {
  if (panels.gate) return store_gated(sums, other_sums, rows, pair, *panels.gate, first_row);
  store_sums(sums, rows, pair.one, first_row);
  if (pair.both) store_sums(other_sums, rows, pair.other, first_row);
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

// Rows [0, rows) of x [rows, in] times one panel: sums [rows][32].
inline void multiply_panel(const bf16* x, int64_t rows, int64_t in_features, const bf16* weight, float* sums) {
  const int64_t pairs = in_features / 2, passes = (rows + kMostRows - 1) / kMostRows;
  for (int64_t begin = 0; begin < pairs || begin == 0; begin += kDepth / 2) {
    const int64_t end = begin + kDepth / 2 < pairs ? begin + kDepth / 2 : pairs;
    int64_t row = 0;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t count = (rows - row + passes - pass - 1) / (passes - pass);
      block_of(count)(x + row * in_features, in_features, weight, begin, end, begin == 0, sums + row * kPanel);
      row += count;
    }
  }
}

// Rows [0, rows) of x times units [begin, end); `first_row` is that of the output.
inline void multiply_units(const bf16* x, int64_t rows, const Panels& panels, int64_t begin, int64_t end, int64_t first_row) {
  float sums[2][kRowChunk * kPanel];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Pair pair = Pairs(panels, unit, unit + 1)[0];
    multiply_panel(x, rows, panels.in_features, pair.one.weight, sums[0]);
    if (panels.gate) multiply_panel(x, rows, panels.in_features, pair.other.weight, sums[1]);
    store_pair(sums[0], sums[1], rows, pair, panels, first_row);
  }
}

#endif

}  // namespace specplug
