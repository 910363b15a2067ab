// What LoRA adapters add to a linear layer, for segments of packed rows with an adapter each.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/torch_util.h"
#include "common/simd.h"

namespace specplug {

constexpr int64_t kOutsAtOnce = 256;
constexpr int64_t kRanksAtOnce = 4;
constexpr int64_t kTermsPerThread = 32768;  // fewer multiplications are not worth a thread

// Four rows of `down`, `width` apart, times one row of states. The order of the sum depends on the width alone.
template <typename T>
inline void dot_four(const T* states, const T* down, int64_t width, float* sums) {
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t at = 0; at < width; ++at) {
    const float state = to_float(states[at]);
    a += state * to_float(down[at]);
    b += state * to_float(down[at + width]);
    c += state * to_float(down[at + 2 * width]);
    d += state * to_float(down[at + 3 * width]);
  }
  sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

template <typename T>
inline float dot_one(const T* states, const T* down, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t at = 0; at < width; ++at) sum += to_float(states[at]) * to_float(down[at]);
  return sum;
}

// `count` outputs of one row: output + inner @ up.
template <typename T>
inline void add_outs(const T* output, const float* inner, const T* up, int64_t rank, int64_t outs, int64_t count, T* result) {
  float sums[kOutsAtOnce];
  for (int64_t at = 0; at < count; ++at) sums[at] = 0.0f;
  for (int64_t row = 0; row < rank; ++row) {
    const float factor = inner[row];
    const T* from = up + row * outs;
#pragma omp simd
    for (int64_t at = 0; at < count; ++at) sums[at] += factor * to_float(from[at]);
  }
  for (int64_t at = 0; at < count; ++at) store(result + at, to_float(output[at]) + sums[at]);
}

// Sizes of a call, and the slot of every row: -1 where there is nothing to add.
struct LowRankCall {
  int64_t rows, ins, outs, most_rank;
  std::vector<int32_t> slots;
  const int32_t* ranks;
};

template <typename T>
inline void add_low_rank_of(const LowRankCall& call, const T* output, const T* states, const T* down, const T* up, T* result) {
  const int64_t groups = (call.most_rank + kRanksAtOnce - 1) / kRanksAtOnce, width = groups * kRanksAtOnce;
  std::vector<float> inner(call.rows * width);
  const int64_t grain = std::max<int64_t>(1, kTermsPerThread / (kRanksAtOnce * call.ins));
  at::parallel_for(0, call.rows * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / groups, first = unit % groups * kRanksAtOnce, slot = call.slots[row];
      const int64_t rank = slot < 0 ? 0 : call.ranks[slot];
      const T *from = states + row * call.ins, *with = down + (std::max<int64_t>(slot, 0) * call.most_rank + first) * call.ins;
      float* to = inner.data() + row * width + first;
      if (first + kRanksAtOnce <= rank) {
        dot_four(from, with, call.ins, to);
        continue;
      }
      for (int64_t each = first; each < rank; ++each) to[each - first] = dot_one(from, with + (each - first) * call.ins, call.ins);
    }
  });
  const int64_t chunks = (call.outs + kOutsAtOnce - 1) / kOutsAtOnce;
  const int64_t least = std::max<int64_t>(1, kTermsPerThread / (kOutsAtOnce * call.most_rank));
  at::parallel_for(0, call.rows * chunks, least, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / chunks, first = unit % chunks * kOutsAtOnce, slot = call.slots[row];
      const int64_t count = std::min(kOutsAtOnce, call.outs - first), place = row * call.outs + first;
      const int64_t rank = slot < 0 ? 0 : call.ranks[slot];
      if (rank == 0) {
        std::memcpy(result + place, output + place, count * sizeof(T));
        continue;
      }
      add_outs(output + place, inner.data() + row * width, up + slot * call.most_rank * call.outs + first, rank, call.outs,
               count, result + place);
    }
  });
}

// output [..., out] and, where a segment (first row, end, slot) has an adapter, states [..., in] @ down[slot]^T @ up[slot].
// down [slots, rank, in], up [slots, rank, out], ranks int32 [slots], segments int32 [S, 3].
inline Tensor add_low_rank(const Tensor& output, const Tensor& states, const Tensor& down, const Tensor& up, const Tensor& ranks,
                           const Tensor& segments) {
  const auto type = states.scalar_type();
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && output.scalar_type() == type && down.scalar_type() == type &&
                  up.scalar_type() == type && ranks.scalar_type() == at::kInt && segments.scalar_type() == at::kInt,
              "add_low_rank: expected float or bfloat16 states, outputs and weights and int32 ranks and segments, not ", type,
              ", ", output.scalar_type(), ", ", down.scalar_type());
  TORCH_CHECK(down.dim() == 3 && up.dim() == 3 && ranks.dim() == 1 && segments.dim() == 2 && segments.size(1) == 3 &&
                  states.dim() > 0 && output.dim() > 0 && down.is_contiguous() && up.is_contiguous() &&
                  ranks.is_contiguous() && down.size(0) == up.size(0) && down.size(0) == ranks.size(0) &&
                  down.size(1) == up.size(1) && down.size(1) > 0 && states.size(-1) == down.size(2) &&
                  output.size(-1) == up.size(2) && down.size(2) > 0 && up.size(2) > 0,
              "add_low_rank: sizes do not fit: states ", states.sizes(), ", outputs ", output.sizes(), ", down ", down.sizes(),
              ", up ", up.sizes(), ", ranks ", ranks.sizes(), ", segments ", segments.sizes());
  LowRankCall call{states.numel() / states.size(-1), states.size(-1), output.size(-1), down.size(1), {}, data_of<int32_t>(ranks)};
  TORCH_CHECK(output.numel() == call.rows * call.outs, "add_low_rank: ", call.rows, " states, outputs ", output.sizes());
  call.slots.assign(call.rows, -1);
  const Tensor dense = segments.contiguous();
  for (int64_t index = 0; index < dense.size(0); ++index) {
    const int32_t* segment = data_of<int32_t>(dense) + 3 * index;
    TORCH_CHECK(0 <= segment[0] && segment[0] <= segment[1] && segment[1] <= call.rows && 0 <= segment[2] &&
                    segment[2] < down.size(0) && 0 <= call.ranks[segment[2]] && call.ranks[segment[2]] <= call.most_rank,
                "add_low_rank: segment ", segment[0], " to ", segment[1], " of ", call.rows, " rows, slot ", segment[2], " of ",
                down.size(0));
    std::fill(call.slots.begin() + segment[0], call.slots.begin() + segment[1], segment[2]);
  }
  const Tensor from = states.contiguous(), base = output.contiguous();
  const Tensor result = at::detail::empty_cpu(base.sizes(), base.options());
  if (type == at::kFloat)
    add_low_rank_of(call, data_of<float>(base), data_of<float>(from), data_of<float>(down), data_of<float>(up),
                    data_of<float>(result));
  else
    add_low_rank_of(call, data_of<bf16>(base), data_of<bf16>(from), data_of<bf16>(down), data_of<bf16>(up), data_of<bf16>(result));
  return result;
}

}  // namespace specplug
