// Argmax of rows of logits with its softmax probability, without writing a distribution.
#pragma once

#include <cmath>
#include <limits>
#include <tuple>

#include "common/torch_util.h"
#include "common/simd.h"

namespace specplug {

constexpr int64_t kLogitsPerThread = 32768;  // fewer are not worth a thread
constexpr int64_t kLogitsPerSum = 512;       // float32 sums over a whole vocabulary would lose small terms

#if SPECPLUG_AVX512
inline __m512 load_logits(const float* at, __mmask16 there) {
  return _mm512_mask_loadu_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), there, at);
}
inline __m512 load_logits(const bf16* at, __mmask16 there) {
  const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at)), 16);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), there, _mm512_castsi512_ps(bits));
}
#endif

// The first of the highest logits and its softmax probability; NaN if any logit is NaN.
template <typename T>
inline float argmax_row(const T* logits, int64_t vocabulary, int64_t& id) {
  float highest = -std::numeric_limits<float>::infinity(), total = 0.0f;
  id = 0;
#if SPECPLUG_AVX512
  const auto there = [=](int64_t at) {
    return static_cast<__mmask16>(vocabulary - at < 16 ? (1 << (vocabulary - at)) - 1 : 0xffff);
  };
  __m512 most = _mm512_set1_ps(highest);
  __m512i first = _mm512_setzero_si512(), place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (int64_t at = 0; at < vocabulary; at += 16, place = _mm512_add_epi32(place, _mm512_set1_epi32(16))) {
    const __m512 values = load_logits(logits + at, there(at));
    const __mmask16 higher = _mm512_cmp_ps_mask(values, most, _CMP_GT_OQ);
    most = _mm512_mask_mov_ps(most, higher, values);
    first = _mm512_mask_mov_epi32(first, higher, place);
  }
  highest = _mm512_reduce_max_ps(most);
  id = _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(most, _mm512_set1_ps(highest), _CMP_EQ_OQ), first);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < vocabulary; at += 16) {
    const __m512 below = _mm512_sub_ps(load_logits(logits + at, there(at)), _mm512_set1_ps(highest));
    sum = _mm512_add_ps(sum, exp2_nonpositive(_mm512_mul_ps(below, _mm512_set1_ps(kLog2E))));
  }
  total = _mm512_reduce_add_ps(sum);
#else
  for (int64_t at = 0; at < vocabulary; ++at)
    if (to_float(logits[at]) > highest) highest = to_float(logits[id = at]);
  for (int64_t begin = 0; begin < vocabulary; begin += kLogitsPerSum) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t at = begin; at < std::min(begin + kLogitsPerSum, vocabulary); ++at)
      sum += exp2_nonpositive((to_float(logits[at]) - highest) * kLog2E);
    total += sum;
  }
#endif
  return 1.0f / total;
}

// logits [N, V] -> ids [N], probabilities [N].
inline std::tuple<Tensor, Tensor> argmax_with_prob(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.stride(1) == 1 &&
                  (logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16),
              "argmax_with_prob: expected dense rows of float or bfloat16, not ", logits.scalar_type(), " ", logits.sizes());
  const int64_t rows = logits.size(0), vocabulary = logits.size(1), stride = logits.stride(0);
  const Tensor ids = at::detail::empty_cpu({rows}, logits.options().dtype(at::kLong));
  const Tensor probs = at::detail::empty_cpu({rows}, logits.options().dtype(at::kFloat));
  const auto run = [&](const auto* from) {
    const int64_t grain = std::max<int64_t>(1, kLogitsPerThread / vocabulary);
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        data_of<float>(probs)[row] = argmax_row(from + row * stride, vocabulary, data_of<int64_t>(ids)[row]);
    });
  };
  if (logits.scalar_type() == at::kFloat)
    run(data_of<float>(logits));
  else
    run(data_of<bf16>(logits));
  return {ids, probs};
}

}  // namespace specplug
