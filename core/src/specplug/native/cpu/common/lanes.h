// Floats that are computed with together: as many as a register holds, or one for what is left over.
#pragma once

#include "common/simd.h"

namespace specplug {

// a b + c in one way everywhere: compilers may fuse either product of a sum, and not the same one each time.
inline float fused(float a, float b, float c) {
#ifdef FP_FAST_FMAF
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

struct OneLane {
  static constexpr int64_t kCount = 1;
  float value;

  static OneLane load(const float* at) { return {*at}; }
  static OneLane all(float x) { return {x}; }
  void store(float* at) const { *at = value; }
  OneLane operator*(OneLane other) const { return {value * other.value}; }
  OneLane operator+(OneLane other) const { return {value + other.value}; }
  OneLane plus_product(OneLane a, OneLane b) const { return {fused(a.value, b.value, value)}; }
  float sum() const { return value; }
};

#if SPECPLUG_AVX512
struct Lanes {
  static constexpr int64_t kCount = 16;
  __m512 value;

  static Lanes load(const float* at) { return {_mm512_loadu_ps(at)}; }
  static Lanes all(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* at) const { _mm512_storeu_ps(at, value); }
  Lanes operator*(Lanes other) const { return {_mm512_mul_ps(value, other.value)}; }
  Lanes operator+(Lanes other) const { return {_mm512_add_ps(value, other.value)}; }
  Lanes plus_product(Lanes a, Lanes b) const { return {_mm512_fmadd_ps(a.value, b.value, value)}; }
  float sum() const { return _mm512_reduce_add_ps(value); }
};
#elif SPECPLUG_AVX2
struct Lanes {
  static constexpr int64_t kCount = 8;
  __m256 value;

  static Lanes load(const float* at) { return {_mm256_loadu_ps(at)}; }
  static Lanes all(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* at) const { _mm256_storeu_ps(at, value); }
  Lanes operator*(Lanes other) const { return {_mm256_mul_ps(value, other.value)}; }
  Lanes operator+(Lanes other) const { return {_mm256_add_ps(value, other.value)}; }
  Lanes plus_product(Lanes a, Lanes b) const { return {_mm256_fmadd_ps(a.value, b.value, value)}; }
  float sum() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};
#else
struct Lanes {
  static constexpr int64_t kCount = 4;
  float value[4];

  static Lanes load(const float* at) { return {{at[0], at[1], at[2], at[3]}}; }
  static Lanes all(float x) { return {{x, x, x, x}}; }
  void store(float* at) const { std::memcpy(at, value, sizeof(value)); }
  Lanes operator*(Lanes other) const {
    for (int lane = 0; lane < 4; ++lane) other.value[lane] *= value[lane];
    return other;
  }
  Lanes operator+(Lanes other) const {
    for (int lane = 0; lane < 4; ++lane) other.value[lane] += value[lane];
    return other;
  }
  Lanes plus_product(Lanes a, Lanes b) const {
    for (int lane = 0; lane < 4; ++lane) a.value[lane] = fused(a.value[lane], b.value[lane], value[lane]);
    return a;
  }
  float sum() const { return (value[0] + value[2]) + (value[1] + value[3]); }
};
#endif

// The dot product of two rows.
inline float dot(const float* one, const float* other, int64_t count) {
  Lanes sum = Lanes::all(0.0f);
  int64_t at = 0;
  for (; at + Lanes::kCount <= count; at += Lanes::kCount) sum = sum.plus_product(Lanes::load(one + at), Lanes::load(other + at));
  float total = sum.sum();
  for (; at < count; ++at) total = fused(one[at], other[at], total);
  return total;
}

}  // namespace specplug
