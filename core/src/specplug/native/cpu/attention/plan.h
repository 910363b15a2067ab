// The attention plan of a batch: rows, their KV blocks, tree masks. `model/attention/plan.py` writes it.
//
// One int32 array, so that no tensor is built per row.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <cstring>

namespace specplug {

constexpr int64_t kHeader = 4;
constexpr int64_t kRowFields = 8;

// One row of the plan.
struct Row {
  int32_t query;       // packed index of its first query
  int32_t count;       // number of queries
  int32_t length;      // KV entries, including the new ones
  int32_t base;        // first slot if the row is contiguous in the cache, else -1
  int32_t table;       // offset of its block table in the plan
  int32_t hidden;      // entries before this one are masked for all queries
  int32_t tree;        // offset of its tree in the plan, or -1
  int32_t prefix;      // entries before this one are committed tokens
};

struct Plan {
  const int32_t* data;
  int64_t size;  // number of int32 elements
  int64_t rows() const { return data[0]; }
  int64_t tokens() const { return data[1]; }
  int64_t block_size() const { return data[2]; }
  Row row(int64_t index) const {
    Row row;
    std::memcpy(&row, data + kHeader + index * kRowFields, sizeof(row));
    return row;
  }
  int64_t slot(const Row& row, int64_t entry) const {
    if (row.base >= 0) return row.base + entry;
    return static_cast<int64_t>(data[row.table + entry / block_size()]) * block_size() + entry % block_size();
  }
  // Tree layout: the positions of the entries after the prefix, then for each query a bit mask of the entries it sees.
  int64_t position(const Row& row, int64_t entry) const {
    return row.tree < 0 || entry < row.prefix ? entry : data[row.tree + entry - row.prefix];
  }
  bool sees(const Row& row, int64_t query, int64_t entry) const {
    if (row.tree < 0) return entry <= row.length - row.count + query;
    if (entry < row.prefix) return true;
    const int64_t tail = row.length - row.prefix, bit = entry - row.prefix, words = (tail + 31) / 32;
    return data[row.tree + tail + query * words + bit / 32] >> (bit % 32) & 1;
  }

  // Checks all offsets against the plan, the queries and a cache with `slots` slots.
  void check(int64_t queries, int64_t slots) const {
    TORCH_CHECK(size >= kHeader && rows() >= 0 && block_size() > 0 && size >= kHeader + rows() * kRowFields,
                "attend: the plan of ", size, " numbers is cut off");
    TORCH_CHECK(tokens() >= 0 && tokens() <= queries, "attend: the plan describes ", tokens(),
                " tokens, but there are ", queries, " queries");
    for (int64_t index = 0; index < rows(); ++index) {
      const Row row = this->row(index);
      const int64_t blocks = (static_cast<int64_t>(row.length) + block_size() - 1) / block_size();
      const int64_t tail = static_cast<int64_t>(row.length) - row.prefix;
      const int64_t tree_end = row.tree + tail + row.count * ((tail + 31) / 32);
      bool fits = row.query >= 0 && row.count >= 0 && int64_t{row.query} + row.count <= tokens() &&
                  row.length >= row.count && row.hidden >= 0 && row.prefix >= 0 && tail >= 0;
      fits = fits && (row.tree < 0 || tree_end <= size);
      if (row.base >= 0) {
        fits = fits && int64_t{row.base} + row.length <= slots;
      } else {
        fits = fits && row.table >= 0 && row.table + blocks <= size;
        for (int64_t block = 0; fits && block < blocks; ++block) {
          const int64_t number = data[row.table + block];
          fits = number >= 0 && (number + 1) * block_size() <= slots;
        }
      }
      TORCH_CHECK(fits, "attend: row ", index, " of the plan (", row.count, " queries, ", row.length,
                  " entries) lies outside of its batch or of the cache's ", slots, " slots");
    }
  }
};

}  // namespace specplug
