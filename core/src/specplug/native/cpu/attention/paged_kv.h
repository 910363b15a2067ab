// Addresses of keys and values in the paged KV cache.
#pragma once

#include "attention/work_items.h"
#include "attention/attention_generic.h"

namespace specplug {

// The rows of up to one tile of entries.
template <typename T>
struct KVTile {
  const T *keys[kTile], *values[kTile + 1];
  int64_t count = 0;
};

// The KV cache of one layer: keys [heads][slots][key_dim], values [heads][slots][value_dim].
template <typename T>
struct PagedKV {
  const T *keys, *values;
  const Plan& plan;
  const Shape& shape;

  // Finds up to `size` entries of a work item, starting at `first`.
  void locate(const WorkItem& item, int64_t first, int64_t size, KVTile<T>& rows) const {
    const Row row = plan.row(item.row);
    const T* head_keys = keys + item.head * shape.slots * shape.key_dim;
    const T* head_values = values + item.head * shape.slots * shape.value_dim;
    const int64_t block = row.base >= 0 ? std::max<int64_t>(row.length, 1) : plan.block_size();
    rows.count = std::min(size, item.end - first);
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
    if (rows.count > 0) rows.values[rows.count] = rows.values[rows.count - 1];  // partner of an odd last row, with weight 0
  }
};

}  // namespace specplug
