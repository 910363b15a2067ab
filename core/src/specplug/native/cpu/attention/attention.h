// Attention of ragged rows over a paged KV cache, including draft trees.
//
// For each work item, keys are visited in tiles: scores, online softmax in float32, weighted sum of values. Threads take work items
// largest first. The thread that finishes the last range of a split block merges the partial softmaxes in order of the entries.
#pragma once

#include <atomic>

#include "attention/attention_amx.h"
#include "attention/attention_avx512.h"
#include "attention/attention_avx2.h"

namespace specplug {

// Attention of one batch in one layer.
template <typename T>
class Attention {
 public:
  Attention(const T* query, const T* keys, const T* values, T* out, const Plan& plan, const Shape& shape, const float* sinks,
            Partition& partition, float* partials)
      : query_(query), cache_{keys, values, plan, shape}, out_(out), plan_(plan), shape_(shape), sinks_(sinks),
        partition_(partition), partials_(partials) {}

  // Most queries per work item.
  static int64_t most_queries(const Shape& shape) {
    return kernel_for(shape) == Kernel::kAmx ? kMostQueries : kQueryBlock;
  }

  // Runs on each of `threads` threads; together they process all work items. While more items than threads are left, a thread claims
  // its next item early, so that the item's entries can be prefetched.
  void work(int64_t threads) {
    thread_local std::vector<char> memory;
    Prefetcher<T> prefetcher(cache_);
    const WorkItem* item = take(0);
    while (item) {
      const WorkItem* next = take(threads);
      attend(*item, next, prefetcher, memory);
      item = next ? next : take(0);
    }
  }

 private:
  static Kernel kernel_for(const Shape& shape) {
    if constexpr (kHasAvx512<T>)
      if (shape.key_dim % 32 == 0 && shape.value_dim % 32 == 0) {
        return has_amx() ? Kernel::kAmx : Kernel::kAvx512;
      }
    return Kernel::kGeneric;
  }

  // Claims the next work item if more than `left` remain.
  const WorkItem* take(int64_t left) {
    const int64_t count = static_cast<int64_t>(partition_.order.size());
    if (next_.load(std::memory_order_relaxed) + left >= count) return nullptr;
    const int64_t index = next_++;
    return index < count ? &partition_.items[partition_.order[index]] : nullptr;
  }

  void attend(const WorkItem& item, const WorkItem* next, Prefetcher<T>& prefetcher, std::vector<char>& memory) {
    const Row row = plan_.row(item.row);
    const Mask mask(plan_, row, shape_.window, item.first, item.last);
    const int64_t count = mask.count(), dim = shape_.value_dim;
    const Kernel kernel = kernel_for(shape_);
    const Scratch<T> scratch(memory, kernel, count, shape_.key_dim, dim);
    const bool has_sink = sinks_ && item.begin == item.key_range.low;
    for (int64_t q = 0; q < count; ++q) {
      scratch.highest[q] = has_sink ? sinks_[head_of(item, row, q)] * kLog2E : kMasked;
      scratch.total[q] = has_sink ? 1.0f : 0.0f;
    }
    if (SPECPLUG_AVX2 || kernel == Kernel::kAmx) prefetcher.begin(item, next);
#if SPECPLUG_AMX
    if constexpr (kHasAvx512<T>)
      if (kernel == Kernel::kAmx) {
        const T* queries[kMostQueries];
        for (int64_t q = 0; q < count; ++q) queries[q] = query_of(item, row, q);
        const auto attend = count > kFewAmxQueries ? attend_amx<true> : attend_amx<false>;
        attend(queries, shape_, item, mask, scratch, prefetcher);
        return finish(item, row, scratch.highest, scratch.total, scratch.sums);
      }
#endif
    attend_by_query(kernel, item, row, mask, scratch, prefetcher);
    finish(item, row, scratch.highest, scratch.total, scratch.sums);
  }

  // One query at a time: scores of a tile, softmax, values.
  void attend_by_query(Kernel kernel, const WorkItem& item, const Row& row, const Mask& mask, const Scratch<T>& scratch,
                   Prefetcher<T>& prefetcher) const {
    const int64_t count = mask.count(), dim = shape_.value_dim, key_dim = shape_.key_dim;
    const int64_t size = kernel == Kernel::kAvx512 ? avx512_tile(key_dim) : kTile;
    for (int64_t q = 0; q < count; ++q) {
#if SPECPLUG_AVX2
      if (key_dim % 8 == 0) {
        arrange(query_of(item, row, q), key_dim, scratch.arranged + q * key_dim);
        continue;
      }
#endif
      std::memcpy(scratch.queries + q * key_dim, query_of(item, row, q), sizeof(T) * key_dim);
    }
    std::fill(scratch.sums, scratch.sums + count * dim, 0.0f);
    const Span span = mask.span(0, count);
    KVTile<T> located;
    for (int64_t tile = item.begin; tile < item.end; tile += size) {
      if (!SPECPLUG_AVX2) cache_.locate(item, tile, size, located);
      const KVTile<T>& rows = SPECPLUG_AVX2 ? prefetcher.advance() : located;
      const int64_t width = rows.count, padded = (width + kLanes - 1) / kLanes * kLanes;
      score(kernel, scratch, count, rows, prefetcher);
      const bool unmasked = span.holds(tile, width);
      for (int64_t q = 0; q < count; ++q) {
        float* scores = scratch.scores + q * kTile;
        shape_.cap(scores, width);
        std::fill(scores + width, scores + padded, kMasked);
        if (!unmasked) mask.apply(q, tile, width, scores);
        const float shrink = softmax_tile(scores, padded, shape_.factor(), scratch.highest[q], scratch.total[q]);
        if (shrink != 1.0f) {
          float* sums = scratch.sums + q * dim;
#pragma omp simd
          for (int64_t d = 0; d < dim; ++d) sums[d] *= shrink;
        }
      }
      add(kernel, scratch, count, rows);
    }
#if SPECPLUG_AVX2
    if (dim % 8 == 0)
      for (int64_t q = 0; q < count; ++q) restore_order<T>(scratch.sums + q * dim, dim);
#endif
  }

  // Writes the output of a work item; for the last finished range of a split block, merges the block and writes it.
  void finish(const WorkItem& item, const Row& row, const float* highest, const float* total, const float* sums) {
    if (item.split < 0) return write(item, row, total, sums);
    SplitBlock& split = partition_.splits[item.split];
    const int64_t count = item.last - item.first;
    float* to = partials_ + split.partials + (&item - &partition_.items[split.first_item]) * partial_floats(shape_, count);
    std::copy(highest, highest + count, to);
    std::copy(total, total + count, to + count);
    std::copy(sums, sums + count * shape_.value_dim, to + 2 * count);
    if (std::atomic_ref<int32_t>(split.left).fetch_sub(1, std::memory_order_acq_rel) == 1) merge(item, row, split);
  }

  int64_t head_of(const WorkItem& item, const Row& row, int64_t q) const {
    return item.head * (shape_.heads / shape_.kv_heads) + (item.first + q) / row.count;
  }

  const T* query_of(const WorkItem& item, const Row& row, int64_t q) const {
    return query_ + head_of(item, row, q) * shape_.query_head + (row.query + (item.first + q) % row.count) * shape_.query_token;
  }

  void score([[maybe_unused]] Kernel kernel, const Scratch<T>& scratch, int64_t count, const KVTile<T>& rows,
             [[maybe_unused]] Prefetcher<T>& prefetcher) const {
    const int64_t dim = shape_.key_dim;
#if SPECPLUG_AVX512_BF16
    if constexpr (kHasAvx512<T>) {
      if (kernel == Kernel::kAvx512) return score_avx512(scratch.queries, count, rows.keys, rows.count, dim, scratch.scores);
    }
#endif
#if SPECPLUG_AVX2
    if (dim % 8 == 0)
      return score_avx2(scratch.arranged, count, rows.keys, rows.count, dim, scratch.scores, [&] { prefetcher.step(); });
#endif
    Scores<T>::tile(scratch.queries, count, rows.keys, rows.count, dim, scratch.scores);
  }

  void add([[maybe_unused]] Kernel kernel, const Scratch<T>& scratch, int64_t count, const KVTile<T>& rows) const {
    const int64_t dim = shape_.value_dim;
#if SPECPLUG_AVX512_BF16
    if constexpr (kHasAvx512<T>) {
      if (kernel == Kernel::kAvx512) return add_avx512(scratch.scores, count, rows.values, rows.count, dim, scratch.sums);
    }
#endif
#if SPECPLUG_AVX2
    if (dim % 8 == 0) return add_avx2(scratch.scores, count, rows.values, rows.count, dim, scratch.sums);
#endif
    add_values<T>(scratch.scores, count, rows.values, rows.count, dim, scratch.sums);
  }

  // Merges the ranges of a split block into the first.
  void merge(const WorkItem& item, const Row& row, const SplitBlock& split) {
    const int64_t count = item.last - item.first, dim = shape_.value_dim;
    float* into = partials_ + split.partials;
    for (int64_t range = 1; range < split.ranges; ++range) {
      const float* from = into + range * partial_floats(shape_, count);
      for (int64_t q = 0; q < count; ++q) {
        const float top = std::max(into[q], from[q]);
        const float kept = into[q] == top || top == kMasked ? 1.0f : exp2_nonpositive(into[q] - top);
        const float added = from[q] == top || top == kMasked ? 1.0f : exp2_nonpositive(from[q] - top);
        into[q] = top;
        into[count + q] = into[count + q] * kept + from[count + q] * added;
        float* sum = into + 2 * count + q * dim;
        const float* more = from + 2 * count + q * dim;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) sum[d] = sum[d] * kept + more[d] * added;
      }
    }
    write(item, row, into + count, into + 2 * count);
  }

  void write(const WorkItem& item, const Row& row, const float* total, const float* sums) {
    const int64_t group = shape_.heads / shape_.kv_heads, dim = shape_.value_dim;
    for (int64_t q = 0; q < item.last - item.first; ++q) {
      const int64_t folded = item.first + q, head = item.head * group + folded / row.count;
      T* to = out_ + ((row.query + folded % row.count) * shape_.heads + head) * dim;
      const float inverse = total[q] > 0 ? 1.0f / total[q] : 0.0f;
      store_scaled(to, sums + q * dim, dim, inverse);
    }
  }

  const T* query_;
  const PagedKV<T> cache_;
  T* out_;
  const Plan& plan_;
  const Shape& shape_;
  const float* sinks_;
  Partition& partition_;
  float* partials_;
  std::atomic<int64_t> next_{0};
};

}  // namespace specplug
