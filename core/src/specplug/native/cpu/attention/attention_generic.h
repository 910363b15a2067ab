// Scores and values of one tile of up to 64 keys: portable code.
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

}  // namespace specplug
