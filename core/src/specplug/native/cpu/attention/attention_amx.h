// Attention of one work item on AMX.
#pragma once

#include "attention/amx_tiles.h"
#include "attention/scratch.h"
#include "attention/mask.h"

namespace specplug {

#if SPECPLUG_AMX

constexpr int64_t kFewAmxQueries = 64;  // up to here transposing the weights is cheaper than transposing the values

// Attends with the given queries. Keys and values of a tile are packed once for all of them.
template <bool Transposed>
inline void attend_amx(const bf16* const* queries, const Shape& shape, const WorkItem& item, const Mask& mask,
                          const Scratch<bf16>& scratch, Prefetcher<bf16>& prefetcher) {
  const int64_t count = mask.count(), key_dim = shape.key_dim, dim = shape.value_dim;
  Span spans[kMostQueries / kAmxQueries];
  for (int64_t q = 0; q < count; q += kAmxQueries) {
    const int64_t own = std::min(kAmxQueries, count - q);
    tile_queries(queries + q, own, key_dim, scratch.queries + q * key_dim);
    spans[q / kAmxQueries] = mask.span(q, q + own);
    std::fill(scratch.highest + q + own, scratch.highest + q + kAmxQueries, kMasked);
    std::fill(scratch.total + q + own, scratch.total + q + kAmxQueries, 0.0f);
    std::fill(scratch.sums + q * dim, scratch.sums + (q + kAmxQueries) * dim, 0.0f);
  }
  {
    const TileShapes shapes;
    for (int64_t tile = item.begin; tile < item.end; tile += kTile) {
      const KVTile<bf16>& rows = prefetcher.advance();
      const KeyGroups keys = group_keys(rows.keys, rows.count, key_dim, scratch.keys, prefetcher);
      arrange_values<Transposed>(rows.values, rows.count, dim, scratch.values, prefetcher);
      for (int64_t q = 0; q < count; q += kAmxQueries) {
        const Span& span = spans[q / kAmxQueries];
        if (tile >= span.end) continue;
        float* scores = scratch.scores;
        score_amx(keys, scratch.queries + q * key_dim, key_dim, scores);
        shape.cap(scores, rows.count * kAmxQueries);
        std::fill(scores + rows.count * kAmxQueries, scores + keys.count * kLanes * kAmxQueries, kMasked);
        if (!span.holds(tile, rows.count)) mask.apply_columns(q, tile, rows.count, scores);
        const __m512 shrink = softmax_amx(scores, keys.count, shape.factor(), scratch.highest + q, scratch.total + q,
                                             scratch.weights, prefetcher);
        if (!Transposed) transpose_weights(rows.count, scratch.weights);
        add_amx<Transposed>(scratch.values, rows.count, scratch.weights, shrink, dim, scratch.sums + q * dim);
      }
    }
  }
  for (int64_t q = 0; q < count; q += kAmxQueries) {
    arrange_sums<Transposed>(scratch.sums + q * dim, dim, scratch.scores);
    std::copy(scratch.scores, scratch.scores + kAmxQueries * dim, scratch.sums + q * dim);
  }
}

#endif

}  // namespace specplug
