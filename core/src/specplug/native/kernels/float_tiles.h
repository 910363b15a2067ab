// Scores and values of one tile with vectors of 256 bits. Keys, values and queries in bfloat16 become floats once a tile, for
// all queries.
//
// Every score has one accumulator of 8 floats, and every value's sum one float, whose terms come in one order: a query comes
// out the same to the bit, alone or among others.
#pragma once

#include <vector>

#include "vector.h"

namespace specplug {

#if SPECPLUG_FLOAT_PAIRS

inline __m256 load_8(const float* at) { return _mm256_loadu_ps(at); }
inline __m256 load_8(const bf16* at) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Rows of a multiple of 8 numbers, as floats: such lie where they lay.
class FloatRows {
 public:
  FloatRows(const float* const* rows, int64_t, int64_t, std::vector<float>&) : rows_(rows) {}
  FloatRows(const bf16* const* rows, int64_t count, int64_t dim, std::vector<float>& memory) : rows_(own_) {
    if (static_cast<int64_t>(memory.size()) < count * dim) memory.resize(count * dim);
    for (int64_t row = 0; row < count; ++row) {
      float* to = memory.data() + row * dim;
      for (int64_t d = 0; d < dim; d += 8) _mm256_storeu_ps(to + d, load_8(rows[row] + d));
      own_[row] = to;
    }
  }
  FloatRows(const FloatRows&) = delete;
  FloatRows& operator=(const FloatRows&) = delete;
  const float* operator[](int64_t row) const { return rows_[row]; }

 private:
  const float* own_[64];
  const float* const* rows_;
};

// The sums of four vectors, in order.
inline __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Scores of `Queries` queries against four keys.
template <int Queries, typename T>
inline void score_four(const T* queries, const float* const (&keys)[4], int64_t dim, float* scores, int64_t stride) {
  __m256 sum[Queries][4];
#pragma GCC unroll 3
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sum[q][k] = _mm256_setzero_ps();
  for (int64_t d = 0; d < dim; d += 8) {
    __m256 query[Queries];
#pragma GCC unroll 3
    for (int q = 0; q < Queries; ++q) query[q] = load_8(queries + q * dim + d);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m256 key = _mm256_loadu_ps(keys[k] + d);
#pragma GCC unroll 3
      for (int q = 0; q < Queries; ++q) sum[q][k] = _mm256_fmadd_ps(query[q], key, sum[q][k]);
    }
  }
#pragma GCC unroll 3
  for (int q = 0; q < Queries; ++q)
    _mm_storeu_ps(scores + q * stride, sums_of(sum[q][0], sum[q][1], sum[q][2], sum[q][3]));
}

// Adds weights [Queries][stride] times `Vectors` x 8 numbers of the values, from `offset` on, to sums [Queries][dim].
template <int Queries, int Vectors>
inline void add_part(const float* weights, int64_t stride, const FloatRows& values, int64_t width, int64_t offset, int64_t dim,
                     float* sums) {
  __m256 sum[Queries][Vectors];
#pragma GCC unroll 3
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[q][v] = _mm256_loadu_ps(sums + q * dim + offset + 8 * v);
  for (int64_t k = 0; k < width; ++k) {
    const float* value = values[k] + offset;
    __m256 weight[Queries];
#pragma GCC unroll 3
    for (int q = 0; q < Queries; ++q) weight[q] = _mm256_broadcast_ss(weights + q * stride + k);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const __m256 numbers = _mm256_loadu_ps(value + 8 * v);
#pragma GCC unroll 3
      for (int q = 0; q < Queries; ++q) sum[q][v] = _mm256_fmadd_ps(weight[q], numbers, sum[q][v]);
    }
  }
#pragma GCC unroll 3
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) _mm256_storeu_ps(sums + q * dim + offset + 8 * v, sum[q][v]);
}

template <int Queries>
inline void add_rows(const float* weights, int64_t stride, const FloatRows& values, int64_t width, int64_t dim, float* sums) {
  int64_t offset = 0;
  for (; offset + 32 <= dim; offset += 32) add_part<Queries, 4>(weights, stride, values, width, offset, dim, sums);
  for (; offset < dim; offset += 8) add_part<Queries, 1>(weights, stride, values, width, offset, dim, sums);
}

// Calls `block` with the number of queries, known when compiling, and the first of them: three by three, then the rest.
template <typename Block>
inline void in_threes(int64_t count, const Block& block) {
  int64_t q = 0;
  for (; q + 3 <= count; q += 3) block(std::integral_constant<int, 3>(), q);
  if (count - q == 2) block(std::integral_constant<int, 2>(), q);
  if (count - q == 1) block(std::integral_constant<int, 1>(), q);
}

// Scores [count][stride] of up to 64 keys, and of the last one again up to a multiple of 4.
template <typename T>
inline void score_in_floats(const T* queries, int64_t count, const T* const* rows, int64_t width, int64_t dim, float* scores,
                            int64_t stride) {
  thread_local std::vector<float> memory;
  const FloatRows keys(rows, width, dim, memory);
  for (int64_t k = 0; k < width; k += 4) {
    const auto key = [&](int64_t at) { return keys[std::min(at, width - 1)]; };
    const float* const four[4] = {key(k), key(k + 1), key(k + 2), key(k + 3)};
    in_threes(count, [&](auto size, int64_t q) {
      score_four<size()>(queries + q * dim, four, dim, scores + q * stride + k, stride);
    });
  }
}

// Adds weights [count][stride] times up to 64 values to sums [count][dim].
template <typename T>
inline void add_in_floats(const float* weights, int64_t count, const T* const* rows, int64_t width, int64_t dim, float* sums,
                          int64_t stride) {
  thread_local std::vector<float> memory;
  const FloatRows values(rows, width, dim, memory);
  in_threes(count, [&](auto size, int64_t q) {
    add_rows<size()>(weights + q * stride, stride, values, width, dim, sums + q * dim);
  });
}

#endif

}  // namespace specplug
