// Matmul with packed weights on AVX2, which has no bfloat16 instructions: rows are converted to float32 once, weights as they are read.
//
// Each output has one accumulator that adds its terms in input order for any number of rows, so a row alone and in a batch gives
// bit-equal results.
#pragma once

#include <vector>

#include "gemm/packed_weight.h"

namespace specplug {

#if SPECPLUG_AVX2

constexpr int64_t kMostRows = 6;     // 2 x 6 accumulators, 2 weight vectors and a broadcast fit 16 registers
constexpr int kRowsOfWhole = 3;      // up to here all 32 outputs of a panel are computed together
constexpr int64_t kRowChunk = 120;   // most rows converted to float32 at once
constexpr int64_t kChunkBytes = 1 << 20;

// Rows converted at once: as many as stay in cache while panels pass.
inline int64_t chunk_of(int64_t in_features) {
  const int64_t rows = kChunkBytes / (in_features * static_cast<int64_t>(sizeof(float)));
  return std::clamp(rows / kMostRows * kMostRows, 2 * kMostRows, kRowChunk);
}

// Rows as float32; the rows of one pass are interleaved: [inputs][rows].
class Inputs {
 public:
  Inputs(const bf16* x, int64_t rows, int64_t in_features) {
    thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < rows * in_features) memory.resize(rows * in_features);
    at_ = memory.data();
    each_pass(rows, kMostRows, [&](int64_t row, int64_t count) {
      float* to = memory.data() + row * in_features;
      for (int64_t each = 0; each < count; ++each)
        for (int64_t input = 0; input < in_features; ++input)
          to[input * count + each] = to_float(x[(row + each) * in_features + input]);
    });
  }
  const float* pass(int64_t row, int64_t in_features) const { return at_ + row * in_features; }

 private:
  const float* at_;
};

// 8 pairs of weights: bits of bfloat16, or 16-bit integers.
inline __m256i read_pairs(const bf16* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
inline __m256i read_pairs(const int8_t* at) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// Their first, and their second, elements. Integers stay in the upper half of a lane, which saves a shift: sums are `kInt8Unit` times
// too large.
constexpr float kInt8Unit = 65536.0f;
inline __m256 first_weights(const bf16*, __m256i pairs) { return first_of(pairs); }
inline __m256 second_weights(const bf16*, __m256i pairs) { return second_of(pairs); }
inline __m256 first_weights(const int8_t*, __m256i pairs) { return _mm256_cvtepi32_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_weights(const int8_t*, __m256i pairs) {
  return _mm256_cvtepi32_ps(_mm256_castps_si256(second_of(pairs)));
}

// `Vectors` x 8 outputs starting at output `from` of the panel. Prefetches the next panel meanwhile.
template <int Rows, int Vectors, typename Weight>
inline void multiply_part(const float* x, const Weight* panel, int64_t begin, int64_t end, bool first, float* sums,
                          int64_t from, Prefetch prefetch) {
  __m256 sum[Rows][Vectors];
#pragma GCC unroll 6
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      sum[row][v] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + row * kPanel + from + 8 * v);
  for (int64_t pair = begin; pair < end; ++pair) {
    const Weight* at = panel + pair * 2 * kPanel + 2 * from;
    _mm_prefetch(prefetch.at, _MM_HINT_T1);
    if constexpr (Vectors == 4 && sizeof(Weight) == 2) _mm_prefetch(prefetch.at + 64, _MM_HINT_T1);
    prefetch.at += prefetch.step;
    const auto add = [&](auto half, const float* inputs) __attribute__((always_inline)) {
      __m256 weight[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) weight[v] = half(at, read_pairs(at + 16 * v));
#pragma GCC unroll 6
      for (int row = 0; row < Rows; ++row) {
        const __m256 input = _mm256_broadcast_ss(inputs + row);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[row][v] = _mm256_fmadd_ps(weight[v], input, sum[row][v]);
      }
    };
    add([](const Weight* type, __m256i pairs) { return first_weights(type, pairs); }, x + 2 * pair * Rows);
    add([](const Weight* type, __m256i pairs) { return second_weights(type, pairs); }, x + (2 * pair + 1) * Rows);
  }
#pragma GCC unroll 6
  for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) _mm256_storeu_ps(sums + row * kPanel + from + 8 * v, sum[row][v]);
}

// `Rows` rows times pairs [begin, end) of one panel; accumulates into `sums` [rows][32] unless this is the first pass.
template <int Rows, typename Weight>
inline void multiply_block(const float* x, int64_t, const Weight* panel, int64_t begin, int64_t end, bool first, float* sums,
                           Prefetch prefetch) {
  if constexpr (Rows <= kRowsOfWhole) return multiply_part<Rows, 4>(x, panel, begin, end, first, sums, 0, prefetch);
  const auto [low, high] = prefetch.halves(end - begin);
  multiply_part<Rows, 2>(x, panel, begin, end, first, sums, 0, low);
  multiply_part<Rows, 2>(x, panel, begin, end, first, sums, 16, high);
}

// Adds a panel's bias to sums [rows][32].
inline void add_bias(float* sums, int64_t rows, const Panel& panel) {
  if (!panel.bias) return;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t n = 0; n < panel.width; ++n) sums[row * kPanel + n] += panel.bias[n];
}

// Adds bias, rounds, and stores sums [rows][32] to the output, starting at `first_row`.
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

// The same for a gate and up panel: one output, at the gate's place.
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
