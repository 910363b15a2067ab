// Online softmax of one query over tiles of keys, in base 2.
#pragma once

#include <limits>
#include <numeric>

#include "common/simd.h"

namespace specplug {

constexpr float kMasked = -std::numeric_limits<float>::infinity();  // score of a masked key

// Replaces the scores of `width` keys (a multiple of 16) by weights relative to the highest score so far. `factor` converts scores to
// base-2 exponents. `highest` (such an exponent) and `total` (the sum of weights) carry over between tiles. Returns the factor by
// which earlier sums are rescaled.
inline float softmax_tile(float* score, int64_t width, float factor, float& highest, float& total) {
#if SPECPLUG_AVX512
  __m512 most = _mm512_set1_ps(kMasked);
  for (int64_t k = 0; k < width; k += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(score + k));
  const float top = std::max(highest, _mm512_reduce_max_ps(most) * factor);
  const __m512 base = _mm512_set1_ps(top == kMasked ? 0.0f : top), factors = _mm512_set1_ps(factor);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += 16) {
    const __m512 weight = exp2_nonpositive(_mm512_fmsub_ps(_mm512_loadu_ps(score + k), factors, base));
    sum = _mm512_add_ps(sum, weight);
    _mm512_storeu_ps(score + k, weight);
  }
  const float added = _mm512_reduce_add_ps(sum);
#elif SPECPLUG_AVX2
  __m256 most = _mm256_set1_ps(kMasked);
  for (int64_t k = 0; k < width; k += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(score + k));
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, most);
  const float top = std::max(highest, *std::max_element(lanes, lanes + 8) * factor);
  const __m256 base = _mm256_set1_ps(top == kMasked ? 0.0f : top), factors = _mm256_set1_ps(factor);
  __m256 sum = _mm256_setzero_ps();
  for (int64_t k = 0; k < width; k += 8) {
    const __m256 weight = exp2_nonpositive(_mm256_fmsub_ps(_mm256_loadu_ps(score + k), factors, base));
    sum = _mm256_add_ps(sum, weight);
    _mm256_storeu_ps(score + k, weight);
  }
  _mm256_store_ps(lanes, sum);
  const float added = std::accumulate(lanes, lanes + 8, 0.0f);
#else
  float most = kMasked, added = 0.0f;
#pragma omp simd reduction(max : most)
  for (int64_t k = 0; k < width; ++k) most = score[k] > most ? score[k] : most;
  const float top = std::max(highest, most * factor), base = top == kMasked ? 0.0f : top;
#pragma omp simd reduction(+ : added)
  for (int64_t k = 0; k < width; ++k) {
    score[k] = exp2_nonpositive(score[k] * factor - base);
    added += score[k];
  }
#endif
  const float shrink = top == highest ? 1.0f : exp2_nonpositive(highest - top);
  highest = top;
  total = std::fma(total, shrink, added);
  return shrink;
}

}  // namespace specplug
