// Packed weights.
//
// Layout: [panels][K / 2][32][2]. A panel holds 32 output features, interleaved in pairs along the input (VNNI), so that one
// instruction multiplies a pair of one row with 16 outputs (AVX-512), or reads the first or second of 8 pairs (AVX2).
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "gemm/glu.h"

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

// Bytes to prefetch while multiplying: `step` bytes per pair.
struct Prefetch {
  const char* at;
  int64_t step;

  // Splits the prefetch over two passes through the panel.
  std::pair<Prefetch, Prefetch> halves(int64_t pairs) const { return {{at, step / 2}, {at + step / 2 * pairs, step / 2}}; }
};

// One linear of a call; `first_panel` counts over the panels of all linears.
struct PackedLinear {
  const bf16* weight;
  const float* bias;
  bf16* out;
  int64_t outs, first_panel;
};

// One panel: weight, bias of its outputs or null, and output.
struct Panel {
  const bf16* weight;
  const float* bias;
  bf16* out;
  int64_t width, stride;
};

// The panels of several linears over the same rows, in order.
struct Panels {
  std::vector<PackedLinear> linears;
  int64_t in_features = 0, count = 0;
  std::optional<Activation> gate;  // set: two linears of equal size, gate and up

  void add(const bf16* weight, const float* bias, bf16* out, int64_t outs) {
    linears.push_back({weight, bias, out, outs, count});
    count += (outs + kPanel - 1) / kPanel;
  }
  Panel operator[](int64_t index) const {
    size_t of = linears.size() - 1;
    while (linears[of].first_panel > index) --of;
    const PackedLinear& linear = linears[of];
    const int64_t own = index - linear.first_panel, first = own * kPanel;
    return {linear.weight + own * panel_elements(in_features), linear.bias ? linear.bias + first : nullptr,
            linear.out + first, std::min(kPanel, linear.outs - first), linear.outs};
  }
  // What threads divide: panels, or gate-up pairs.
  int64_t units() const { return gate ? count / 2 : count; }
};

// Two panels multiplied together; if there is no second, the first stands in.
struct Pair {
  Panel one, other;
  bool both;
};

// Units [begin, end) as pairs: gate and up, or two panels that are far apart in memory.
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
