// Keys and values that are needed soon, fetched little by little.
//
// Memory is idle while a thread computes, and a thread while it waits for memory, unless the entries of tiles to come are on
// their way while those of this one are worked at: some rows of them at every step of the work. Behind the last tile of a share
// comes the first of the thread's next.
#pragma once

#include "entries.h"

namespace specplug {

constexpr int64_t kRowsAStep = 4;
constexpr int64_t kRowsAhead = 40;  // of the tile behind, when a tile begins

template <typename T>
class Ahead {
 public:
  explicit Ahead(const Cache<T>& cache) : cache_(cache) {}

  // Begins a share, behind which the thread does `next`, if any.
  void begin(const Share& share, const Share* next) {
    own_ = &share;
    next_ = next;
    if (comes_->share != &share) {
      put(comes_, {&share, share.begin});
      behind_->share = nullptr;
      fetched_ = 0;
    }
    if (!behind_->share) put(behind_, following(*comes_));
  }

  // The next tile of the share; all its entries are on their way.
  const Rows<T>& advance() {
    while (fetched_ < comes_->rows.count + kRowsAhead && fetch()) continue;
    fetched_ = std::max<int64_t>(0, fetched_ - comes_->rows.count);
    const Rows<T>& now = comes_->rows;
    comes_ = behind_;
    behind_ = tiles_ + (behind_ - tiles_ + 1) % 3;
    put(behind_, following(*comes_));
    return now;
  }

  // Fetches some rows more.
  void step() {
    for (const int64_t end = std::min(fetched_ + kRowsAStep, comes_->rows.count + kRowsAhead); fetched_ < end && fetch();)
      continue;
  }

 private:
  struct Tile {
    const Share* share = nullptr;
    int64_t first = 0;
    Rows<T> rows;
  };
  struct Place {
    const Share* share;
    int64_t first;
  };

  void put(Tile* tile, Place place) {
    tile->share = place.share;
    tile->first = place.first;
    tile->rows.count = 0;
    if (place.share) cache_.locate(*place.share, place.first, kTile, tile->rows);
  }

  Place following(const Tile& tile) const {
    if (tile.share && tile.first + kTile < tile.share->end) return {tile.share, tile.first + kTile};
    return tile.share == own_ && next_ ? Place{next_, next_->begin} : Place{nullptr, 0};
  }

  // The next row; false if there is none.
  bool fetch() {
    const Rows<T>* rows = &comes_->rows;
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

  const Cache<T>& cache_;
  const Share *own_ = nullptr, *next_ = nullptr;
  Tile tiles_[3];  // in turn
  Tile *comes_ = tiles_, *behind_ = tiles_ + 1;
  int64_t fetched_ = 0;  // rows of the tile that comes, and then of the one behind
};

}  // namespace specplug
