// Attention of ragged rows over a paged KV cache, trees included.
//
// One work item is one row, one KV head and a block of its queries. Keys are visited in tiles of 64: scores of a tile, an
// online softmax in float32, then the tile's values. The batch is described by one int32 array, the plan (see
// `attention_plan.py`, which writes it): no tensor is built per row, and nothing depends on the context length but the
// keys that are read.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vector.h"

namespace specplug {

constexpr int64_t kTile = 64;
constexpr int64_t kLanes = 16;
constexpr int64_t kQueryBlock = 64;
constexpr int64_t kHeader = 4;
constexpr int64_t kRowFields = 8;

// One row as the plan describes it.
struct Row {
  int32_t query;       // packed index of its first query
  int32_t count;       // queries
  int32_t length;      // KV entries, the new ones included
  int32_t base;        // first slot, if the row is one slice of the cache, else -1
  int32_t table;       // offset of its block numbers in the plan
  int32_t hidden;      // entries before this one are never seen
  int32_t tree;        // offset of its tree in the plan, or -1
  int32_t prefix;      // entries before this one are plain committed tokens
};

struct Plan {
  const int32_t* data;
  int64_t rows() const { return data[0]; }
  int64_t tokens() const { return data[1]; }
  int64_t block_size() const { return data[2]; }
  Row row(int64_t index) const {
    Row row;
    std::memcpy(&row, data + kHeader + index * kRowFields, sizeof(row));
    return row;
  }
  int64_t slot(const Row& row, int64_t entry) const {
    if (row.base >= 0) return row.base + entry;
    return static_cast<int64_t>(data[row.table + entry / block_size()]) * block_size() + entry % block_size();
  }
  // The tree of a row: positions of the entries behind the prefix, then for each query the bits of those it sees.
  int64_t position(const Row& row, int64_t entry) const {
    return row.tree < 0 || entry < row.prefix ? entry : data[row.tree + entry - row.prefix];
  }
  bool sees(const Row& row, int64_t query, int64_t entry) const {
    if (row.tree < 0) return entry <= row.length - row.count + query;
    if (entry < row.prefix) return true;
    const int64_t tail = row.length - row.prefix, bit = entry - row.prefix, words = (tail + 31) / 32;
    return data[row.tree + tail + query * words + bit / 32] >> (bit % 32) & 1;
  }
};

struct Shape {
  int64_t heads, kv_heads, tokens, key_dim, value_dim, slots;
  int64_t query_head, query_token;  // strides of the queries, in elements; the last dimension is dense
  float scaling;
  int64_t window;
  float softcap;
};

// Scores of `count` queries against a tile of up to 64 keys; the keys of the `next` tile are fetched on the way.
template <typename T>
struct Scores {
  static void tile(const T* queries, int64_t count, const T* const* keys, const T* const*, int64_t width, int64_t dim,
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

// Adds probabilities [count][64] times the tile's values to `sums` [count][dim], and fetches those of the next.
template <typename T>
inline void add_values(const float* probs, int64_t count, const T* const* values, const T* const*, int64_t width, int64_t dim,
                       float* sums) {
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

#if SPECPLUG_BF16_DOT

// Turns 16 keys of 32 elements each into 16 vectors, one per pair of elements, each holding that pair of all keys.
inline void transpose_pairs(const bf16* const* keys, const bf16* const* next, int64_t width, int64_t offset,
                            __m512i* out) {
  for (int k = 0; k < 16; ++k) __builtin_prefetch(next[k] + offset);
  __m512i r[16], t[16];
  for (int k = 0; k < 16; ++k)
    r[k] = k < width ? _mm512_loadu_si512(keys[k] + offset) : _mm512_setzero_si512();
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

template <>
struct Scores<bf16> {
  static void tile(const bf16* queries, int64_t count, const bf16* const* keys, const bf16* const* next, int64_t width,
                   int64_t dim, float* scores) {
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
        transpose_pairs(keys + begin, next + begin, std::min(kLanes, width - begin), offset, pairs);
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

// Values go two by two: their elements are interleaved, and one instruction adds both, weighted. Probabilities are rounded
// to bfloat16 for it, as PyTorch's own kernels do.
template <>
inline void add_values<bf16>(const float* probs, int64_t count, const bf16* const* values, const bf16* const* next,
                             int64_t width, int64_t dim, float* sums) {
  if (dim % 32) {
    for (int64_t q = 0; q < count; ++q)
      for (int64_t k = 0; k < width; ++k)
        for (int64_t d = 0; d < dim; ++d) sums[q * dim + d] += probs[q * kTile + k] * to_float(values[k][d]);
    return;
  }
  alignas(64) uint32_t weights[kQueryBlock][kTile / 2];
  for (int64_t q = 0; q < count; ++q)
    for (int64_t k = 0; k < kTile; k += kLanes) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(probs + q * kTile + k));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights[q] + k / 2), rounded);
    }
  alignas(64) static const int16_t order[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(order), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const int64_t pairs = (width + 1) / 2;
  alignas(64) __m512i low[kTile / 2], high[kTile / 2];
  for (int64_t offset = 0; offset < dim; offset += 32) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      __builtin_prefetch(next[2 * pair] + offset);
      __builtin_prefetch(next[2 * pair + 1] + offset);
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

// Takes the scores of one query against a tile into its softmax: scores become weights relative to the highest score so
// far, `highest` and `total` go on, and the return value is what earlier weights shrink by.
inline float softmax_tile(float* score, float& highest, float& total) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
#if SPECPLUG_VECTOR
  __m512 part[kTile / kLanes];
  __m512 most = _mm512_set1_ps(highest);
  for (int64_t i = 0; i < kTile / kLanes; ++i) {
    part[i] = _mm512_loadu_ps(score + i * kLanes);
    most = _mm512_max_ps(most, part[i]);
  }
  const float top = _mm512_reduce_max_ps(most);
  const __m512 base = _mm512_set1_ps(top == kNone ? 0.0f : top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < kTile / kLanes; ++i) {
    part[i] = exp_nonpositive(_mm512_sub_ps(part[i], base));
    sum = _mm512_add_ps(sum, part[i]);
    _mm512_storeu_ps(score + i * kLanes, part[i]);
  }
  const float added = _mm512_reduce_add_ps(sum);
#else
  float top = highest, added = 0.0f;
  for (int64_t k = 0; k < kTile; ++k) top = score[k] > top ? score[k] : top;
  const float base = top == kNone ? 0.0f : top;
  for (int64_t k = 0; k < kTile; ++k) {
    score[k] = exp_nonpositive(score[k] - base);
    added += score[k];
  }
#endif
  const float shrink = top == highest ? 1.0f : exp_nonpositive(highest - top);
  highest = top;
  total = total * shrink + added;
  return shrink;
}

// A block of queries of one row and one KV head: folded queries [first, last) of group x count, group-major.
template <typename T>
void attend_block(const T* query, const T* keys, const T* values, T* out, const Plan& plan, const Row& row,
                  int64_t kv_head, int64_t first, int64_t last, const Shape& shape, const float* sinks,
                  std::vector<char>& scratch) {
  const int64_t group = shape.heads / shape.kv_heads, count = last - first;
  const int64_t start = row.length - row.count;
  scratch.resize(sizeof(float) * (kQueryBlock * (kTile + 2 + shape.value_dim)) + sizeof(T) * kQueryBlock * shape.key_dim);
  float* scores = reinterpret_cast<float*>(scratch.data());
  float* highest = scores + kQueryBlock * kTile;
  float* total = highest + kQueryBlock;
  float* sums = total + kQueryBlock;
  T* own = reinterpret_cast<T*>(sums + kQueryBlock * shape.value_dim);
  int64_t head[kQueryBlock], token[kQueryBlock], position[kQueryBlock];
  int64_t oldest = std::numeric_limits<int64_t>::max(), newest = 0;
  for (int64_t q = 0; q < count; ++q) {
    head[q] = kv_head * group + (first + q) / row.count;
    token[q] = (first + q) % row.count;
    position[q] = plan.position(row, start + token[q]);
    oldest = std::min(oldest, position[q]);
    newest = std::max(newest, start + token[q]);
    std::memcpy(own + q * shape.key_dim,
                query + head[q] * shape.query_head + (row.query + token[q]) * shape.query_token,
                sizeof(T) * shape.key_dim);
    highest[q] = sinks ? sinks[head[q]] : -std::numeric_limits<float>::infinity();
    total[q] = sinks ? 1.0f : 0.0f;
  }
  std::fill(sums, sums + count * shape.value_dim, 0.0f);
  int64_t low = row.hidden;
  if (shape.window) low = std::max<int64_t>(low, oldest + 1 - shape.window);
  if (row.tree >= 0) low = std::min<int64_t>(low, row.prefix);
  const int64_t end = row.tree >= 0 ? row.length : newest + 1;
  // Entries of [low, plain) are seen by every query of the block, without a look at masks.
  int64_t plain = row.tree >= 0 ? row.prefix : std::min<int64_t>(end, start + token[0] + 1);
  if (row.tree < 0)
    for (int64_t q = 1; q < count; ++q) plain = std::min<int64_t>(plain, start + token[q] + 1);
  const int64_t in_all_windows = shape.window ? std::max<int64_t>(0, newest + 1 - shape.window) : 0;
  const T *key[kTile], *value[kTile], *next_key[kTile] = {}, *next_value[kTile] = {};
  const T* head_keys = keys + kv_head * shape.slots * shape.key_dim;
  const T* head_values = values + kv_head * shape.slots * shape.value_dim;
  // Where the entries of the next tile lie. They are fetched while a tile is computed, a few at a time: the hardware's own
  // prefetching ends with every page.
  const auto locate = [&](int64_t tile) {
    for (int64_t k = 0; k < std::min(kTile, end - tile); ++k) {
      const int64_t slot = plan.slot(row, tile + k);
      next_key[k] = head_keys + slot * shape.key_dim;
      next_value[k] = head_values + slot * shape.value_dim;
    }
  };
  locate(low);
  for (int64_t tile = low; tile < end; tile += kTile) {
    const int64_t width = std::min(kTile, end - tile);
    std::copy(next_key, next_key + width, key);
    std::copy(next_value, next_value + width, value);
    locate(tile + kTile);
    Scores<T>::tile(own, count, key, next_key, width, shape.key_dim, scores);
    const bool unmasked = tile + width <= plain && tile >= in_all_windows && !(shape.window && row.tree >= 0);
    for (int64_t q = 0; q < count; ++q) {
      float* score = scores + q * kTile;
#pragma omp simd
      for (int64_t k = 0; k < kTile; ++k) score[k] *= shape.scaling;
      if (shape.softcap > 0)
        for (int64_t k = 0; k < width; ++k) score[k] = std::tanh(score[k] / shape.softcap) * shape.softcap;
      for (int64_t k = width; k < kTile; ++k) score[k] = -std::numeric_limits<float>::infinity();
      if (!unmasked)
        for (int64_t k = 0; k < width; ++k) {
          const int64_t entry = tile + k;
          const bool seen = plan.sees(row, token[q], entry) && entry >= row.hidden &&
                            (!shape.window || position[q] - plan.position(row, entry) < shape.window);
          if (!seen) score[k] = -std::numeric_limits<float>::infinity();
        }
      const float shrink = softmax_tile(score, highest[q], total[q]);
      if (shrink != 1.0f) {
        float* own_sums = sums + q * shape.value_dim;
#pragma omp simd
        for (int64_t d = 0; d < shape.value_dim; ++d) own_sums[d] *= shrink;
      }
    }
    add_values<T>(scores, count, value, next_value, width, shape.value_dim, sums);
  }
  for (int64_t q = 0; q < count; ++q) {
    T* to = out + ((row.query + token[q]) * shape.heads + head[q]) * shape.value_dim;
    const float inverse = total[q] > 0 ? 1.0f / total[q] : 0.0f;
    for (int64_t d = 0; d < shape.value_dim; ++d) store(to + d, sums[q * shape.value_dim + d] * inverse);
  }
}

}  // namespace specplug
