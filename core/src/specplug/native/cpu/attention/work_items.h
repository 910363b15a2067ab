// Partition of a batch's attention into work items (split-KV).
//
// A work item is a block of one row's queries for one KV head against a range of KV entries; long rows are split into ranges. Range
// boundaries depend on the batch alone, so results do not change with the number of threads. The number of prompt queries per block
// may depend on it, because it changes no result.
#pragma once

#include <limits>
#include <vector>

#include "attention/plan.h"
#include "attention/softmax.h"
#include "attention/attention_generic.h"

namespace specplug {

constexpr int64_t kItemEntries = 1024;       // least entries per range: merging ranges has a cost
constexpr int64_t kHeadEntries = 256;         // with many heads, entries x heads per range
constexpr int64_t kEnoughItems = 64;         // a row with this many blocks x heads is not split
constexpr int64_t kBlocksAThread = 8;         // prompts with more blocks than this use larger blocks
constexpr int64_t kEnoughBlocks = 64;         // the same, with a sliding window
constexpr int64_t kMostPartials = 2 << 20;    // bound on the partial sums of all rows, in floats
constexpr int64_t kReading = 8;               // reading an entry costs as much as computing this many queries

struct Shape {
  int64_t heads, kv_heads, tokens, key_dim, value_dim, slots;
  int64_t query_head, query_token;  // strides of the queries, in elements; the last dimension is dense
  float scaling;
  int64_t window;
  float softcap;

  // Converts scores to base-2 exponents; applies the soft-cap.
  float factor() const { return (softcap > 0 ? 1.0f : scaling) * kLog2E; }
  void cap(float* scores, int64_t count) const {
    if (softcap > 0)
      for (int64_t k = 0; k < count; ++k) scores[k] = std::tanh(scores[k] * scaling / softcap) * softcap;
  }
};

// KV entries [low, end) that a block of queries may see.
struct KeyRange {
  int64_t low, end;
};

struct WorkItem {
  int64_t row, head;      // row of the plan; KV head
  int64_t first, last;    // folded queries: group x count, group-major
  int64_t begin, end;     // KV entries
  KeyRange key_range;
  int64_t split;          // index of its split block, or -1
  int64_t work() const { return (end - begin) * (last - first + kReading); }
};

// A block of queries whose entries are split into ranges. `partials` holds for each range the highest score and total weight of each
// query, then the sums of values.
struct SplitBlock {
  int64_t first_item, ranges, partials;
  int32_t left;
};

struct Partition {
  std::vector<WorkItem> items;     // in plan order
  std::vector<SplitBlock> splits;
  std::vector<int64_t> order;   // indices of the items, most work first
  int64_t partials = 0;         // floats
};

inline int64_t partial_floats(const Shape& shape, int64_t queries) { return queries * (2 + shape.value_dim); }

inline KeyRange key_range_of(const Plan& plan, const Row& row, const Shape& shape, int64_t first, int64_t last) {
  const int64_t start = row.length - row.count;
  int64_t oldest = std::numeric_limits<int64_t>::max(), newest = 0;
  for (int64_t q = first; q < last; ++q) {
    const int64_t entry = start + q % row.count;
    oldest = std::min(oldest, plan.position(row, entry));
    newest = std::max(newest, entry);
  }
  KeyRange key_range;
  key_range.low = row.hidden;
  if (shape.window) key_range.low = std::max<int64_t>(key_range.low, oldest + 1 - shape.window);
  if (row.tree >= 0) key_range.low = std::min<int64_t>(key_range.low, row.prefix);
  key_range.end = row.tree >= 0 ? row.length : newest + 1;
  return key_range;
}

// Number of ranges of `size` entries (aligned to `size`) that a block is split into.
inline int64_t ranges_of(const KeyRange& key_range, int64_t size) {
  return std::max<int64_t>(1, (key_range.end + size - 1) / size - key_range.low / size);
}

// Queries per block: as many as leave each thread enough blocks, at most `most`. Changes no result, except with a sliding window, where
// the first entry depends on all queries of the block: there it does not depend on the number of threads.
inline int64_t block_for(int64_t folded, const Shape& shape, int64_t most, int64_t threads) {
  const int64_t enough = shape.window ? kEnoughBlocks : kBlocksAThread * threads;
  return std::clamp(folded * shape.kv_heads / enough / kQueryBlock * kQueryBlock, kQueryBlock, most);
}

inline Partition partition_work(const Plan& plan, const Shape& shape, int64_t most_queries, int64_t threads) {
  Partition partition;
  const int64_t group = shape.heads / shape.kv_heads;
  std::vector<WorkItem> blocks;
  for (int64_t index = 0; index < plan.rows(); ++index) {
    const Row row = plan.row(index);
    const int64_t folded = group * row.count;
    const bool is_cut = (folded + kQueryBlock - 1) / kQueryBlock * shape.kv_heads < kEnoughItems;
    const int64_t size = is_cut ? kQueryBlock : block_for(folded, shape, most_queries, threads);
    for (int64_t first = 0; first < folded; first += size) {
      const int64_t last = std::min(first + size, folded);
      const KeyRange key_range = key_range_of(plan, row, shape, first, last);
      blocks.push_back({index, 0, first, last, key_range.low, key_range.end, key_range, is_cut ? 0 : -1});
    }
  }
  int64_t size = std::clamp(kHeadEntries * shape.kv_heads, kItemEntries, 4 * kItemEntries) / kTile * kTile, needed;
  do {
    needed = 0;
    for (const WorkItem& block : blocks)
      if (const int64_t ranges = ranges_of(block.key_range, size); block.split == 0 && ranges > 1)
        needed += ranges * partial_floats(shape, block.last - block.first) * shape.kv_heads;
    if (needed > kMostPartials) size *= 2;
  } while (needed > kMostPartials);
  for (WorkItem item : blocks) {
    const int64_t ranges = item.split == 0 ? ranges_of(item.key_range, size) : 1;
    const int64_t low = item.key_range.low / size * size;
    for (item.head = 0; item.head < shape.kv_heads; ++item.head) {
      item.split = ranges > 1 ? static_cast<int64_t>(partition.splits.size()) : -1;
      if (ranges > 1) {
        const int64_t floats = ranges * partial_floats(shape, item.last - item.first);
        partition.splits.push_back({static_cast<int64_t>(partition.items.size()), ranges, partition.partials,
                                 static_cast<int32_t>(ranges)});
        partition.partials += floats;
      }
      for (int64_t range = 0; range < ranges; ++range) {
        item.begin = range == 0 ? item.key_range.low : low + range * size;
        item.end = range + 1 == ranges ? item.key_range.end : low + (range + 1) * size;
        partition.items.push_back(item);
      }
    }
  }
  partition.order.resize(partition.items.size());
  for (size_t index = 0; index < partition.order.size(); ++index) partition.order[index] = static_cast<int64_t>(index);
  std::sort(partition.order.begin(), partition.order.end(), [&](int64_t left, int64_t right) {
    const int64_t more = partition.items[left].work(), less = partition.items[right].work();
    return more != less ? more > less : left < right;
  });
  return partition;
}

}  // namespace specplug
