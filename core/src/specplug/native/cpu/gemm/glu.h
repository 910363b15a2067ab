// Gated linear units (arXiv:2002.05202): activation(gate) * up.
#pragma once

#include "common/simd.h"

namespace specplug {

enum class Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

constexpr float kGeluScale = 1.5957691216057308f;  // 2 * sqrt(2 / pi)
constexpr float kGeluCube = 0.044715f;

#if SPECPLUG_AVX512_BF16

// x / (1 + exp(-z)), where z is x for SiLU, and for GELU's tanh form 2 * sqrt(2 / pi) * (x + 0.044715 x^3).
inline __m512 activate(__m512 x, Activation activation) {
  __m512 z = x;
  if (activation == Activation::kGeluTanh) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(kGeluCube));
    z = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(kGeluScale)), _mm512_add_ps(cube, _mm512_set1_ps(1.0f)));
  }
  const __m512 small = exp2_nonpositive(_mm512_mul_ps(_mm512_abs_ps(z), _mm512_set1_ps(-kLog2E)));
  const __m512 below = _mm512_add_ps(small, _mm512_set1_ps(1.0f));
  const __mmask16 negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_div_ps(_mm512_mul_ps(x, _mm512_mask_blend_ps(negative, _mm512_set1_ps(1.0f), small)), below);
}

#else

template <Activation kind>
inline float activate(float x) {
  const float z = kind == Activation::kGeluTanh ? x * kGeluScale * (kGeluCube * x * x + 1.0f) : x;
  const float small = exp2_nonpositive(std::fabs(z) * -kLog2E);
  return x * (z < 0.0f ? small : 1.0f) / (small + 1.0f);
}

#endif

}  // namespace specplug
