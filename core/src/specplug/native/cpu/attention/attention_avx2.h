// Scores and values of one tile with AVX2. bfloat16 keys and values are converted to float32 in registers: first the even elements of
// 16, then the odd ones (two instructions). Queries are stored in that order beforehand; sums are reordered at the end.
//
// Each score has one 8-lane accumulator and each output element one float; terms are added in a fixed order, so a query's result is
// bit-equal in any batch.
#pragma once

#include "attention/attention_generic.h"

namespace specplug {

#if SPECPLUG_AVX2

constexpr int64_t kLine = 16;  // elements converted together

// Even and odd elements of a line; for float input, its first and second half.
inline __m256 even_of(const float* line) { return _mm256_loadu_ps(line); }
inline __m256 odd_of(const float* line) { return _mm256_loadu_ps(line + 8); }
inline __m256 even_of(const bf16* line) { return first_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line))); }
inline __m256 odd_of(const bf16* line) { return second_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line))); }

// Half a line in memory order: the remainder of a row with an odd number of halves.
inline __m256 load_half(const float* at) { return _mm256_loadu_ps(at); }
inline __m256 load_half(const bf16* at) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Converts a row (length a multiple of 8) to float32 in even-odd order.
template <typename T>
inline void arrange(const T* from, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + kLine <= dim; d += kLine) {
    _mm256_storeu_ps(to + d, even_of(from + d));
    _mm256_storeu_ps(to + d + kLine / 2, odd_of(from + d));
  }
  if (d < dim) _mm256_storeu_ps(to + d, load_half(from + d));
}

// Restores memory order.
template <typename T>
inline void restore_order(float* row, int64_t dim) {
  if constexpr (std::is_same_v<T, bf16>)
    for (int64_t d = 0; d + kLine <= dim; d += kLine) {
      const __m256 even = _mm256_loadu_ps(row + d), odd = _mm256_loadu_ps(row + d + 8);
      const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
      _mm256_storeu_ps(row + d, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(row + d + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
}

// Horizontal sums of four vectors.
inline __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
  const __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
  const __m256 all = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Multiply-adds half a line of the queries with the keys, both float32.
template <int Queries, int Keys>
inline void add_products(const float* queries, int64_t dim, const __m256 (&numbers)[Keys], __m256 (&sum)[Queries][Keys]) {
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q) {
    const __m256 query = _mm256_loadu_ps(queries + q * dim);
#pragma GCC unroll 4
    for (int k = 0; k < Keys; ++k) sum[q][k] = _mm256_fmadd_ps(query, numbers[k], sum[q][k]);
  }
}

// Scores [Queries][64] of `Keys` keys.
template <int Queries, int Keys, typename T>
inline void score_keys(const float* queries, const T* const* keys, int64_t dim, float* scores) {
  __m256 sum[Queries][Keys], numbers[Keys];
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int k = 0; k < Keys; ++k) sum[q][k] = _mm256_setzero_ps();
  int64_t d = 0;
  for (; d + kLine <= dim; d += kLine) {
#pragma GCC unroll 4
    for (int k = 0; k < Keys; ++k) numbers[k] = even_of(keys[k] + d);
    add_products(queries + d, dim, numbers, sum);
#pragma GCC unroll 4
    for (int k = 0; k < Keys; ++k) numbers[k] = odd_of(keys[k] + d);
    add_products(queries + d + kLine / 2, dim, numbers, sum);
  }
  if (d < dim) {
#pragma GCC unroll 4
    for (int k = 0; k < Keys; ++k) numbers[k] = load_half(keys[k] + d);
    add_products(queries + d, dim, numbers, sum);
  }
  const __m256* each = &sum[0][0];
#pragma GCC unroll 2
  for (int at = 0; at < Queries * Keys; at += 4) {
    float four[4];
    _mm_storeu_ps(four, sums_of(each[at], each[at + 1], each[at + 2], each[at + 3]));
#pragma GCC unroll 2
    for (int q = at / Keys; q * Keys < at + 4; ++q)
      std::memcpy(scores + q * kTile, four + (q * Keys - at), Keys * sizeof(float));
  }
}

// Adds weights [Queries][64] times `Halves` x 8 elements of the values, starting at `offset`, to sums [Queries][dim].
template <int Queries, int Halves, typename T>
inline void add_part(const float* weights, const T* const* values, int64_t width, int64_t offset, int64_t dim, float* sums) {
  __m256 sum[Queries][Halves];
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 8
    for (int v = 0; v < Halves; ++v) sum[q][v] = _mm256_loadu_ps(sums + q * dim + offset + 8 * v);
  for (int64_t k = 0; k < width; ++k) {
    const T* value = values[k] + offset;
    __m256 numbers[Halves];
    if constexpr (Halves == 1) numbers[0] = load_half(value);
#pragma GCC unroll 4
    for (int line = 0; line < Halves / 2; ++line) {
      numbers[2 * line] = even_of(value + kLine * line);
      numbers[2 * line + 1] = odd_of(value + kLine * line);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Queries; ++q) {
      const __m256 weight = _mm256_broadcast_ss(weights + q * kTile + k);
#pragma GCC unroll 8
      for (int v = 0; v < Halves; ++v) sum[q][v] = _mm256_fmadd_ps(weight, numbers[v], sum[q][v]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 8
    for (int v = 0; v < Halves; ++v) _mm256_storeu_ps(sums + q * dim + offset + 8 * v, sum[q][v]);
}

template <int Queries, typename T>
inline void add_rows(const float* weights, const T* const* values, int64_t width, int64_t dim, float* sums) {
  constexpr int kHalves = 8 / Queries;
  int64_t offset = 0;
  for (; offset + 8 * kHalves <= dim; offset += 8 * kHalves)
    add_part<Queries, kHalves>(weights, values, width, offset, dim, sums);
  for (; offset + kLine <= dim; offset += kLine) add_part<Queries, 2>(weights, values, width, offset, dim, sums);
  if (offset < dim) add_part<Queries, 1>(weights, values, width, offset, dim, sums);
}

// Splits `count` queries into blocks of four, two and one; calls `block` with the compile-time size and the first index.
template <typename Block>
inline void by_fours(int64_t count, const Block& block) {
  int64_t q = 0;
  for (; q + 4 <= count; q += 4) block(std::integral_constant<int, 4>(), q);
  if (count & 2) block(std::integral_constant<int, 2>(), q), q += 2;
  if (count & 1) block(std::integral_constant<int, 1>(), q);
}

// Scores [count][64] of up to 64 keys; the last key is repeated up to a multiple of 4. Calls `step` after every four keys.
template <typename T, typename Step>
inline void score_avx2(const float* queries, int64_t count, const T* const* rows, int64_t width, int64_t dim,
                            float* scores, const Step& step) {
  for (int64_t k = 0; k < width; k += 4) {
    const T* const four[] = {rows[k], rows[std::min(k + 1, width - 1)], rows[std::min(k + 2, width - 1)],
                             rows[std::min(k + 3, width - 1)]};
    by_fours(count, [&](auto size, int64_t q) {
      constexpr int kKeys = size() == 4 ? 2 : 4;  // limited by registers
      for (int first = 0; first < 4; first += kKeys)
        score_keys<size(), kKeys>(queries + q * dim, four + first, dim, scores + q * kTile + k + first);
    });
    step();
  }
}

// Adds weights [count][64] times up to 64 values to sums [count][dim], in even-odd order.
template <typename T>
inline void add_avx2(const float* weights, int64_t count, const T* const* rows, int64_t width, int64_t dim, float* sums) {
  by_fours(count, [&](auto size, int64_t q) {
    add_rows<size()>(weights + q * kTile, rows, width, dim, sums + q * dim);
  });
}

#endif

}  // namespace specplug
