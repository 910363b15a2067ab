// Building blocks of attention on AMX. Queries are the columns: one query per vector lane.
//
// With queries as columns, keys are multiplied in their cache layout, and the softmax of 16 queries runs down the keys without
// horizontal sums, which would limit prefill. Every query sums its terms in a fixed order, so its result is bit-equal in any batch.
#pragma once

#include "attention/attention_avx512.h"
#include "attention/prefetch.h"
#include "gemm/gemm_amx.h"
#include "attention/softmax.h"

namespace specplug {

#if SPECPLUG_AMX

constexpr int64_t kAmxQueries = kLanes;  // queries per block
constexpr int64_t kTileKeys = 32;    // keys per tile of values
constexpr int64_t kTileElements = kTileRows * kTileInputs;

// Packs up to 16 queries into tiles [dim / 32][16 pairs of inputs][16 queries][2].
inline void tile_queries(const bf16* const* queries, int64_t count, int64_t dim, bf16* tiles) {
  for (int64_t part = 0; part < dim / kTileInputs; ++part)
    transpose_pairs(queries, count, part * kTileInputs, reinterpret_cast<__m512i*>(tiles + part * kTileElements));
}

// Start of each group of 16 keys: in the cache if the keys are contiguous there, else a copy in `buffer`.
struct KeyGroups {
  const bf16* first[kTile / kLanes];
  int64_t count;
};

inline KeyGroups group_keys(const bf16* const* keys, int64_t width, int64_t dim, bf16* buffer, Prefetcher<bf16>& prefetcher) {
  KeyGroups groups{{}, (width + kLanes - 1) / kLanes};
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t begin = group * kLanes, count = std::min(kLanes, width - begin);
    groups.first[group] = keys[begin];
    prefetcher.step();
    if (count == kLanes && keys[begin + kLanes - 1] == keys[begin] + (kLanes - 1) * dim) continue;
    bf16* to = buffer + begin * dim;
    for (int64_t key = 0; key < count; ++key) std::memcpy(to + key * dim, keys[begin + key], dim * sizeof(bf16));
    std::memset(to + count * dim, 0, (kLanes - count) * dim * sizeof(bf16));
    groups.first[group] = to;
  }
  return groups;
}

// Scores [64][16] of 16 queries against the key groups.
inline void score_amx(const KeyGroups& keys, const bf16* queries, int64_t dim, float* scores) {
  compiler_barrier();
  for (int64_t group = 0; group < keys.count; group += 2) {
    const bool both = group + 1 < keys.count;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t part = 0; part < dim / kTileInputs; ++part) {
      _tile_loadd(7, queries + part * kTileElements, 64);
      _tile_loadd(4, keys.first[group] + part * kTileInputs, dim * sizeof(bf16));
      _tile_dpbf16ps(0, 4, 7);
      if (both) {
        _tile_loadd(5, keys.first[group + 1] + part * kTileInputs, dim * sizeof(bf16));
        _tile_dpbf16ps(1, 5, 7);
      }
    }
    _tile_stored(0, scores + group * kLanes * kAmxQueries, 64);
    if (both) _tile_stored(1, scores + (group + 1) * kLanes * kAmxQueries, 64);
  }
  compiler_barrier();
}

// Permutation that interleaves the two halves of a row.
alignas(64) inline constexpr int16_t kInterleaveHalves[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// Online softmax of `groups` x 16 keys for 16 queries, as `softmax_tile` does for one. Writes `weights` as tiles [2][16 pairs of
// keys][16 queries][2]. Returns the factors by which earlier sums are rescaled.
inline __m512 softmax_amx(const float* scores, int64_t groups, float factor, float* highest, float* total, bf16* weights,
                             Prefetcher<bf16>& prefetcher) {
  const __m512 factors = _mm512_set1_ps(factor), before = _mm512_load_ps(highest);
  __m512 most[4];
  for (int64_t i = 0; i < 4; ++i) most[i] = _mm512_load_ps(scores + i * kAmxQueries);
  for (int64_t key = 4; key < groups * kLanes; key += 4)
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) most[i] = _mm512_max_ps(most[i], _mm512_load_ps(scores + (key + i) * kAmxQueries));
  const __m512 highest_score = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
  const __m512 top = _mm512_max_ps(before, _mm512_mul_ps(highest_score, factors));
  const __m512 base = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(top, _mm512_set1_ps(kMasked), _CMP_NEQ_UQ), top);
  const __m512i in_pairs = _mm512_load_si512(kInterleaveHalves);
  alignas(64) __m512 sums[kLanes];
  for (int64_t lane = 0; lane < kLanes; lane += 2) {  // same order as a horizontal sum of a vector's lanes
    prefetcher.step();
    __m512 even_sum = _mm512_setzero_ps(), odd_sum = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t key = group * kLanes + lane;
      const __m512 even = exp2_nonpositive(_mm512_fmsub_ps(_mm512_load_ps(scores + key * kAmxQueries), factors, base));
      const __m512 odd = exp2_nonpositive(_mm512_fmsub_ps(_mm512_load_ps(scores + (key + 1) * kAmxQueries), factors, base));
      even_sum = _mm512_add_ps(even_sum, even);
      odd_sum = _mm512_add_ps(odd_sum, odd);
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
      _mm512_store_si512(weights + key * kAmxQueries, _mm512_permutexvar_epi16(in_pairs, rounded));
    }
    sums[lane] = even_sum;
    sums[lane + 1] = odd_sum;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] = _mm512_add_ps(sums[lane + half], sums[lane]);
  if (groups % 2) std::memset(weights + groups * kLanes * kAmxQueries, 0, kLanes * kAmxQueries * sizeof(bf16));
  const __mmask16 grew = _mm512_cmp_ps_mask(top, before, _CMP_NEQ_UQ);
  __m512 shrink = _mm512_set1_ps(1.0f);
  if (grew) shrink = _mm512_mask_mov_ps(shrink, grew, exp2_nonpositive(_mm512_sub_ps(before, top)));
  _mm512_store_ps(highest, top);
  _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), shrink, sums[0]));
  return shrink;
}

// Packs up to 64 values into tiles [dim / 16][2][16 pairs of values][16 elements][2], or if `Transposed` into [dim / 16][2][16
// elements][32 values], which is slower.
template <bool Transposed>
inline void arrange_values(const bf16* const* values, int64_t width, int64_t dim, bf16* tiles, Prefetcher<bf16>& prefetcher) {
  const __m512i first = _mm512_load_si512(kInterleave), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  __m512i low[kLanes], high[kLanes];
  for (int64_t half = 0; half < 2 && half * kTileKeys < width; ++half) {
    const bf16* const* own = values + half * kTileKeys;
    const int64_t count = std::min(kTileKeys, width - half * kTileKeys);
    for (int64_t d = 0; d < dim; d += 32) {
      for (int64_t pair = 0; pair < kLanes; ++pair) {
        if (pair % 4 == 0) prefetcher.step();
        const __m512i a = 2 * pair < count ? _mm512_loadu_si512(own[2 * pair] + d) : _mm512_setzero_si512();
        const __m512i b = 2 * pair + 1 < count ? _mm512_loadu_si512(own[2 * pair + 1] + d) : _mm512_setzero_si512();
        low[pair] = _mm512_permutex2var_epi16(a, first, b);
        high[pair] = _mm512_permutex2var_epi16(a, second, b);
      }
      auto* to = reinterpret_cast<__m512i*>(tiles + (d / 16 * 2 + half) * kTileElements);
      if constexpr (Transposed) {
        transpose(low, to);
        transpose(high, to + 2 * kTileElements / 32);
      } else {
        std::copy(low, low + kLanes, to);
        std::copy(high, high + kLanes, to + 2 * kTileElements / 32);
      }
    }
  }
}

// Transposes the weights of `width` keys: [2][16 pairs of keys][16 queries][2] to [2][16 queries][32 keys].
inline void transpose_weights(int64_t width, bf16* weights) {
  __m512i rows[kLanes];
  for (int64_t half = 0; half * kTileKeys < width; ++half) {
    auto* own = reinterpret_cast<__m512i*>(weights + half * kTileElements);
    std::copy(own, own + kLanes, rows);
    transpose(rows, own);
  }
}

// Rescales the sums of 16 queries and adds the weighted values. Sums are [dim / 16][16 queries][16 elements], or if `Transposed`
// [dim / 16][16 elements][16 queries]. Either the values or the weights must be transposed.
template <bool Transposed>
inline void add_amx(const bf16* values, int64_t width, const bf16* weights, __m512 shrink, int64_t dim, float* sums) {
  if (_mm512_cmp_ps_mask(shrink, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ)) {
    alignas(64) float factors[kAmxQueries];
    _mm512_store_ps(factors, shrink);
    for (int64_t row = 0; row < dim; ++row) {
      const __m512 factor = Transposed ? shrink : _mm512_set1_ps(factors[row % kAmxQueries]);
      _mm512_store_ps(sums + row * kAmxQueries, _mm512_mul_ps(_mm512_load_ps(sums + row * kAmxQueries), factor));
    }
  }
  compiler_barrier();
  for (int64_t d = 0; d < dim; d += 32) {
    float* to = sums + d * kAmxQueries;
    _tile_loadd(2, to, 64);
    _tile_loadd(3, to + 16 * kAmxQueries, 64);
    for (int64_t half = 0; half * kTileKeys < width; ++half) {
      const bf16* own = values + (d / 16 * 2 + half) * kTileElements;
      _tile_loadd(6, weights + half * kTileElements, 64);
      _tile_loadd(4, own, 64);
      _tile_loadd(5, own + 2 * kTileElements, 64);
      if constexpr (Transposed) {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
      } else {
        _tile_dpbf16ps(2, 6, 4);
        _tile_dpbf16ps(3, 6, 5);
      }
    }
    _tile_stored(2, to, 64);
    _tile_stored(3, to + 16 * kAmxQueries, 64);
  }
  compiler_barrier();
}

// Copies sums in either layout to `rows` [16 queries][dim].
template <bool Transposed>
inline void arrange_sums(const float* sums, int64_t dim, float* rows) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    __m512i own[kLanes], rotated[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) own[i] = _mm512_load_si512(sums + (d + i) * kAmxQueries);
    if constexpr (Transposed) transpose(own, rotated);
    for (int64_t q = 0; q < kLanes; ++q) _mm512_storeu_si512(rows + q * dim + d, Transposed ? rotated[q] : own[q]);
  }
}

#endif

}  // namespace specplug
