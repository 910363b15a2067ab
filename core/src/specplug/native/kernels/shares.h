// How the attention of a batch is cut into shares of work.
//
// A share is a block of one row's queries for one KV head, against a range of its entries: long rows are cut into several
// ranges. Where these begin depends on the batch alone, so that results do not change with the number of threads; how many of a
// prompt's queries are taken together may, since it changes nothing.
#pragma once

#include <limits>
#include <vector>

#include "plan.h"
#include "softmax.h"
#include "tiles.h"

namespace specplug {

constexpr int64_t kShareEntries = 1024;       // at least: each range ends with sums to be put together
constexpr int64_t kHeadEntries = 256;         // with many heads, ranges of so many entries times heads are enough
constexpr int64_t kEnoughShares = 64;         // a row of so many blocks and heads is not cut
constexpr int64_t kBlocksAThread = 8;         // a prompt of more, over all heads, has larger ones
constexpr int64_t kEnoughBlocks = 64;         // the same, with a window
constexpr int64_t kMostPartials = 2 << 20;    // floats of the ranges' softmaxes, of all rows
constexpr int64_t kReading = 8;               // reading an entry costs as much as computing with this many queries

struct Shape {
  int64_t heads, kv_heads, tokens, key_dim, value_dim, slots;
  int64_t query_head, query_token;  // strides of the queries, in elements; the last dimension is dense
  float scaling;
  int64_t window;
  float softcap;

  // What makes exponents of 2 of scores, and what scores that have a cap become.
  float factor() const { return (softcap > 0 ? 1.0f : scaling) * kLog2E; }
  void cap(float* scores, int64_t count) const {
    if (softcap > 0)
      for (int64_t k = 0; k < count; ++k) scores[k] = std::tanh(scores[k] * scaling / softcap) * softcap;
  }
};

// Which entries a block of queries may see: [low, end).
struct Reach {
  int64_t low, end;
};

struct Share {
  int64_t row, head;      // of the plan; KV head
  int64_t first, last;    // folded queries: of group x count, group-major
  int64_t begin, end;     // entries
  Reach reach;
  int64_t split;          // which cut block it is part of, or -1
  int64_t work() const { return (end - begin) * (last - first + kReading); }
};

// A block of queries whose entries are cut into ranges: `partials` holds, range by range, the highest score and the total
// weight of each query, then the sums of its values.
struct Split {
  int64_t first_share, ranges, partials;
  int32_t left;
};

struct Shares {
  std::vector<Share> items;     // in the order of the plan
  std::vector<Split> splits;
  std::vector<int64_t> order;   // of the items, most work first
  int64_t partials = 0;         // floats
};

inline int64_t partial_floats(const Shape& shape, int64_t queries) { return queries * (2 + shape.value_dim); }

inline Reach reach_of(const Plan& plan, const Row& row, const Shape& shape, int64_t first, int64_t last) {
  const int64_t start = row.length - row.count;
  int64_t oldest = std::numeric_limits<int64_t>::max(), newest = 0;
  for (int64_t q = first; q < last; ++q) {
    const int64_t entry = start + q % row.count;
    oldest = std::min(oldest, plan.position(row, entry));
    newest = std::max(newest, entry);
  }
  Reach reach;
  reach.low = row.hidden;
  if (shape.window) reach.low = std::max<int64_t>(reach.low, oldest + 1 - shape.window);
  if (row.tree >= 0) reach.low = std::min<int64_t>(reach.low, row.prefix);
  reach.end = row.tree >= 0 ? row.length : newest + 1;
  return reach;
}

// How many ranges of `size` entries, a multiple of which each begins with, a block's entries are cut into.
inline int64_t ranges_of(const Reach& reach, int64_t size) {
  return std::max<int64_t>(1, (reach.end + size - 1) / size - reach.low / size);
}

// How many queries of `folded` ones make a block: as many as leave every thread enough blocks, `most` at most. That changes no
// result, but for windows: where these begin depends on all queries of a block.
inline int64_t block_for(int64_t folded, const Shape& shape, int64_t most, int64_t threads) {
  const int64_t enough = shape.window ? kEnoughBlocks : kBlocksAThread * threads;
  return std::clamp(folded * shape.kv_heads / enough / kQueryBlock * kQueryBlock, kQueryBlock, most);
}

inline Shares share_out(const Plan& plan, const Shape& shape, int64_t most_queries, int64_t threads) {
  Shares shares;
  const int64_t group = shape.heads / shape.kv_heads;
  std::vector<Share> blocks;
  for (int64_t index = 0; index < plan.rows(); ++index) {
    const Row row = plan.row(index);
    const int64_t folded = group * row.count;
    const bool is_cut = (folded + kQueryBlock - 1) / kQueryBlock * shape.kv_heads < kEnoughShares;
    const int64_t size = is_cut ? kQueryBlock : block_for(folded, shape, most_queries, threads);
    for (int64_t first = 0; first < folded; first += size) {
      const int64_t last = std::min(first + size, folded);
      const Reach reach = reach_of(plan, row, shape, first, last);
      blocks.push_back({index, 0, first, last, reach.low, reach.end, reach, is_cut ? 0 : -1});
    }
  }
  int64_t size = std::clamp(kHeadEntries * shape.kv_heads, kShareEntries, 4 * kShareEntries) / kTile * kTile, needed;
  do {
    needed = 0;
    for (const Share& block : blocks)
      if (const int64_t ranges = ranges_of(block.reach, size); block.split == 0 && ranges > 1)
        needed += ranges * partial_floats(shape, block.last - block.first) * shape.kv_heads;
    if (needed > kMostPartials) size *= 2;
  } while (needed > kMostPartials);
  for (Share share : blocks) {
    const int64_t ranges = share.split == 0 ? ranges_of(share.reach, size) : 1;
    const int64_t low = share.reach.low / size * size;
    for (share.head = 0; share.head < shape.kv_heads; ++share.head) {
      share.split = ranges > 1 ? static_cast<int64_t>(shares.splits.size()) : -1;
      if (ranges > 1) {
        const int64_t floats = ranges * partial_floats(shape, share.last - share.first);
        shares.splits.push_back({static_cast<int64_t>(shares.items.size()), ranges, shares.partials,
                                 static_cast<int32_t>(ranges)});
        shares.partials += floats;
      }
      for (int64_t range = 0; range < ranges; ++range) {
        share.begin = range == 0 ? share.reach.low : low + range * size;
        share.end = range + 1 == ranges ? share.reach.end : low + (range + 1) * size;
        shares.items.push_back(share);
      }
    }
  }
  shares.order.resize(shares.items.size());
  for (size_t index = 0; index < shares.order.size(); ++index) shares.order[index] = static_cast<int64_t>(index);
  std::sort(shares.order.begin(), shares.order.end(), [&](int64_t left, int64_t right) {
    const int64_t more = shares.items[left].work(), less = shares.items[right].work();
    return more != less ? more > less : left < right;
  });
  return shares;
}

}  // namespace specplug
