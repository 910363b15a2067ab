// The rows of a forward as kernels with recurrent state read them, and the memory of a thread.
//
// One int32 array: the number of rows, then per row its slot, whether its state is that before the first token, the packed index of
// its first token, its tokens, over how many of these its state is brought forward, over how many entries before, how many entries
// remain, and whether the others are a tree; then the entries to bring it forward over, those that remain, and in a tree the parent
// of each token, -1 for none.
#pragma once

#include <vector>

#include "common/torch_util.h"
#include "common/simd.h"

namespace specplug {

struct StateRow {
  int64_t slot, first, count, passed, replayed, remaining;
  bool is_fresh;
  const int32_t *replay, *remain, *parents;

  // The window: entries that remain, then the tokens that become entries.
  int64_t width() const { return remaining + count - passed; }
  int64_t token(int64_t node) const { return first + passed + node - remaining; }
  int64_t parent(int64_t node) const { return parents ? parents[node] : node - 1; }
  bool is_new(int64_t node) const { return node >= remaining; }
  bool is_parent(int64_t node) const {
    if (!parents) return node + 1 < width();
    for (int64_t other = node + 1; other < width(); ++other)
      if (parents[other] == node) return true;
    return false;
  }
};

// Reads and checks the array against the sizes of a call.
inline std::vector<StateRow> read_rows(const Tensor& plan, int64_t slots, int64_t held, int64_t tokens) {
  TORCH_CHECK(plan.scalar_type() == at::kInt && plan.dim() == 1 && plan.is_contiguous() && plan.numel() > 0,
              "recurrent: expected the rows as a list of int32, not ", plan.scalar_type(), " ", plan.sizes());
  const int32_t* at = data_of<int32_t>(plan);
  const int32_t* end = at + plan.numel();
  std::vector<StateRow> rows(std::max<int32_t>(0, *at++));
  for (StateRow& row : rows) {
    TORCH_CHECK(end - at >= 8, "recurrent: the list of rows ends early");
    row = {at[0], at[2], at[3], at[4], at[5], at[6], at[1] != 0, at + 8, nullptr, nullptr};
    const bool is_tree = at[7] != 0;
    TORCH_CHECK(row.slot >= 0 && row.slot < slots && row.first >= 0 && row.count >= 0 && row.first + row.count <= tokens &&
                    row.passed >= 0 && row.passed <= row.count && row.replayed >= 0 && row.replayed <= held &&
                    row.remaining >= 0 && row.remaining <= held && row.width() <= held &&
                    !(is_tree && (row.remaining || row.passed)),
                "recurrent: a row of slot ", row.slot, " of ", slots, ", tokens ", row.first, " to ", row.first + row.count, " of ",
                tokens, ", of which ", row.passed, " are passed, with ", row.replayed, " and ", row.remaining, " of ", held,
                " entries");
    TORCH_CHECK(end - row.replay >= row.replayed + row.remaining + (is_tree ? row.count : 0),
                "recurrent: the list of rows ends early");
    row.remain = row.replay + row.replayed;
    at = row.remain + row.remaining;
    for (const int32_t* entry = row.replay; entry < at; ++entry)
      TORCH_CHECK(*entry >= 0 && *entry < held, "recurrent: entry ", *entry, " of ", held);
    for (int64_t each = 0; each < row.remaining; ++each)
      TORCH_CHECK(row.remain[each] >= each && (each == 0 || row.remain[each] > row.remain[each - 1]),
                  "recurrent: entries that remain are in order");
    if (!is_tree) continue;
    row.parents = at;
    for (int64_t node = 0; node < row.count; ++node)
      TORCH_CHECK(at[node] >= -1 && at[node] < node, "recurrent: token ", node, " of a tree follows token ", at[node]);
    at += row.count;
  }
  return rows;
}

// This thread's memory for one unit of work, handed out piece by piece.
class UnitMemory {
 public:
  // Pieces of so many floats in all, each beginning at a cache line.
  UnitMemory(int64_t floats, int64_t pieces) {
    thread_local std::vector<float> memory;
    const size_t size = static_cast<size_t>(floats + 16 * (pieces + 1));
    if (memory.size() < size) memory.resize(size);
    at_ = aligned(memory.data());
  }
  float* take(int64_t floats) {
    float* taken = at_;
    at_ = aligned(at_ + floats);
    return taken;
  }

 private:
  static float* aligned(float* at) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(at) + 63) / 64 * 64);
  }
  float* at_;
};

// A tensor [T, ...] whose tokens are dense, though not next to each other.
inline Tensor with_dense_tokens(const Tensor& tensor) {
  int64_t size = 1;
  for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
    if (tensor.size(dim) > 1 && tensor.stride(dim) != size) return tensor.contiguous();
    size *= tensor.size(dim);
  }
  return tensor;
}

inline void check_memory(const Tensor& memory, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(memory.scalar_type() == at::kFloat && memory.is_contiguous() && memory.sizes() == sizes, name,
              ": expected dense float memory of ", sizes, ", not ", memory.scalar_type(), " ", memory.sizes());
}

}  // namespace specplug
