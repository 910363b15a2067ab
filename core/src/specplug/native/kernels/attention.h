// Attention of ragged rows over a paged KV cache, trees included.
//
// Of a share, keys are visited in tiles: scores of a tile, an online softmax in float32, then the tile's values. Nothing
// depends on the context length but the keys that are read. Threads take shares as they come to them, the largest first; who
// finishes the last range of a block that was cut puts its softmaxes together, in the order of the entries.
#pragma once

#include <atomic>

#include "attend_across.h"
#include "few.h"
#include "float_tiles.h"

namespace specplug {

// Attention of one batch in one layer.
template <typename T>
class Attention {
 public:
  Attention(const T* query, const T* keys, const T* values, T* out, const Plan& plan, const Shape& shape, const float* sinks,
            Shares& shares, float* partials)
      : query_(query), cache_{keys, values, plan, shape}, out_(out), plan_(plan), shape_(shape), sinks_(sinks),
        shares_(shares), partials_(partials) {}

  // The most queries of a share.
  static int64_t most_queries(const Shape& shape) {
    return way_of(shape, kMostQueries) == Way::kMatrix ? kMostQueries : kQueryBlock;
  }

  // So many threads do this at once; together they do all shares. Each knows its next share, so that its entries can be fetched,
  // as long as there are others for those who have none.
  void work(int64_t threads) {
    thread_local std::vector<char> memory;
    Ahead<T> ahead(cache_);
    const Share* share = take(0);
    while (share) {
      const Share* next = take(threads);
      attend(*share, next, ahead, memory);
      share = next ? next : take(0);
    }
  }

 private:
  static Way way_of(const Shape& shape, int64_t count) {
    if constexpr (kHasFew<T>)
      if (shape.key_dim % 32 == 0 && shape.value_dim % 32 == 0) {
        if (has_matrix_units()) return Way::kMatrix;
        if (count <= kFewQueries) return Way::kFew;
      }
    return Way::kTiles;
  }

  // The next share, if more than so many are left.
  const Share* take(int64_t left) {
    const int64_t count = static_cast<int64_t>(shares_.order.size());
    if (next_.load(std::memory_order_relaxed) + left >= count) return nullptr;
    const int64_t index = next_++;
    return index < count ? &shares_.items[shares_.order[index]] : nullptr;
  }

  void attend(const Share& share, const Share* next, Ahead<T>& ahead, std::vector<char>& memory) {
    const Row row = plan_.row(share.row);
    const Sight sight(plan_, row, shape_.window, share.first, share.last);
    const int64_t count = sight.count(), dim = shape_.value_dim;
    const Way way = way_of(shape_, count);
    const Scratch<T> scratch(memory, way, count, shape_.key_dim, dim);
    const bool has_sink = sinks_ && share.begin == share.reach.low;
    for (int64_t q = 0; q < count; ++q) {
      scratch.highest[q] = has_sink ? sinks_[head_of(share, row, q)] * kLog2E : kNone;
      scratch.total[q] = has_sink ? 1.0f : 0.0f;
    }
    if (SPECPLUG_FLOAT_PAIRS || way == Way::kMatrix) ahead.begin(share, next);
#if SPECPLUG_MATRIX
    if constexpr (kHasFew<T>)
      if (way == Way::kMatrix) {
        const T* queries[kMostQueries];
        for (int64_t q = 0; q < count; ++q) queries[q] = query_of(share, row, q);
        const auto attend = count > kFewAcross ? attend_across<true> : attend_across<false>;
        attend(queries, shape_, share, sight, scratch, ahead);
        return finish(share, row, scratch.highest, scratch.total, scratch.sums);
      }
#endif
    attend_down(way, share, row, sight, scratch, ahead);
    finish(share, row, scratch.highest, scratch.total, scratch.sums);
  }

  // Query after query: scores of a tile, its softmax, its values.
  void attend_down(Way way, const Share& share, const Row& row, const Sight& sight, const Scratch<T>& scratch,
                   Ahead<T>& ahead) const {
    const int64_t count = sight.count(), dim = shape_.value_dim, key_dim = shape_.key_dim;
    const int64_t size = way == Way::kFew ? few_tile(key_dim) : kTile;
    for (int64_t q = 0; q < count; ++q) {
#if SPECPLUG_FLOAT_PAIRS
      if (key_dim % 8 == 0) {
        arrange(query_of(share, row, q), key_dim, scratch.arranged + q * key_dim);
        continue;
      }
#endif
      std::memcpy(scratch.queries + q * key_dim, query_of(share, row, q), sizeof(T) * key_dim);
    }
    std::fill(scratch.sums, scratch.sums + count * dim, 0.0f);
    const Span span = sight.span(0, count);
    Rows<T> located;
    for (int64_t tile = share.begin; tile < share.end; tile += size) {
      if (!SPECPLUG_FLOAT_PAIRS) cache_.locate(share, tile, size, located);
      const Rows<T>& rows = SPECPLUG_FLOAT_PAIRS ? ahead.advance() : located;
      const int64_t width = rows.count, padded = (width + kLanes - 1) / kLanes * kLanes;
      score(way, scratch, count, rows, ahead);
      const bool unmasked = span.holds(tile, width);
      for (int64_t q = 0; q < count; ++q) {
        float* scores = scratch.scores + q * kTile;
        shape_.cap(scores, width);
        std::fill(scores + width, scores + padded, kNone);
        if (!unmasked) sight.hide(q, tile, width, scores);
        const float shrink = softmax_tile(scores, padded, shape_.factor(), scratch.highest[q], scratch.total[q]);
        if (shrink != 1.0f) {
          float* sums = scratch.sums + q * dim;
#pragma omp simd
          for (int64_t d = 0; d < dim; ++d) sums[d] *= shrink;
        }
      }
      add(way, scratch, count, rows);
    }
#if SPECPLUG_FLOAT_PAIRS
    if (dim % 8 == 0)
      for (int64_t q = 0; q < count; ++q) put_in_order<T>(scratch.sums + q * dim, dim);
#endif
  }

  // Writes what became of a share; of a range of a cut block, if it is the last, what became of all.
  void finish(const Share& share, const Row& row, const float* highest, const float* total, const float* sums) {
    if (share.split < 0) return write(share, row, total, sums);
    Split& split = shares_.splits[share.split];
    const int64_t count = share.last - share.first;
    float* to = partials_ + split.partials + (&share - &shares_.items[split.first_share]) * partial_floats(shape_, count);
    std::copy(highest, highest + count, to);
    std::copy(total, total + count, to + count);
    std::copy(sums, sums + count * shape_.value_dim, to + 2 * count);
    if (std::atomic_ref<int32_t>(split.left).fetch_sub(1, std::memory_order_acq_rel) == 1) merge(share, row, split);
  }

  int64_t head_of(const Share& share, const Row& row, int64_t q) const {
    return share.head * (shape_.heads / shape_.kv_heads) + (share.first + q) / row.count;
  }

  const T* query_of(const Share& share, const Row& row, int64_t q) const {
    return query_ + head_of(share, row, q) * shape_.query_head + (row.query + (share.first + q) % row.count) * shape_.query_token;
  }

  void score(Way way, const Scratch<T>& scratch, int64_t count, const Rows<T>& rows, Ahead<T>& ahead) const {
    const int64_t dim = shape_.key_dim;
#if SPECPLUG_BF16_DOT
    if constexpr (kHasFew<T>) {
      if (way == Way::kFew) return kScoreFew[count - 1](scratch.queries, rows.keys, rows.count, dim, scratch.scores);
    }
#endif
#if SPECPLUG_FLOAT_PAIRS
    if (dim % 8 == 0)
      return score_in_floats(scratch.arranged, count, rows.keys, rows.count, dim, scratch.scores, [&] { ahead.step(); });
#endif
    Scores<T>::tile(scratch.queries, count, rows.keys, rows.count, dim, scratch.scores);
  }

  void add(Way way, const Scratch<T>& scratch, int64_t count, const Rows<T>& rows) const {
    const int64_t dim = shape_.value_dim;
#if SPECPLUG_BF16_DOT
    if constexpr (kHasFew<T>) {
      if (way == Way::kFew) return kAddFew[count - 1](scratch.scores, rows.values, rows.count, dim, scratch.sums);
    }
#endif
#if SPECPLUG_FLOAT_PAIRS
    if (dim % 8 == 0) return add_in_floats(scratch.scores, count, rows.values, rows.count, dim, scratch.sums);
#endif
    add_values<T>(scratch.scores, count, rows.values, rows.count, dim, scratch.sums);
  }

  // Puts the ranges of a block together, into the first.
  void merge(const Share& share, const Row& row, const Split& split) {
    const int64_t count = share.last - share.first, dim = shape_.value_dim;
    float* into = partials_ + split.partials;
    for (int64_t range = 1; range < split.ranges; ++range) {
      const float* from = into + range * partial_floats(shape_, count);
      for (int64_t q = 0; q < count; ++q) {
        const float top = std::max(into[q], from[q]);
        const float kept = into[q] == top || top == kNone ? 1.0f : exp2_nonpositive(into[q] - top);
        const float added = from[q] == top || top == kNone ? 1.0f : exp2_nonpositive(from[q] - top);
        into[q] = top;
        into[count + q] = into[count + q] * kept + from[count + q] * added;
        float* sum = into + 2 * count + q * dim;
        const float* more = from + 2 * count + q * dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) sum[d] = sum[d] * kept + more[d] * added;
      }
    }
    write(share, row, into + count, into + 2 * count);
  }

  void write(const Share& share, const Row& row, const float* total, const float* sums) {
    const int64_t group = shape_.heads / shape_.kv_heads, dim = shape_.value_dim;
    for (int64_t q = 0; q < share.last - share.first; ++q) {
      const int64_t folded = share.first + q, head = share.head * group + folded / row.count;
      T* to = out_ + ((row.query + folded % row.count) * shape_.heads + head) * dim;
      const float inverse = total[q] > 0 ? 1.0f / total[q] : 0.0f;
      store_scaled(to, sums + q * dim, dim, inverse);
    }
  }

  const T* query_;
  const Cache<T> cache_;
  T* out_;
  const Plan& plan_;
  const Shape& shape_;
  const float* sinks_;
  Shares& shares_;
  float* partials_;
  std::atomic<int64_t> next_{0};
};

}  // namespace specplug
