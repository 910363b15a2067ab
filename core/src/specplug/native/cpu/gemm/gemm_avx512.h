// Matmul with one panel of a packed weight on AVX512-BF16, and its epilogue.
#pragma once

#include "gemm/packed_weight.h"

namespace specplug {

#if SPECPLUG_AVX512_BF16

constexpr int64_t kMostRows = 14;   // 2 x 14 accumulators, 2 weight vectors and a broadcast fit 32 registers
constexpr int64_t kRowChunk = 224;  // rows whose inputs stay in L2 while panels pass

inline int64_t chunk_of(int64_t) { return kRowChunk; }

// Rows in their original layout.
class Inputs {
 public:
  Inputs(const bf16* x, int64_t, int64_t) : at_(x) {}
  const bf16* pass(int64_t row, int64_t in_features) const { return at_ + row * in_features; }

 private:
  const bf16* at_;
};

// A panel's bias, zero-padded to 32 outputs.
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

// Sums of 16 outputs plus bias.
inline __m512 with_bias(const float* sum, const float* bias) {
  return bias ? _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_loadu_ps(bias)) : _mm512_loadu_ps(sum);
}

// Rounds and stores the first `width` of 16 outputs.
inline void store_some(bf16* to, __m512 values, int64_t width) {
  if (width >= 16) return store_rounded(to, values);
  alignas(32) bf16 rounded[16];
  store_rounded(rounded, values);
  std::copy(rounded, rounded + std::max<int64_t>(width, 0), to);
}

// Adds bias, rounds, and stores sums [rows][32] to the output, starting at `first_row`.
inline void store_sums(const float* sums, int64_t rows, const Panel& panel, int64_t first_row) {
  const PanelBias bias(panel);
  for (int64_t row = 0; row < rows; ++row) {
    const float* sum = sums + row * kPanel;
    bf16* to = panel.out + (first_row + row) * panel.stride;
    store_some(to, with_bias(sum, bias.low()), panel.width);
    store_some(to + 16, with_bias(sum + 16, bias.high()), panel.width - 16);
  }
}

// The same for a gate and up panel: one output, at the gate's place.
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

constexpr float kInt8Unit = 1.0f;  // sums of int8 weights are this many times too large

// 16 pairs of weights as bfloat16.
inline __m512i read_pairs(const bf16* at) { return _mm512_loadu_si512(at); }
inline __m512i read_pairs(const int8_t* at) {
  const auto floats = [](const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  };
  return (__m512i)_mm512_cvtne2ps_pbh(floats(at + 16), floats(at));
}

// `Rows` rows times pairs [begin, end) of one panel; accumulates into `sums` [rows][32] unless this is the first pass.
template <int Rows, typename Weight>
inline void multiply_block(const bf16* x, int64_t stride, const Weight* panel, int64_t begin, int64_t end, bool first,
                           float* sums, Prefetch) {
  __m512 low[Rows], high[Rows];
#pragma GCC unroll 14
  for (int row = 0; row < Rows; ++row) {
    low[row] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * kPanel);
    high[row] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * kPanel + 16);
  }
  for (int64_t pair = begin; pair < end; ++pair) {
    const Weight* at = panel + pair * 2 * kPanel;
    const __m512i w0 = read_pairs(at), w1 = read_pairs(at + 32);
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

#endif

}  // namespace specplug
