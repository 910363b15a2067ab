// Rotary position embedding (RoPE, arXiv:2104.09864), half-split layout.
#pragma once

#include "common/simd.h"

namespace specplug {

// Cosines and sines [tokens][width] of a batch.
template <typename T>
struct Rope {
  const T *cosines = nullptr, *sines = nullptr;
  int64_t width = 0;  // rotated elements of a head (even); the rest is copied

  explicit operator bool() const { return cosines; }

  // Writes one head of `dim` elements, rotated by the position of its token.
  void rotate(const T* from, int64_t token, int64_t dim, T* to) const {
    const T *c = cosines + token * width, *s = sines + token * width;
    const int64_t half = width / 2;
    int64_t d = 0;
#if SPECPLUG_AVX512_BF16
    if constexpr (std::is_same_v<T, bf16>)
      for (; d + 16 <= half; d += 16) {
        const __m512 low = load_floats(from + d), high = load_floats(from + half + d);
        const __m512 first = _mm512_fmsub_ps(low, load_floats(c + d), _mm512_mul_ps(high, load_floats(s + d)));
        const __m512 second = _mm512_fmadd_ps(high, load_floats(c + half + d), _mm512_mul_ps(low, load_floats(s + half + d)));
        store_rounded(to + d, first);
        store_rounded(to + half + d, second);
      }
#endif
    for (; d < half; ++d) {
      const float low = to_float(from[d]), high = to_float(from[half + d]);
      store(to + d, low * to_float(c[d]) - high * to_float(s[d]));
      store(to + half + d, high * to_float(c[half + d]) + low * to_float(s[half + d]));
    }
    std::copy(from + width, from + dim, to + width);
  }
};

}  // namespace specplug
