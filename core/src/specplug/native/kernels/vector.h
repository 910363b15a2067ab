// Small pieces that both kernels share: bfloat16 conversion, dot products of bfloat16 pairs, and exp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define SPECPLUG_VECTOR 1
#else
#define SPECPLUG_VECTOR 0
#endif
#if SPECPLUG_VECTOR && defined(__AVX512BF16__)
#define SPECPLUG_BF16_DOT 1
#else
#define SPECPLUG_BF16_DOT 0
#endif

namespace specplug {

using bf16 = uint16_t;

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Round to nearest even, as PyTorch does; NaN stays NaN.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void store(float* at, float value) { *at = value; }
inline void store(bf16* at, float value) { *at = to_bf16(value); }

// 2^x for x <= 0 (softmax arguments): 2^n * 2^r, |r| <= 1/2, and a polynomial; 2 ulp. NaN stays NaN, and -inf becomes 0.
constexpr float kExp2[] = {1.0f, 0.6931469440f, 0.2402212024f, 0.0555071309f, 0.0096755410f, 0.0013276471f};
constexpr float kLeastExponent = -200.0f;

inline float exp2_nonpositive(float x) {
  const float clamped = x < kLeastExponent ? kLeastExponent : x;
  const float n = std::nearbyint(clamped), r = clamped - n;
  float p = kExp2[5];
  for (int i = 4; i >= 0; --i) p = p * r + kExp2[i];
  return std::ldexp(p, static_cast<int>(n));
}

#if SPECPLUG_VECTOR
inline __m512 exp2_nonpositive(__m512 x) {
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(kLeastExponent), x);  // of a NaN and a number the second is taken
  const __m512 n = _mm512_roundscale_ps(clamped, 8), r = _mm512_sub_ps(clamped, n);
  __m512 p = _mm512_set1_ps(kExp2[5]);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp2[i]));
  return _mm512_scalef_ps(p, n);
}
#endif

#if SPECPLUG_BF16_DOT
// The two neighbouring elements that one dot product takes, as the bits of one lane.
inline uint32_t read_pair(const bf16* at) {
  uint32_t pair;
  std::memcpy(&pair, at, sizeof(pair));
  return pair;
}

inline __m512 dot_pairs(__m512 sum, __m512i pairs, uint32_t pair) {
  return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)));
}
#endif

}  // namespace specplug
