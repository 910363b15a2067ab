// Scores and values of a tile of keys on matrix units, for any number of queries.
//
// Keys and values are rearranged into tiles once for all queries of a block, and brought in ahead: memory is the limit for a
// decoding row, the softmax for a prompt. A query's result does not depend on the queries beside it, to the bit, as long as its
// tiles begin with the same entries.
#pragma once

#include "few.h"
#include "matrix.h"

namespace specplug {

#if SPECPLUG_MATRIX

constexpr int64_t kTileKeys = 32;  // per tile of values
constexpr int64_t kTileElements = kTileRows * kTileInputs;

// Reads memory as it lies, ahead of those who need it in another order.
inline void bring_in_bytes(const bf16* from, int64_t bytes) {
  const char* at = reinterpret_cast<const char*>(from);
#pragma GCC unroll 4
  for (int64_t line = 0; line < bytes; line += 64) {
    _mm_prefetch(at + line + kAhead, _MM_HINT_T0);
    static_cast<void>(*reinterpret_cast<const volatile int64_t*>(at + line));
  }
}

// The same for up to 16 rows, most often one after the other.
inline void bring_in_rows(const bf16* const* rows, int64_t count, int64_t dim) {
  const int64_t bytes = dim * static_cast<int64_t>(sizeof(bf16));
  if (rows[count - 1] == rows[0] + (count - 1) * dim) return bring_in_bytes(rows[0], count * bytes);
  for (int64_t row = 0; row < count; ++row) bring_in_bytes(rows[row], bytes);
}

// Scores [16 x blocks][64] of queries [16 x blocks][dim] against up to 64 keys; `tiles` has room for 64 x dim.
inline void score_on_matrix_units(const bf16* queries, int64_t blocks, const bf16* const* keys, int64_t width, int64_t dim,
                                  float* scores, bf16* tiles) {
  const int64_t groups = (width + kLanes - 1) / kLanes, parts = dim / kTileInputs;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * kLanes, count = std::min(kLanes, width - first);
    bring_in_rows(keys + first, count, dim);
    for (int64_t part = 0; part < parts; ++part)
      transpose_pairs(keys + first, count, part * kTileInputs,
                      reinterpret_cast<__m512i*>(tiles + (part * 4 + group) * kTileElements));
  }
  settle();
  for (int64_t block = 0; block < blocks; ++block) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t part = 0; part < parts; ++part) {
      const bf16* own = tiles + part * 4 * kTileElements;
      _tile_loadd(4, queries + block * kTileRows * dim + part * kTileInputs, dim * sizeof(bf16));
      _tile_loadd(6, own, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (groups > 1) {
        _tile_loadd(7, own + kTileElements, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (groups > 2) {
        _tile_loadd(6, own + 2 * kTileElements, 64);
        _tile_dpbf16ps(2, 4, 6);
      }
      if (groups > 3) {
        _tile_loadd(7, own + 3 * kTileElements, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    float* to = scores + block * kTileRows * kTile;
    _tile_stored(0, to, kTile * sizeof(float));
    if (groups > 1) _tile_stored(1, to + 16, kTile * sizeof(float));
    if (groups > 2) _tile_stored(2, to + 32, kTile * sizeof(float));
    if (groups > 3) _tile_stored(3, to + 48, kTile * sizeof(float));
  }
  settle();
}

// Adds probabilities [count][64], zero up to the next multiple of 16, times the values to sums [16 x blocks][dim]. `tiles` has
// room for 64 x dim, `weights` for [16 x blocks][64].
inline void add_on_matrix_units(const float* probs, int64_t count, int64_t blocks, const bf16* const* values,
                                int64_t width, int64_t dim, float* sums, bf16* tiles, bf16* weights) {
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes, halves = (width + kTileKeys - 1) / kTileKeys;
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t k = 0; k < padded; k += kLanes)
      round_weights(probs + q * kTile + k, reinterpret_cast<uint32_t*>(weights + q * kTile + k));
    if (padded < halves * kTileKeys)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + q * kTile + padded), _mm256_setzero_si256());
  }
  const __m512i first = _mm512_load_si512(kInterleave), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const int64_t columns = dim / 16;
  for (int64_t pair = 0; pair < halves * kTileKeys / 2; ++pair) {
    bf16* to = tiles + pair / kTileRows * columns * kTileElements + pair % kTileRows * kTileInputs;
    const bf16 *even = 2 * pair < width ? values[2 * pair] : nullptr;
    const bf16* odd = 2 * pair + 1 < width ? values[2 * pair + 1] : nullptr;
    if (pair % (kLanes / 2) == 0 && even) bring_in_rows(values + 2 * pair, std::min(kLanes, width - 2 * pair), dim);
    for (int64_t d = 0; d < dim; d += 32, to += 2 * kTileElements) {
      const __m512i a = even ? _mm512_loadu_si512(even + d) : _mm512_setzero_si512();
      const __m512i b = odd ? _mm512_loadu_si512(odd + d) : _mm512_setzero_si512();
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, first, b));
      _mm512_storeu_si512(to + kTileElements, _mm512_permutex2var_epi16(a, second, b));
    }
  }
  settle();
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t column = 0; column < columns; column += 2) {
      float* sum = sums + block * kTileRows * dim + column * 16;
      const bf16 *own = weights + block * kTileRows * kTile, *from = tiles + column * kTileElements;
      _tile_loadd(0, sum, dim * sizeof(float));
      _tile_loadd(1, sum + 16, dim * sizeof(float));
      for (int64_t half = 0; half < halves; ++half) {
        _tile_loadd(4, own + half * kTileKeys, kTile * sizeof(bf16));
        _tile_loadd(6, from + half * columns * kTileElements, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, from + half * columns * kTileElements + kTileElements, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, sum, dim * sizeof(float));
      _tile_stored(1, sum + 16, dim * sizeof(float));
    }
  settle();
}

#endif

}  // namespace specplug
