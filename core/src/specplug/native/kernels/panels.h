// Weights in panels, and what products of rows with them are made of.
//
// A packed weight is [panels][K / 2][32][2]: 32 output features side by side, in pairs along the input, so that one
// instruction multiplies a pair of one row with 16 outputs, or takes the first or second of 8 pairs for itself.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "gate.h"

namespace specplug {

constexpr int64_t kPanel = 32;

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

// Bytes that are fetched while others are multiplied, so many with every pair.
struct Fetching {
  const char* at;
  int64_t step;

  // The same, in twice as many pairs: those of the first time through the panel, and of the second.
  std::pair<Fetching, Fetching> halves(int64_t pairs) const { return {{at, step / 2}, {at + step / 2 * pairs, step / 2}}; }
};

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

}  // namespace specplug
