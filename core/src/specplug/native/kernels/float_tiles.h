// Scores and values of one tile with vectors of 256 bits. Keys, values and queries in bfloat16 become floats once a tile, for
// all queries.
//
// Every score has one accumulator of 8 floats, and every value's sum one float, whose terms come in one order: a query comes
// out the same to the bit, alone or among others.
#pragma once

#include <vector>

#include "tiles.h"

namespace specplug {

#if SPECPLUG_FLOAT_PAIRS

using Memory = std::vector<float>;

inline float* room_for(int64_t count, Memory& memory) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

// A multiple of 8 numbers as floats: such lie where they lay.
inline const float* as_floats(const float* from, int64_t, float*) { return from; }
inline const float* as_floats(const bf16* from, int64_t count, float* to) {
  for (int64_t at = 0; at < count; at += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
    _mm256_storeu_ps(to + at, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  }
  return to;
}

// The same of up to a tile of rows.
class FloatRows {
 public:
  template <typename T>
  FloatRows(const T* const* rows, int64_t count, int64_t dim, Memory& memory) {
    float* to = room_for(count * dim, memory);
    for (int64_t row = 0; row < count; ++row) rows_[row] = as_floats(rows[row], dim, to + row * dim);
  }
  FloatRows(const FloatRows&) = delete;
  FloatRows& operator=(const FloatRows&) = delete;
  const float* operator[](int64_t row) const { return rows_[row]; }

 private:
  const float* rows_[kTile];
};

// The sums of four vectors, in order.
inline __m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Scores [Queries][64] of four keys.
template <int Queries>
inline void score_four(const float* queries, const float* const (&keys)[4], int64_t dim, float* scores) {
  __m256 sum[Queries][4];
#pragma GCC unroll 3
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sum[q][k] = _mm256_setzero_ps();
  for (int64_t d = 0; d < dim; d += 8) {
    __m256 query[Queries];
#pragma GCC unroll 3
    for (int q = 0; q < Queries; ++q) query[q] = _mm256_loadu_ps(queries + q * dim + d);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m256 key = _mm256_loadu_ps(keys[k] + d);
#pragma GCC unroll 3
      for (int q = 0; q < Queries; ++q) sum[q][k] = _mm256_fmadd_ps(query[q], key, sum[q][k]);
    }
  }
#pragma GCC unroll 3
  for (int q = 0; q < Queries; ++q)
    _mm_storeu_ps(scores + q * kTile, sums_of(sum[q][0], sum[q][1], sum[q][2], sum[q][3]));
}

// Adds weights [Queries][64] times `Vectors` x 8 numbers of the values, from `offset` on, to sums [Queries][dim].
template <int Queries, int Vectors>
inline void add_part(const float* weights, const FloatRows& values, int64_t width, int64_t offset, int64_t dim, float* sums) {
  __m256 sum[Queries][Vectors];
#pragma GCC unroll 3
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[q][v] = _mm256_loadu_ps(sums + q * dim + offset + 8 * v);
  for (int64_t k = 0; k < width; ++k) {
    const float* value = values[k] + offset;
    __m256 weight[Queries];
#pragma GCC unroll 3
    for (int q = 0; q < Queries; ++q) weight[q] = _mm256_broadcast_ss(weights + q * kTile + k);
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
inline void add_rows(const float* weights, const FloatRows& values, int64_t width, int64_t dim, float* sums) {
  int64_t offset = 0;
  for (; offset + 32 <= dim; offset += 32) add_part<Queries, 4>(weights, values, width, offset, dim, sums);
  for (; offset < dim; offset += 8) add_part<Queries, 1>(weights, values, width, offset, dim, sums);
}

// Calls `block` with the number of queries, known when compiling, and the first of them, by threes and twos.
template <typename Block>
inline void in_threes(int64_t count, const Block& block) {
  each_pass(count, 3, [&](int64_t first, int64_t size) {
    if (size == 3) block(std::integral_constant<int, 3>(), first);
    if (size == 2) block(std::integral_constant<int, 2>(), first);
    if (size == 1) block(std::integral_constant<int, 1>(), first);
  });
}

// Scores [count][64] of up to 64 keys, and of the last one again up to a multiple of 4. `step` is called with every four.
template <typename T, typename Step>
inline void score_in_floats(const T* queries, int64_t count, const T* const* rows, int64_t width, int64_t dim, float* scores,
                            const Step& step) {
  thread_local Memory memory, query_memory;
  const FloatRows keys(rows, width, dim, memory);
  const float* floats = as_floats(queries, count * dim, room_for(count * dim, query_memory));
  for (int64_t k = 0; k < width; k += 4) {
    const auto key = [&](int64_t at) { return keys[std::min(at, width - 1)]; };
    const float* const four[4] = {key(k), key(k + 1), key(k + 2), key(k + 3)};
    in_threes(count, [&](auto size, int64_t q) { score_four<size()>(floats + q * dim, four, dim, scores + q * kTile + k); });
    step();
  }
}

// Adds weights [count][64] times up to 64 values to sums [count][dim].
template <typename T>
inline void add_in_floats(const float* weights, int64_t count, const T* const* rows, int64_t width, int64_t dim, float* sums) {
  thread_local Memory memory;
  const FloatRows values(rows, width, dim, memory);
  in_threes(count, [&](auto size, int64_t q) {
    add_rows<size()>(weights + q * kTile, values, width, dim, sums + q * dim);
  });
}

#endif

}  // namespace specplug
