// Software prefetch of KV entries.
//
// While one tile is computed, a few rows of the next tiles are prefetched at each step, so that memory and compute overlap. The last
// tile of a work item is followed by the first tile of the thread's next item.
#pragma once

#include "attention/paged_kv.h"

namespace specplug {

constexpr int64_t kRowsAStep = 4;
constexpr int64_t kRowsAhead = 40;  // rows of the following tile, when a tile begins

template <typename T>
class Prefetcher {
 public:
  explicit Prefetcher(const PagedKV<T>& cache) : cache_(cache) {}

  // Begins a work item; `next` is the thread's next item, or null.
  void begin(const WorkItem& item, const WorkItem* next) {
    own_ = &item;
    next_ = next;
    if (comes_->item != &item) {
      put(comes_, {&item, item.begin});
      behind_->item = nullptr;
      fetched_ = 0;
    }
    if (!behind_->item) put(behind_, following(*comes_));
  }

  // The next tile of the work item; all its entries have been prefetched.
  const KVTile<T>& advance() {
    while (fetched_ < comes_->rows.count + kRowsAhead && fetch()) continue;
    fetched_ = std::max<int64_t>(0, fetched_ - comes_->rows.count);
    const KVTile<T>& now = comes_->rows;
    comes_ = behind_;
    behind_ = tiles_ + (behind_ - tiles_ + 1) % 3;
    put(behind_, following(*comes_));
    return now;
  }

  // Prefetches a few more rows.
  void step() {
    for (const int64_t end = std::min(fetched_ + kRowsAStep, comes_->rows.count + kRowsAhead); fetched_ < end && fetch();)
      continue;
  }

 private:
  struct Tile {
    const WorkItem* item = nullptr;
    int64_t first = 0;
    KVTile<T> rows;
  };
  struct Place {
    const WorkItem* item;
    int64_t first;
  };

  void put(Tile* tile, Place place) {
    tile->item = place.item;
    tile->first = place.first;
    tile->rows.count = 0;
    if (place.item) cache_.locate(*place.item, place.first, kTile, tile->rows);
  }

  Place following(const Tile& tile) const {
    if (tile.item && tile.first + kTile < tile.item->end) return {tile.item, tile.first + kTile};
    return tile.item == own_ && next_ ? Place{next_, next_->begin} : Place{nullptr, 0};
  }

  // Prefetches the next row; false if there is none.
  bool fetch() {
    const KVTile<T>* rows = &comes_->rows;
    int64_t row = fetched_;
    if (row >= rows->count) row -= rows->count, rows = &behind_->rows;
    if (row >= rows->count) return false;
    const auto bring = [](const T* from, int64_t dim) {
      for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(from + d, 0, 2);
    };
    bring(rows->keys[row], cache_.shape.key_dim);
    bring(rows->values[row], cache_.shape.value_dim);
    ++fetched_;
    return true;
  }

  const PagedKV<T>& cache_;
  const WorkItem *own_ = nullptr, *next_ = nullptr;
  Tile tiles_[3];  // used in rotation
  Tile *comes_ = tiles_, *behind_ = tiles_ + 1;
  int64_t fetched_ = 0;  // rows of the coming tile, then of the one after it
};

}  // namespace specplug
