// Attention of ragged rows over a paged KV cache, trees included.
//
// Of a share, keys are visited in tiles: scores of a tile, an online softmax in float32, then the tile's values. Nothing
// depends on the context length but the keys that are read. Threads take shares as they come to them, the largest first; who
// finishes the last range of a block that was cut puts its softmaxes together, in the order of the entries.
#pragma once

#include <atomic>
#include <optional>

#include "few.h"
#include "matrix_attention.h"
#include "shares.h"
#include "softmax.h"

namespace specplug {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// How a share is computed: on matrix units; reading keys and values as they lie, for few queries; or in tiles, one by one.
enum class Way { kMatrix, kFew, kTiles };

// What a share is computed in; every part begins at a multiple of 64.
template <typename T>
struct Scratch {
  float *scores, *highest, *total, *sums;
  T *queries, *tiles, *weights;  // the last two for matrix units alone

  Scratch(std::vector<char>& memory, int64_t count, int64_t value_dim, int64_t key_dim, bool on_matrix_units) {
    const int64_t size = sizeof(T), tile_bytes = on_matrix_units ? kTile * std::max(key_dim, value_dim) * size : 0;
    const int64_t weight_bytes = on_matrix_units ? count * kTile * size : 0;
    const int64_t bytes[] = {count * kTile * 4,      count * 4,  count * 4,   count * value_dim * 4,
                             count * key_dim * size, tile_bytes, weight_bytes};
    int64_t begins[8] = {};
    for (int part = 0; part < 7; ++part) begins[part + 1] = begins[part] + (bytes[part] + 63) / 64 * 64;
    if (static_cast<int64_t>(memory.size()) < begins[7] + 64) memory.resize(begins[7] + 64);
    char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    scores = reinterpret_cast<float*>(base);
    highest = reinterpret_cast<float*>(base + begins[1]);
    total = reinterpret_cast<float*>(base + begins[2]);
    sums = reinterpret_cast<float*>(base + begins[3]);
    queries = reinterpret_cast<T*>(base + begins[4]);
    tiles = reinterpret_cast<T*>(base + begins[5]);
    weights = reinterpret_cast<T*>(base + begins[6]);
  }
};

// Where the keys and values of up to a tile of entries lie.
template <typename T>
struct Rows {
  const T *keys[kTile], *values[kTile + 1];
  int64_t count;
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
    const Way way = way_of(count);
    const int64_t size = way == Way::kFew ? few_tile(shape_.key_dim) : kTile;
    const int64_t padded_count = (count + kLanes - 1) / kLanes * kLanes;
    Scratch<T> scratch(memory, way == Way::kMatrix ? padded_count : count, dim, shape_.key_dim, way == Way::kMatrix);
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
      highest[q] = has_sink ? sinks_[head] * kLog2E : kNone;
      total[q] = has_sink ? 1.0f : 0.0f;
    }
    std::fill(sums, sums + count * dim, 0.0f);
    Rows<T> rows;
#if SPECPLUG_MATRIX
    std::optional<TileShapes> shapes;
    if (way == Way::kMatrix) shapes.emplace(std::min(count, kTileRows));
#endif
    for (int64_t tile = share.begin; tile < share.end; tile += size) {
      locate(share, row, tile, size, rows);
      const int64_t width = rows.count, padded = (width + kLanes - 1) / kLanes * kLanes;
      score(way, scratch, count, rows);
      const bool unmasked = tile + width <= share.reach.plain && tile >= share.reach.in_all_windows &&
                            tile >= row.hidden && !(shape_.window && row.tree >= 0);
      for (int64_t q = 0; q < count; ++q) {
        float* score = scores + q * kTile;
        if (shape_.softcap > 0)
          for (int64_t k = 0; k < width; ++k)
            score[k] = std::tanh(score[k] * shape_.scaling / shape_.softcap) * shape_.softcap;
        for (int64_t k = width; k < padded; ++k) score[k] = kNone;
        if (!unmasked && row.tree < 0) {
          const int64_t newest = start + token[q];
          const int64_t oldest = std::max<int64_t>(row.hidden, shape_.window ? newest + 1 - shape_.window : 0);
          std::fill(score, score + std::clamp<int64_t>(oldest - tile, 0, width), kNone);
          std::fill(score + std::clamp<int64_t>(newest + 1 - tile, 0, width), score + width, kNone);
        } else if (!unmasked) {
          for (int64_t k = 0; k < width; ++k) {
            const int64_t entry = tile + k;
            const bool seen = plan_.sees(row, token[q], entry) && entry >= row.hidden &&
                              (!shape_.window || position[q] - plan_.position(row, entry) < shape_.window);
            if (!seen) score[k] = kNone;
          }
        }
        const float shrink = softmax_tile(score, padded, factor, highest[q], total[q]);
        if (shrink != 1.0f) {
          float* own_sums = sums + q * dim;
#pragma omp simd
          for (int64_t d = 0; d < dim; ++d) own_sums[d] *= shrink;
        }
      }
      add(way, scratch, count, rows);
    }
#if SPECPLUG_MATRIX
    shapes.reset();
#endif
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

  // Where the keys and values of a tile's entries lie.
  void locate(const Share& share, const Row& row, int64_t tile, int64_t size, Rows<T>& rows) const {
    rows.count = std::clamp<int64_t>(share.end - tile, 0, size);
    const T* head_keys = keys_ + share.head * shape_.slots * shape_.key_dim;
    const T* head_values = values_ + share.head * shape_.slots * shape_.value_dim;
    for (int64_t k = 0; k < rows.count; ++k) {
      const int64_t slot = plan_.slot(row, tile + k);
      rows.keys[k] = head_keys + slot * shape_.key_dim;
      rows.values[k] = head_values + slot * shape_.value_dim;
    }
    if (rows.count) rows.values[rows.count] = rows.values[rows.count - 1];  // the other of an odd pair, with weight 0
  }

  Way way_of(int64_t count) const {
    if constexpr (kHasFew<T>)
      if (shape_.key_dim % 32 == 0 && shape_.value_dim % 32 == 0) {
        if (has_matrix_units()) return Way::kMatrix;
        if (count <= kFewQueries) return Way::kFew;
      }
    return Way::kTiles;
  }

  void score(Way way, const Scratch<T>& scratch, int64_t count, const Rows<T>& rows) const {
    const int64_t dim = shape_.key_dim;
#if SPECPLUG_BF16_DOT
    if constexpr (kHasFew<T>) {
#if SPECPLUG_MATRIX
      if (way == Way::kMatrix)
        return score_on_matrix_units(scratch.queries, (count + kTileRows - 1) / kTileRows, rows.keys, rows.count, dim,
                                     scratch.scores, scratch.tiles);
#endif
      if (way == Way::kFew) return kScoreFew[count - 1](scratch.queries, rows.keys, rows.count, dim, scratch.scores);
    }
#endif
    Scores<T>::tile(scratch.queries, count, rows.keys, rows.count, dim, scratch.scores);
  }

  void add(Way way, const Scratch<T>& scratch, int64_t count, const Rows<T>& rows) const {
    const int64_t dim = shape_.value_dim;
#if SPECPLUG_BF16_DOT
    if constexpr (kHasFew<T>) {
#if SPECPLUG_MATRIX
      if (way == Way::kMatrix)
        return add_on_matrix_units(scratch.scores, count, (count + kTileRows - 1) / kTileRows, rows.values, rows.count, dim,
                                   scratch.sums, scratch.tiles, scratch.weights);
#endif
      if (way == Way::kFew) return kAddFew[count - 1](scratch.scores, rows.values, rows.count, dim, scratch.sums);
    }
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
