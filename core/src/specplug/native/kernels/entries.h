// Where the keys and values of a share lie in the paged cache.
#pragma once

#include "shares.h"
#include "tiles.h"

namespace specplug {

// Of up to a tile of entries.
template <typename T>
struct Rows {
  const T *keys[kTile], *values[kTile + 1];
  int64_t count = 0;
};

// The cache of one layer: keys [heads][slots][key_dim], values [heads][slots][value_dim].
template <typename T>
struct Cache {
  const T *keys, *values;
  const Plan& plan;
  const Shape& shape;

  // Those of up to `size` entries of a share, from `first` on.
  void locate(const Share& share, int64_t first, int64_t size, Rows<T>& rows) const {
    const Row row = plan.row(share.row);
    const T* head_keys = keys + share.head * shape.slots * shape.key_dim;
    const T* head_values = values + share.head * shape.slots * shape.value_dim;
    const int64_t block = row.base >= 0 ? std::max<int64_t>(row.length, 1) : plan.block_size();
    rows.count = std::min(size, share.end - first);
    for (int64_t k = 0; k < rows.count;) {
      const int64_t entry = first + k, slot = plan.slot(row, entry);
      const T *key = head_keys + slot * shape.key_dim, *value = head_values + slot * shape.value_dim;
      for (int64_t end = std::min(rows.count, k + block - entry % block); k < end; ++k) {
        rows.keys[k] = key;
        rows.values[k] = value;
        key += shape.key_dim;
        value += shape.value_dim;
      }
    }
    if (rows.count > 0) rows.values[rows.count] = rows.values[rows.count - 1];  // the other of an odd pair, with weight 0
  }
};

}  // namespace specplug
