// Attention of ragged rows over a paged KV cache, trees included.
//
// Of a share, keys are visited in tiles: scores of a tile, an online softmax in float32, then the tile's values. Nothing
// depends on the context length but the keys that are read. Threads take shares as they come to them, the largest first; who
// finishes the last range of a block that was cut puts its softmaxes together, in the order of the entries.
#pragma once

#include <atomic>

#include "few.h"
#include "shares.h"
#include "softmax.h"

namespace specplug {

// What a share is computed in; every part begins at a multiple of 64.
template <typename T>
struct Scratch {
  float *scores, *highest, *total, *sums;
  T* queries;

  Scratch(std::vector<char>& memory, int64_t num_scores, int64_t count, int64_t value_dim, int64_t key_dim) {
    const int64_t bytes[] = {num_scores * 4, count * 4, count * 4, count * value_dim * 4,
                             count * key_dim * static_cast<int64_t>(sizeof(T))};
    int64_t begins[6] = {};
    for (int part = 0; part < 5; ++part) begins[part + 1] = begins[part] + (bytes[part] + 63) / 64 * 64;
    if (static_cast<int64_t>(memory.size()) < begins[5] + 64) memory.resize(begins[5] + 64);
    char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    scores = reinterpret_cast<float*>(base);
    highest = reinterpret_cast<float*>(base + begins[1]);
    total = reinterpret_cast<float*>(base + begins[2]);
    sums = reinterpret_cast<float*>(base + begins[3]);
    queries = reinterpret_cast<T*>(base + begins[4]);
  }
};

// Attention of one batch in one layer.
template <typename T>
class Attention {
 public:
  Attention(const T* query, const T* keys, const T* values, T* out, const Plan& plan, const Shape& shape, const float* sinks,
            Shares& shares, float* partials)
      : query_(query), keys_(keys), values_(values), out_(out), plan_(plan), shape_(shape), sinks_(sinks), shares_(shares),
        partials_(partials) {}

  // Any number of threads may do this at once; together they do all shares.
  void work() {
    thread_local std::vector<char> memory;
    const int64_t count = static_cast<int64_t>(shares_.order.size());
    for (int64_t next = next_++; next < count; next = next_++) attend(shares_.items[shares_.order[next]], memory);
  }

 private:
  void attend(const Share& share, std::vector<char>& memory) {
    const Row row = plan_.row(share.row);
    const int64_t group = shape_.heads / shape_.kv_heads, count = share.last - share.first;
    const int64_t start = row.length - row.count, dim = shape_.value_dim;
    const bool is_few = reads_in_order(count);
    const int64_t size = is_few ? few_tile(shape_.key_dim) : kTile;
    Scratch<T> scratch(memory, count * kTile, count, dim, shape_.key_dim);
    float *scores = scratch.scores, *highest = scratch.highest, *total = scratch.total, *sums = scratch.sums;
    T* own = scratch.queries;
    int64_t token[kQueryBlock], position[kQueryBlock];
    const float factor = (shape_.softcap > 0 ? 1.0f : shape_.scaling) * kLog2E;
    const bool has_sink = sinks_ && share.begin == share.reach.low;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t head = share.head * group + (share.first + q) / row.count;
      token[q] = (share.first + q) % row.count;
      position[q] = plan_.position(row, start + token[q]);
      std::memcpy(own + q * shape_.key_dim, query_ + head * shape_.query_head + (row.query + token[q]) * shape_.query_token,
                  sizeof(T) * shape_.key_dim);
      highest[q] = has_sink ? sinks_[head] * kLog2E : -std::numeric_limits<float>::infinity();
      total[q] = has_sink ? 1.0f : 0.0f;
    }
    std::fill(sums, sums + count * dim, 0.0f);
    const T *key[kTile + 1], *value[kTile + 1];
    const T* head_keys = keys_ + share.head * shape_.slots * shape_.key_dim;
    const T* head_values = values_ + share.head * shape_.slots * dim;
    for (int64_t tile = share.begin; tile < share.end; tile += size) {
      const int64_t width = std::min(size, share.end - tile), padded = (width + kLanes - 1) / kLanes * kLanes;
      for (int64_t k = 0; k < width; ++k) {
        const int64_t slot = plan_.slot(row, tile + k);
        key[k] = head_keys + slot * shape_.key_dim;
        value[k] = head_values + slot * dim;
      }
      value[width] = value[width - 1];  // the other of an odd pair, with weight 0
      score(is_few, own, count, key, width, scores);
      const bool unmasked = tile + width <= share.reach.plain && tile >= share.reach.in_all_windows &&
                            tile >= row.hidden && !(shape_.window && row.tree >= 0);
      for (int64_t q = 0; q < count; ++q) {
        float* score = scores + q * kTile;
        if (shape_.softcap > 0)
          for (int64_t k = 0; k < width; ++k)
            score[k] = std::tanh(score[k] * shape_.scaling / shape_.softcap) * shape_.softcap;
        for (int64_t k = width; k < padded; ++k) score[k] = -std::numeric_limits<float>::infinity();
        if (!unmasked)
          for (int64_t k = 0; k < width; ++k) {
            const int64_t entry = tile + k;
            const bool seen = plan_.sees(row, token[q], entry) && entry >= row.hidden &&
                              (!shape_.window || position[q] - plan_.position(row, entry) < shape_.window);
            if (!seen) score[k] = -std::numeric_limits<float>::infinity();
          }
        const float shrink = softmax_tile(score, padded, factor, highest[q], total[q]);
        if (shrink != 1.0f) {
          float* own_sums = sums + q * dim;
#pragma omp simd
          for (int64_t d = 0; d < dim; ++d) own_sums[d] *= shrink;
        }
      }
      add(is_few, scores, count, value, width, sums);
    }
    if (share.split < 0) return write(share, row, total, sums);
    Split& split = shares_.splits[share.split];
    const int64_t floats = partial_floats(shape_, count);
    const int64_t range = &share - &shares_.items[split.first_share];
    float* to = partials_ + split.partials + range * floats;
    std::copy(highest, highest + count, to);
    std::copy(total, total + count, to + count);
    std::copy(sums, sums + count * dim, to + 2 * count);
    if (std::atomic_ref<int32_t>(split.left).fetch_sub(1, std::memory_order_acq_rel) == 1) merge(share, row, split);
  }

  // Whether so many queries are few; see `few.h`.
  bool reads_in_order(int64_t count) const {
    if constexpr (kHasFew<T>) return count <= kFewQueries && shape_.key_dim % 32 == 0 && shape_.value_dim % 32 == 0;
    return false;
  }

  void score(bool is_few, const T* queries, int64_t count, const T* const* keys, int64_t width, float* scores) const {
    if constexpr (kHasFew<T>)
      if (is_few) return kScoreFew[count - 1](queries, keys, width, shape_.key_dim, scores);
    Scores<T>::tile(queries, count, keys, width, shape_.key_dim, scores);
  }

  void add(bool is_few, const float* probs, int64_t count, const T* const* values, int64_t width, float* sums) const {
    if constexpr (kHasFew<T>)
      if (is_few) return kAddFew[count - 1](probs, values, width, shape_.value_dim, sums);
    add_values<T>(probs, count, values, width, shape_.value_dim, sums);
  }

  // Puts the ranges of a block together, into the first.
  void merge(const Share& share, const Row& row, const Split& split) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
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
      for (int64_t d = 0; d < dim; ++d) store(to + d, sums[q * dim + d] * inverse);
    }
  }

  const T *query_, *keys_, *values_;
  T* out_;
  const Plan& plan_;
  const Shape& shape_;
  const float* sinks_;
  Shares& shares_;
  float* partials_;
  std::atomic<int64_t> next_{0};
};

}  // namespace specplug
