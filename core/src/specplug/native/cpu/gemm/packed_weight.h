// Packed weights.
//
// Layout: [panels][K / 2][32][2]. A panel holds 32 output features, interleaved in pairs along the input (VNNI), so that one
// instruction multiplies a pair of one row with 16 outputs (AVX-512), or reads the first or second of 8 pairs (AVX2).
//
// A quantised weight has the same layout in int8, and after each panel the float32 scales of its 32 outputs. Integers up to 127 are
// exact in bfloat16 and float32: kernels convert them as they are read, and multiply the finished sums by the scales.
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

// Bytes of an int8 panel and its scales.
inline int64_t int8_panel_bytes(int64_t in_features) {
  return panel_elements(in_features) + kPanel * static_cast<int64_t>(sizeof(float));
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
  const char* weight;
  bool is_int8;
  const float* bias;
  bf16* out;
  int64_t outs, first_panel;
};

// One panel: weight (bfloat16, or int8 with a scale per output), bias of its outputs or null, and output.
struct Panel {
  const bf16* weight;
  const int8_t* quantised;
  const float *scales, *bias;
  bf16* out;
  int64_t width, stride;

  const char* start() const {
    return quantised ? reinterpret_cast<const char*>(quantised) : reinterpret_cast<const char*>(weight);
  }
};

// The panels of several linears over the same rows, in order.
struct Panels {
  std::vector<PackedLinear> linears;
  int64_t in_features = 0, count = 0;
  std::optional<Activation> gate;  // set: two linears of equal size, gate and up

  void add(const char* weight, bool is_int8, const float* bias, bf16* out, int64_t outs) {
    linears.push_back({weight, is_int8, bias, out, outs, count});
    count += (outs + kPanel - 1) / kPanel;
  }
  Panel operator[](int64_t index) const {
    size_t of = linears.size() - 1;
    while (linears[of].first_panel > index) --of;
    const PackedLinear& linear = linears[of];
    const int64_t own = index - linear.first_panel, first = own * kPanel;
    Panel panel{nullptr, nullptr, nullptr, linear.bias ? linear.bias + first : nullptr,
                linear.out + first, std::min(kPanel, linear.outs - first), linear.outs};
    if (linear.is_int8) {
      const char* at = linear.weight + own * int8_panel_bytes(in_features);
      panel.quantised = reinterpret_cast<const int8_t*>(at);
      panel.scales = reinterpret_cast<const float*>(at + panel_elements(in_features));
    } else {
      panel.weight = reinterpret_cast<const bf16*>(linear.weight) + own * panel_elements(in_features);
    }
    return panel;
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
