// SIMD helpers shared by the kernels: bfloat16 conversion, bfloat16 dot products, exp2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define SPECPLUG_AVX512 1
#else
#define SPECPLUG_AVX512 0
#endif
#if SPECPLUG_AVX512 && defined(__AVX512BF16__)
#define SPECPLUG_AVX512_BF16 1
#else
#define SPECPLUG_AVX512_BF16 0
#endif
#if !SPECPLUG_AVX512_BF16 && defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define SPECPLUG_AVX2 1
#else
#define SPECPLUG_AVX2 0
#endif
#define SPECPLUG_PACKS_BF16 (SPECPLUG_AVX512_BF16 || SPECPLUG_AVX2)

namespace specplug {

using bf16 = uint16_t;

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Rounds to nearest even, as PyTorch does; NaN stays NaN.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t quiet = (bits >> 16) | 0x40u, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<bf16>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
inline void store(float* at, float value) { *at = value; }
inline void store(bf16* at, float value) { *at = to_bf16(value); }

#if SPECPLUG_AVX512_BF16
inline __m512 load_floats(const bf16* at) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_rounded(bf16* at, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(values));
}
#endif

// Scales and rounds a row.
template <typename T>
inline void store_scaled(T* to, const float* from, int64_t count, float factor) {
  int64_t at = 0;
#if SPECPLUG_AVX512_BF16
  if constexpr (std::is_same_v<T, bf16>)
    for (; at + 16 <= count; at += 16)
      store_rounded(to + at, _mm512_mul_ps(_mm512_loadu_ps(from + at), _mm512_set1_ps(factor)));
#endif
  for (; at < count; ++at) store(to + at, from[at] * factor);
}

constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 0 (softmax arguments): 2^n * 2^r with |r| <= 1/2 and a polynomial; 2 ulp. NaN stays NaN. Subnormal results are flushed
// to 0 without being computed: CPUs take a hundred times as long for them.
constexpr float kExp2[] = {1.0f, 0.6931469440f, 0.2402212024f, 0.0555071309f, 0.0096755410f, 0.0013276471f};
constexpr float kLeastExponent = -125.0f;

#if SPECPLUG_AVX512
inline __m512 exp2_nonpositive(__m512 x) {
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLeastExponent), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(x, 8), r = _mm512_maskz_sub_ps(counts, x, n);
  __m512 p = _mm512_set1_ps(kExp2[5]);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExp2[i]));
  return _mm512_maskz_scalef_ps(counts, p, n);
}
inline float exp2_nonpositive(float x) { return _mm512_cvtss_f32(exp2_nonpositive(_mm512_set1_ps(x))); }
#else
inline float exp2_nonpositive(float x) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = x + kWhole, r = x - (shifted - kWhole);
  float p = kExp2[5];
  for (int i = 4; i >= 0; --i) p = p * r + kExp2[i];
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < kLeastExponent ? 0.0f : p * power;
}
#endif

#if SPECPLUG_AVX2
inline __m256 exp2_nonpositive(__m256 x) {
  const __m256 least = _mm256_set1_ps(kLeastExponent), counts = _mm256_cmp_ps(x, least, _CMP_NLT_UQ);
  x = _mm256_max_ps(least, x);  // keeps NaN
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(kExp2[5]);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExp2[i]));
  const __m256i exponent = _mm256_add_epi32(_mm256_slli_epi32(_mm256_cvtps_epi32(n), 23), _mm256_set1_epi32(0x3f800000));
  return _mm256_and_ps(counts, _mm256_mul_ps(p, _mm256_castsi256_ps(exponent)));
}
#endif

// Splits `rows` into passes of at most `most` rows, evenly; calls `pass(first, count)`.
template <typename Pass>
inline void each_pass(int64_t rows, int64_t most, const Pass& pass) {
  const int64_t passes = (rows + most - 1) / most;
  int64_t row = 0;
  for (int64_t index = 0; index < passes; ++index) {
    const int64_t count = (rows - row + passes - index - 1) / (passes - index);
    pass(row, count);
    row += count;
  }
}

// Two neighbouring elements as the bits of one lane, for a pair dot product.
inline uint32_t read_pair(const bf16* at) {
  uint32_t pair;
  std::memcpy(&pair, at, sizeof(pair));
  return pair;
}

#if SPECPLUG_AVX2
// The first, and the second, elements of 8 pairs.
inline __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
#endif

#if SPECPLUG_AVX512_BF16
inline __m512 dot_pairs(__m512 sum, __m512i pairs, uint32_t pair) {
  return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)));
}
#endif

}  // namespace specplug
