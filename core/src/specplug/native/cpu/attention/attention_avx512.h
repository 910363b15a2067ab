// Scores and values of a tile with AVX512-BF16, a few queries at a time: the number of queries changes no result.
//
// Decoding is memory bound. Keys and values are read sequentially, row after row, so that the hardware prefetcher keeps up; other orders and
// software prefetching took up to twice as long.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention/attention_generic.h"

namespace specplug {

constexpr int64_t kScoredAtOnce = 4, kAddedAtOnce = 8;  // more scores do not fit in registers
constexpr int64_t kMany = 33;  // queries from which on keys are transposed: with fewer, reading the keys takes the time
constexpr int64_t kMostDim = 1024;  // of a key that is transposed on the stack
constexpr int64_t kPage = 4096;  // bytes per memory page

template <typename T>
constexpr bool kHasAvx512 = SPECPLUG_AVX512_BF16 && std::is_same_v<T, bf16>;

// Keys of one memory page: hardware prefetching stops at page boundaries, so values come next.
inline int64_t avx512_tile(int64_t key_dim) {
  return std::clamp(kPage / (key_dim * static_cast<int64_t>(sizeof(bf16))) / kLanes * kLanes, kLanes, kTile);
}

#if SPECPLUG_AVX512_BF16

// Permutation that interleaves the first halves of two rows.
alignas(64) inline constexpr int16_t kInterleave[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// Rounds 16 probabilities to 8 pairs of bfloat16.
inline void round_weights(const float* probs, uint32_t* pairs) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(probs)));
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

// Partial horizontal sums of four vectors: 128-bit part p of the result holds the sums of part p of a, b, c and d.
inline __m512 fold_within_parts(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
}

// Completes four results of `fold_within_parts`: the sums of 16 vectors, in order.
inline __m512 fold_parts(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

// Scores [Queries][64] of up to 64 keys. Each query starts at a multiple of 64 bytes.
template <int Queries>
inline void score_few(const bf16* queries, const bf16* const* keys, int64_t width, int64_t dim, float* scores) {
  for (int64_t begin = 0; begin < width; begin += kLanes) {
    __m512 folded[Queries][4];
#pragma GCC unroll 4
    for (int four = 0; four < 4; ++four) {
      __m512 sums[Queries][4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const bf16* key = keys[std::min(begin + 4 * four + k, width - 1)];
#pragma GCC unroll 8
        for (int q = 0; q < Queries; ++q) sums[q][k] = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += 32) {
          const __m512bh line = (__m512bh)_mm512_loadu_si512(key + d);
#pragma GCC unroll 8
          for (int q = 0; q < Queries; ++q)
            sums[q][k] = _mm512_dpbf16_ps(sums[q][k], line, (__m512bh)_mm512_load_si512(queries + q * dim + d));
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < Queries; ++q) folded[q][four] = fold_within_parts(sums[q][0], sums[q][1], sums[q][2], sums[q][3]);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Queries; ++q)
      _mm512_storeu_ps(scores + q * kTile + begin, fold_parts(folded[q][0], folded[q][1], folded[q][2], folded[q][3]));
  }
}

// Adds weights [Queries][pairs] times `Lines` x 32 elements of the values, starting at `offset`, to sums [Queries][dim].
template <int Queries, int Lines>
inline void add_lines(const uint32_t (*weights)[kTile / 2], const bf16* const* values, int64_t pairs, int64_t offset,
                      int64_t dim, float* sums) {
  const __m512i first = _mm512_load_si512(kInterleave), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  __m512 low[Queries][Lines], high[Queries][Lines];
#pragma GCC unroll 8
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int line = 0; line < Lines; ++line) {
      low[q][line] = _mm512_loadu_ps(sums + q * dim + offset + 32 * line);
      high[q][line] = _mm512_loadu_ps(sums + q * dim + offset + 32 * line + 16);
    }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const bf16 *even = values[2 * pair] + offset, *odd = values[2 * pair + 1] + offset;
    __m512i a[Lines], b[Lines];
#pragma GCC unroll 4
    for (int line = 0; line < Lines; ++line) a[line] = _mm512_loadu_si512(even + 32 * line);
#pragma GCC unroll 4
    for (int line = 0; line < Lines; ++line) b[line] = _mm512_loadu_si512(odd + 32 * line);
#pragma GCC unroll 4
    for (int line = 0; line < Lines; ++line) {
      const __m512i left = _mm512_permutex2var_epi16(a[line], first, b[line]);
      const __m512i right = _mm512_permutex2var_epi16(a[line], second, b[line]);
#pragma GCC unroll 8
      for (int q = 0; q < Queries; ++q) {
        low[q][line] = dot_pairs(low[q][line], left, weights[q][pair]);
        high[q][line] = dot_pairs(high[q][line], right, weights[q][pair]);
      }
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int line = 0; line < Lines; ++line) {
      _mm512_storeu_ps(sums + q * dim + offset + 32 * line, low[q][line]);
      _mm512_storeu_ps(sums + q * dim + offset + 32 * line + 16, high[q][line]);
    }
}

// Processes as many queries at once as fit in registers; the next ones find the values in L1.
template <int Queries, int Lines>
inline void add_all(const uint32_t (*weights)[kTile / 2], const bf16* const* values, int64_t pairs, int64_t dim,
                    float* sums) {
  constexpr int kAtOnce = 8 / Lines, kRest = Queries % kAtOnce;
  for (int64_t offset = 0; offset < dim; offset += 32 * Lines) {
    int q = 0;
    for (; q + kAtOnce <= Queries; q += kAtOnce)
      add_lines<kAtOnce, Lines>(weights + q, values, pairs, offset, dim, sums + q * dim);
    if constexpr (kRest > 0) add_lines<kRest, Lines>(weights + q, values, pairs, offset, dim, sums + q * dim);
  }
}

// Adds probabilities [Queries][64], zero-padded to a multiple of 16, times the values to sums [Queries][dim]. The entry after an odd
// last row must point to a readable row.
template <int Queries>
inline void add_few(const float* probs, const bf16* const* values, int64_t width, int64_t dim, float* sums) {
  alignas(64) uint32_t weights[Queries][kTile / 2];
  for (int q = 0; q < Queries; ++q)
    for (int64_t k = 0; k < width; k += kLanes)
      round_weights(probs + q * kTile + k, weights[q] + k / 2);
  const int64_t pairs = (width + 1) / 2;
  if (dim % 128 == 0) return add_all<Queries, 4>(weights, values, pairs, dim, sums);
  if (dim % 64 == 0) return add_all<Queries, 2>(weights, values, pairs, dim, sums);
  add_all<Queries, 1>(weights, values, pairs, dim, sums);
}

// The sum of 16 vectors, in the order in which `fold_within_parts` and `fold_parts` add the 16 lanes of one.
inline __m512 fold_lanes(const __m512 (&x)[kLanes]) {
  __m512 part[4];
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p)
    part[p] = _mm512_add_ps(_mm512_add_ps(x[4 * p], x[4 * p + 2]), _mm512_add_ps(x[4 * p + 1], x[4 * p + 3]));
  return _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
}

// Scores [count][64] of up to 64 keys for many queries: keys are transposed once, and a score has one accumulator per lane of
// `score_few`, so that it has the same bits.
inline void score_many(const bf16* queries, int64_t count, const bf16* const* keys, int64_t width, int64_t dim, float* scores) {
  alignas(64) __m512i pairs[kMostDim / 2];
  for (int64_t begin = 0; begin < width; begin += kLanes) {
    for (int64_t d = 0; d < dim; d += 32) transpose_pairs(keys + begin, std::min(kLanes, width - begin), d, pairs + d / 2);
    for (int64_t q = 0; q < count; ++q) {
      __m512 sums[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] = _mm512_setzero_ps();
      for (int64_t d = 0; d < dim; d += 32)
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes; ++lane)
          sums[lane] = dot_pairs(sums[lane], pairs[d / 2 + lane], read_pair(queries + q * dim + d + 2 * lane));
      _mm512_storeu_ps(scores + q * kTile + begin, fold_lanes(sums));
    }
  }
}

// `add_few` for a multiple of four queries: pairs of values are interleaved once.
inline void add_many(const float* probs, int64_t count, const bf16* const* values, int64_t width, int64_t dim, float* sums) {
  constexpr int kAtOnce = 4;
  alignas(64) uint32_t weights[kQueryBlock][kTile / 2];
  alignas(64) __m512i low[kTile / 2], high[kTile / 2];
  for (int64_t q = 0; q < count; ++q)
    for (int64_t k = 0; k < width; k += kLanes) round_weights(probs + q * kTile + k, weights[q] + k / 2);
  const __m512i first = _mm512_load_si512(kInterleave), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const int64_t pairs = (width + 1) / 2;
  for (int64_t offset = 0; offset < dim; offset += 32) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const __m512i a = _mm512_loadu_si512(values[2 * pair] + offset), b = _mm512_loadu_si512(values[2 * pair + 1] + offset);
      low[pair] = _mm512_permutex2var_epi16(a, first, b);
      high[pair] = _mm512_permutex2var_epi16(a, second, b);
    }
    for (int64_t q = 0; q < count; q += kAtOnce) {
      float* at = sums + q * dim + offset;
      __m512 left[kAtOnce], right[kAtOnce];
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) left[i] = _mm512_loadu_ps(at + i * dim), right[i] = _mm512_loadu_ps(at + i * dim + 16);
      for (int64_t pair = 0; pair < pairs; ++pair)
#pragma GCC unroll 4
        for (int i = 0; i < kAtOnce; ++i) {
          left[i] = dot_pairs(left[i], low[pair], weights[q + i][pair]);
          right[i] = dot_pairs(right[i], high[pair], weights[q + i][pair]);
        }
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) _mm512_storeu_ps(at + i * dim, left[i]), _mm512_storeu_ps(at + i * dim + 16, right[i]);
    }
  }
}

using ScoreFew = void (*)(const bf16*, const bf16* const*, int64_t, int64_t, float*);
using AddFew = void (*)(const float*, const bf16* const*, int64_t, int64_t, float*);
constexpr ScoreFew kScoreFew[] = {score_few<1>, score_few<2>, score_few<3>, score_few<4>};
constexpr AddFew kAddFew[] = {add_few<1>, add_few<2>, add_few<3>, add_few<4>, add_few<5>, add_few<6>, add_few<7>, add_few<8>};

// Scores [count][64] of up to 64 keys.
inline void score_avx512(const bf16* queries, int64_t count, const bf16* const* keys, int64_t width, int64_t dim, float* scores) {
  if (count >= kMany && dim <= kMostDim) return score_many(queries, count, keys, width, dim, scores);
  for (int64_t q = 0; q < count; q += kScoredAtOnce)
    kScoreFew[std::min(count - q, kScoredAtOnce) - 1](queries + q * dim, keys, width, dim, scores + q * kTile);
}

// See `add_few`.
inline void add_avx512(const float* probs, int64_t count, const bf16* const* values, int64_t width, int64_t dim, float* sums) {
  int64_t q = count >= kMany ? count / 4 * 4 : 0;
  if (q) add_many(probs, q, values, width, dim, sums);
  for (; q < count; q += kAddedAtOnce)
    kAddFew[std::min(count - q, kAddedAtOnce) - 1](probs + q * kTile, values, width, dim, sums + q * dim);
}

#endif

}  // namespace specplug
