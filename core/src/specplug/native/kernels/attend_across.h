// Attention of one share on matrix units.
#pragma once

#include "across.h"
#include "scratch.h"
#include "sight.h"

namespace specplug {

#if SPECPLUG_MATRIX

constexpr int64_t kFewAcross = 64;  // queries for which it is sooner done to turn the weights than the values

// Of queries at these places; keys and values are arranged once for all of them.
template <bool Turned>
inline void attend_across(const bf16* const* queries, const Shape& shape, const Share& share, const Sight& sight,
                          const Scratch<bf16>& scratch, Ahead<bf16>& ahead) {
  const int64_t count = sight.count(), key_dim = shape.key_dim, dim = shape.value_dim;
  Span spans[kMostQueries / kAcross];
  for (int64_t q = 0; q < count; q += kAcross) {
    const int64_t own = std::min(kAcross, count - q);
    turn_queries(queries + q, own, key_dim, scratch.queries + q * key_dim);
    spans[q / kAcross] = sight.span(q, q + own);
    std::fill(scratch.highest + q + own, scratch.highest + q + kAcross, kNone);
    std::fill(scratch.total + q + own, scratch.total + q + kAcross, 0.0f);
    std::fill(scratch.sums + q * dim, scratch.sums + (q + kAcross) * dim, 0.0f);
  }
  {
    const TileShapes shapes;
    for (int64_t tile = share.begin; tile < share.end; tile += kTile) {
      const Rows<bf16>& rows = ahead.advance();
      const KeyGroups keys = group_keys(rows.keys, rows.count, key_dim, scratch.keys, ahead);
      arrange_values<Turned>(rows.values, rows.count, dim, scratch.values, ahead);
      for (int64_t q = 0; q < count; q += kAcross) {
        const Span& span = spans[q / kAcross];
        if (tile >= span.end) continue;
        float* scores = scratch.scores;
        score_across(keys, scratch.queries + q * key_dim, key_dim, scores);
        shape.cap(scores, rows.count * kAcross);
        std::fill(scores + rows.count * kAcross, scores + keys.count * kLanes * kAcross, kNone);
        if (!span.holds(tile, rows.count)) sight.hide_across(q, tile, rows.count, scores);
        const __m512 shrink = softmax_across(scores, keys.count, shape.factor(), scratch.highest + q, scratch.total + q,
                                             scratch.weights, ahead);
        if (!Turned) turn_weights(rows.count, scratch.weights);
        add_across<Turned>(scratch.values, rows.count, scratch.weights, shrink, dim, scratch.sums + q * dim);
      }
    }
  }
  for (int64_t q = 0; q < count; q += kAcross) {
    arrange_sums<Turned>(scratch.sums + q * dim, dim, scratch.scores);
    std::copy(scratch.scores, scratch.scores + kAcross * dim, scratch.sums + q * dim);
  }
}

#endif

}  // namespace specplug
