// The pieces of attention on matrix units: queries lie across, one to a lane.
//
// A product of two matrices is as fast whichever of them is turned. With queries across, keys are multiplied as they lie in the
// cache, and the softmax of 16 queries goes from entry to entry without adding up the lanes of a vector, which is what would limit
// a prompt. Whatever is computed together, every query's sums are added up in the same order, and come out bit for bit the same.
#pragma once

#include "ahead.h"
#include "matrix.h"
#include "softmax.h"

namespace specplug {

#if SPECPLUG_MATRIX

constexpr int64_t kAcross = kLanes;  // queries of a block
constexpr int64_t kTileKeys = 32;    // per tile of values
constexpr int64_t kTileElements = kTileRows * kTileInputs;

// Up to 16 queries become tiles: [dim / 32][16 pairs of inputs][16 queries][2].
inline void turn_queries(const bf16* const* queries, int64_t count, int64_t dim, bf16* tiles) {
  for (int64_t part = 0; part < dim / kTileInputs; ++part)
    transpose_pairs(queries, count, part * kTileInputs, reinterpret_cast<__m512i*>(tiles + part * kTileElements));
}

// Where 16 keys each of a tile begin: in the cache, if they lie there one after the other; else copies in `room`.
struct KeyGroups {
  const bf16* first[kTile / kLanes];
  int64_t count;
};

inline KeyGroups group_keys(const bf16* const* keys, int64_t width, int64_t dim, bf16* room, Ahead<bf16>& ahead) {
  KeyGroups groups{{}, (width + kLanes - 1) / kLanes};
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t begin = group * kLanes, count = std::min(kLanes, width - begin);
    groups.first[group] = keys[begin];
    ahead.step();
    if (count == kLanes && keys[begin + kLanes - 1] == keys[begin] + (kLanes - 1) * dim) continue;
    bf16* to = room + begin * dim;
    for (int64_t key = 0; key < count; ++key) std::memcpy(to + key * dim, keys[begin + key], dim * sizeof(bf16));
    std::memset(to + count * dim, 0, (kLanes - count) * dim * sizeof(bf16));
    groups.first[group] = to;
  }
  return groups;
}

// Scores [64][16] of 16 queries against the groups' keys.
inline void score_across(const KeyGroups& keys, const bf16* queries, int64_t dim, float* scores) {
  settle();
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
    _tile_stored(0, scores + group * kLanes * kAcross, 64);
    if (both) _tile_stored(1, scores + (group + 1) * kLanes * kAcross, 64);
  }
  settle();
}

// The order that interleaves the halves of a row.
alignas(64) inline constexpr int16_t kInterleaveHalves[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// Takes in scores of `groups` times 16 keys, as `softmax_tile` does for each query: `weights` become tiles, [2][16 pairs of
// keys][16 queries][2]. Returns what earlier weights shrink by.
inline __m512 softmax_across(const float* scores, int64_t groups, float factor, float* highest, float* total, bf16* weights,
                             Ahead<bf16>& ahead) {
  const __m512 factors = _mm512_set1_ps(factor), before = _mm512_load_ps(highest);
  __m512 most[4];
  for (int64_t i = 0; i < 4; ++i) most[i] = _mm512_load_ps(scores + i * kAcross);
  for (int64_t key = 4; key < groups * kLanes; key += 4)
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) most[i] = _mm512_max_ps(most[i], _mm512_load_ps(scores + (key + i) * kAcross));
  const __m512 highest_score = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
  const __m512 top = _mm512_max_ps(before, _mm512_mul_ps(highest_score, factors));
  const __m512 base = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(top, _mm512_set1_ps(kNone), _CMP_NEQ_UQ), top);
  const __m512i in_pairs = _mm512_load_si512(kInterleaveHalves);
  alignas(64) __m512 sums[kLanes];
  for (int64_t lane = 0; lane < kLanes; lane += 2) {  // added up in the order in which a vector's lanes would be
    ahead.step();
    __m512 even_sum = _mm512_setzero_ps(), odd_sum = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t key = group * kLanes + lane;
      const __m512 even = exp2_nonpositive(_mm512_fmsub_ps(_mm512_load_ps(scores + key * kAcross), factors, base));
      const __m512 odd = exp2_nonpositive(_mm512_fmsub_ps(_mm512_load_ps(scores + (key + 1) * kAcross), factors, base));
      even_sum = _mm512_add_ps(even_sum, even);
      odd_sum = _mm512_add_ps(odd_sum, odd);
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
      _mm512_store_si512(weights + key * kAcross, _mm512_permutexvar_epi16(in_pairs, rounded));
    }
    sums[lane] = even_sum;
    sums[lane + 1] = odd_sum;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] = _mm512_add_ps(sums[lane + half], sums[lane]);
  if (groups % 2) std::memset(weights + groups * kLanes * kAcross, 0, kLanes * kAcross * sizeof(bf16));
  const __mmask16 grew = _mm512_cmp_ps_mask(top, before, _CMP_NEQ_UQ);
  __m512 shrink = _mm512_set1_ps(1.0f);
  if (grew) shrink = _mm512_mask_mov_ps(shrink, grew, exp2_nonpositive(_mm512_sub_ps(before, top)));
  _mm512_store_ps(highest, top);
  _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), shrink, sums[0]));
  return shrink;
}

// Up to 64 values become tiles: [dim / 16][2][16 pairs of values][16 elements][2]; if `Turned`, [dim / 16][2][16 elements][32
// values], which takes longer.
template <bool Turned>
inline void arrange_values(const bf16* const* values, int64_t width, int64_t dim, bf16* tiles, Ahead<bf16>& ahead) {
  const __m512i first = _mm512_load_si512(kInterleave), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  __m512i low[kLanes], high[kLanes];
  for (int64_t half = 0; half < 2 && half * kTileKeys < width; ++half) {
    const bf16* const* own = values + half * kTileKeys;
    const int64_t count = std::min(kTileKeys, width - half * kTileKeys);
    for (int64_t d = 0; d < dim; d += 32) {
      for (int64_t pair = 0; pair < kLanes; ++pair) {
        if (pair % 4 == 0) ahead.step();
        const __m512i a = 2 * pair < count ? _mm512_loadu_si512(own[2 * pair] + d) : _mm512_setzero_si512();
        const __m512i b = 2 * pair + 1 < count ? _mm512_loadu_si512(own[2 * pair + 1] + d) : _mm512_setzero_si512();
        low[pair] = _mm512_permutex2var_epi16(a, first, b);
        high[pair] = _mm512_permutex2var_epi16(a, second, b);
      }
      auto* to = reinterpret_cast<__m512i*>(tiles + (d / 16 * 2 + half) * kTileElements);
      if constexpr (Turned) {
        transpose(low, to);
        transpose(high, to + 2 * kTileElements / 32);
      } else {
        std::copy(low, low + kLanes, to);
        std::copy(high, high + kLanes, to + 2 * kTileElements / 32);
      }
    }
  }
}

// Weights of `width` keys, [2][16 pairs of keys][16 queries][2], become [2][16 queries][32 keys].
inline void turn_weights(int64_t width, bf16* weights) {
  __m512i rows[kLanes];
  for (int64_t half = 0; half * kTileKeys < width; ++half) {
    auto* own = reinterpret_cast<__m512i*>(weights + half * kTileElements);
    std::copy(own, own + kLanes, rows);
    transpose(rows, own);
  }
}

// The sums of 16 queries: [dim / 16][16 queries][16 elements]; if `Turned`, [dim / 16][16 elements][16 queries]. They shrink, and
// the weights of `width` values are added; if the values are not turned, the weights have to be.
template <bool Turned>
inline void add_across(const bf16* values, int64_t width, const bf16* weights, __m512 shrink, int64_t dim, float* sums) {
  if (_mm512_cmp_ps_mask(shrink, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ)) {
    alignas(64) float factors[kAcross];
    _mm512_store_ps(factors, shrink);
    for (int64_t row = 0; row < dim; ++row) {
      const __m512 factor = Turned ? shrink : _mm512_set1_ps(factors[row % kAcross]);
      _mm512_store_ps(sums + row * kAcross, _mm512_mul_ps(_mm512_load_ps(sums + row * kAcross), factor));
    }
  }
  settle();
  for (int64_t d = 0; d < dim; d += 32) {
    float* to = sums + d * kAcross;
    _tile_loadd(2, to, 64);
    _tile_loadd(3, to + 16 * kAcross, 64);
    for (int64_t half = 0; half * kTileKeys < width; ++half) {
      const bf16* own = values + (d / 16 * 2 + half) * kTileElements;
      _tile_loadd(6, weights + half * kTileElements, 64);
      _tile_loadd(4, own, 64);
      _tile_loadd(5, own + 2 * kTileElements, 64);
      if constexpr (Turned) {
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
      } else {
        _tile_dpbf16ps(2, 6, 4);
        _tile_dpbf16ps(3, 6, 5);
      }
    }
    _tile_stored(2, to, 64);
    _tile_stored(3, to + 16 * kAcross, 64);
  }
  settle();
}

// Sums, laid out in one of these ways, become [16 queries][dim], in `rows`.
template <bool Turned>
inline void arrange_sums(const float* sums, int64_t dim, float* rows) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    __m512i own[kLanes], turned[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) own[i] = _mm512_load_si512(sums + (d + i) * kAcross);
    if constexpr (Turned) transpose(own, turned);
    for (int64_t q = 0; q < kLanes; ++q) _mm512_storeu_si512(rows + q * dim + d, Turned ? turned[q] : own[q]);
  }
}

#endif

}  // namespace specplug
