// Scores and values of one tile of up to 64 keys: portable code, and AVX512-BF16 code for many queries.
#pragma once

#include <algorithm>
#include <limits>

#include "common/simd.h"

namespace specplug {

constexpr int64_t kTile = 64;
constexpr int64_t kLanes = 16;
constexpr int64_t kQueryBlock = 64;
constexpr int64_t kMostQueries = 512;  // per block of a long prompt; keys and values are packed once for all of them

// Scores of `count` queries against a tile of up to 64 keys.
template <typename T>
struct Scores {
  static void tile(const T* queries, int64_t count, const T* const* keys, int64_t width, int64_t dim,
                   float* scores) {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < width; ++k) {
        float sum = 0.0f;
        const T *left = queries + q * dim, *right = keys[k];
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; ++d) sum += to_float(left[d]) * to_float(right[d]);
        scores[q * kTile + k] = sum;
      }
  }
};

// Adds probabilities [count][64] times the tile's values to `sums` [count][dim].
template <typename T>
inline void add_values(const float* probs, int64_t count, const T* const* values, int64_t width, int64_t dim, float* sums) {
  for (int64_t q = 0; q < count; ++q) {
    float* sum = sums + q * dim;
    for (int64_t k = 0; k < width; ++k) {
      const float p = probs[q * kTile + k];
      if (p == 0.0f) continue;
      const T* value = values[k];
#pragma omp simd
      for (int64_t d = 0; d < dim; ++d) sum[d] += p * to_float(value[d]);
    }
  }
}

#if SPECPLUG_AVX512_BF16

// Reads rows sequentially, which the hardware prefetcher follows best.
inline void touch(const bf16* const* rows, int64_t count, int64_t dim) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t d = 0; d < dim; d += 32) {
      bf16 first = *static_cast<const volatile bf16*>(rows[row] + d);
      static_cast<void>(first);
    }
}

// Transposes 16 x 16 32-bit elements.
inline void transpose(__m512i (&r)[16], __m512i* out) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    out[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    out[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    out[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Transposes 16 keys of 32 elements into 16 vectors, one per pair of elements, each holding that pair of all keys.
inline void transpose_pairs(const bf16* const* keys, int64_t width, int64_t offset, __m512i* out) {
  __m512i rows[16];
  for (int k = 0; k < 16; ++k)
    rows[k] = k < width ? _mm512_loadu_si512(keys[k] + offset) : _mm512_setzero_si512();
  transpose(rows, out);
}

template <>
struct Scores<bf16> {
  static void tile(const bf16* queries, int64_t count, const bf16* const* keys, int64_t width, int64_t dim, float* scores) {
    if (dim % 32) {
      for (int64_t q = 0; q < count; ++q)
        for (int64_t k = 0; k < width; ++k) {
          float sum = 0.0f;
          for (int64_t d = 0; d < dim; ++d) sum += to_float(queries[q * dim + d]) * to_float(keys[k][d]);
          scores[q * kTile + k] = sum;
        }
      return;
    }
    __m512i pairs[kLanes];
    for (int64_t begin = 0; begin < width; begin += kLanes)
      for (int64_t offset = 0; offset < dim; offset += 32) {
        if (offset == 0) touch(keys + begin, std::min(kLanes, width - begin), dim);
        transpose_pairs(keys + begin, std::min(kLanes, width - begin), offset, pairs);
        for (int64_t q = 0; q < count; ++q) {
          const bf16* at = queries + q * dim + offset;
          float* sum = scores + q * kTile + begin;
          __m512 even = offset ? _mm512_loadu_ps(sum) : _mm512_setzero_ps(), odd = _mm512_setzero_ps();
#pragma GCC unroll 8
          for (int i = 0; i < kLanes; i += 2) {
            even = dot_pairs(even, pairs[i], read_pair(at + 2 * i));
            odd = dot_pairs(odd, pairs[i + 1], read_pair(at + 2 * i + 2));
          }
          _mm512_storeu_ps(sum, _mm512_add_ps(even, odd));
        }
      }
  }
};

// Permutation that interleaves the first halves of two rows.
alignas(64) inline constexpr int16_t kInterleave[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Rounds 16 probabilities to 8 pairs of bfloat16.
inline void round_weights(const float* probs, uint32_t* pairs) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(probs)));
}

// Adds two values per instruction. Probabilities are rounded to bfloat16 for it, as PyTorch's own kernels do.
template <>
inline void add_values<bf16>(const float* probs, int64_t count, const bf16* const* values, int64_t width, int64_t dim,
                             float* sums) {
  if (dim % 32) {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < width; ++k)
        for (int64_t d = 0; d < dim; ++d) sums[q * dim + d] += probs[q * kTile + k] * to_float(values[k][d]);
    return;
  }
  alignas(64) uint32_t weights[kQueryBlock][kTile / 2];
  for (int64_t q = 0; q < count; ++q)
    for (int64_t k = 0; k < kTile; k += kLanes) round_weights(probs + q * kTile + k, weights[q] + k / 2);
  const __m512i first = _mm512_load_si512(kInterleave), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const int64_t pairs = (width + 1) / 2;
  alignas(64) __m512i low[kTile / 2], high[kTile / 2];
  for (int64_t offset = 0; offset < dim; offset += 32) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      if (offset == 0) touch(values + 2 * pair, 2 * pair + 1 < width ? 2 : 1, dim);
      const __m512i a = _mm512_loadu_si512(values[2 * pair] + offset);
      const __m512i b = 2 * pair + 1 < width ? _mm512_loadu_si512(values[2 * pair + 1] + offset) : _mm512_setzero_si512();
      low[pair] = _mm512_permutex2var_epi16(a, first, b);
      high[pair] = _mm512_permutex2var_epi16(a, second, b);
    }
    for (int64_t q = 0; q < count; ++q) {
      float* sum = sums + q * dim + offset;
      __m512 left = _mm512_loadu_ps(sum), right = _mm512_loadu_ps(sum + 16);
      __m512 more_left = _mm512_setzero_ps(), more_right = _mm512_setzero_ps();
      int64_t pair = 0;
      for (; pair + 1 < pairs; pair += 2) {
        left = dot_pairs(left, low[pair], weights[q][pair]);
        right = dot_pairs(right, high[pair], weights[q][pair]);
        more_left = dot_pairs(more_left, low[pair + 1], weights[q][pair + 1]);
        more_right = dot_pairs(more_right, high[pair + 1], weights[q][pair + 1]);
      }
      if (pair < pairs) {
        left = dot_pairs(left, low[pair], weights[q][pair]);
        right = dot_pairs(right, high[pair], weights[q][pair]);
      }
      _mm512_storeu_ps(sum, _mm512_add_ps(left, more_left));
      _mm512_storeu_ps(sum + 16, _mm512_add_ps(right, more_right));
    }
  }
}

#endif

}  // namespace specplug
