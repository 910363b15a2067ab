// The state-space scan of Mamba 2 over packed rows: S <- exp(a) S + x B^T; the result is S C + D times the input.
//
// Tokens run one after the other by the same sums, as in `delta_rule.h`. Lines of a state do not depend on each other.
#pragma once

#include <optional>

#include "common/lanes.h"
#include "recurrent/delta_rule.h"
#include "recurrent/state_rows.h"

namespace specplug {

template <typename T>
struct ScanCall {
  int64_t heads, width, groups, size, held, step;
  const T* inputs;
  const float *steps, *logs, *writes, *reads, *overlaps, *skips;  // [T, heads] twice, [T, groups, size] twice, [T, groups], [heads]
  float *states, *kept_writes, *kept_inputs, *kept_logs, *out;

  float* entry_write(const StateRow& row, int64_t entry, int64_t group) const {
    return kept_writes + ((row.slot * held + entry) * groups + group) * size;
  }
  float* entry_input(const StateRow& row, int64_t entry, int64_t head) const {
    return kept_inputs + ((row.slot * held + entry) * heads + head) * width;
  }
  float& entry_log(const StateRow& row, int64_t entry, int64_t head) const {
    return kept_logs[(row.slot * held + entry) * heads + head];
  }

  // Calls `body` for a line's numbers [0, size), register by register and then float by float.
  template <typename Body>
  void each_lane(const Body& body) const {
    int64_t at = 0;
    for (; at + Lanes::kCount <= size; at += Lanes::kCount) body.template operator()<Lanes>(at);
    for (; at < size; ++at) body.template operator()<OneLane>(at);
  }

  // A token's results for N lines, from the state before it; `to` becomes the state after it, if there is one.
  template <int N>
  void run_token(int64_t token, int64_t head, int64_t line, const float* from, float* to, const float (&added)[N],
                 float decay) const {
    const int64_t group = head / (heads / groups);
    const float *write = writes + (token * groups + group) * size, *read = reads + (token * groups + group) * size;
    Lanes sums[N];
    float tails[N];
    for (int n = 0; n < N; ++n) sums[n] = Lanes::all(0.0f), tails[n] = 0.0f;
    each_lane([&]<typename L>(int64_t at) {
      const L wanted = L::load(read + at), writing = L::load(write + at), left = L::all(decay);
      for (int n = 0; n < N; ++n) {
        const L before = L::load(from + n * size + at);
        if constexpr (L::kCount == 1)
          tails[n] = fused(before.value, wanted.value, tails[n]);
        else
          sums[n] = sums[n].plus_product(before, wanted);
        if (to) (before * left).plus_product(writing, L::all(added[n])).store(to + n * size + at);
      }
    });
    const float overlap = overlaps[token * groups + group];
    const T* input = inputs + token * step + head * width + line;
    float* result = out + (token * heads + head) * width + line;
    for (int n = 0; n < N; ++n) {
      result[n] = fused(added[n], overlap, decay * (sums[n].sum() + tails[n]));
      if (skips) result[n] = fused(skips[head], to_float(input[n]), result[n]);
    }
  }
  template <int N>
  void move(const float* from, float* to, const float* write, const float (&added)[N], float decay) const {
    each_lane([&]<typename L>(int64_t at) {
      const L writing = L::load(write + at), left = L::all(decay);
      for (int n = 0; n < N; ++n)
        (L::load(from + n * size + at) * left).plus_product(writing, L::all(added[n])).store(to + n * size + at);
    });
  }
  template <int N>
  void read_inputs(int64_t token, int64_t head, int64_t line, float (&added)[N]) const {
    const T* input = inputs + token * step + head * width + line;
    for (int n = 0; n < N; ++n) added[n] = to_float(input[n]) * steps[token * heads + head];
  }

  // N lines of a head.
  template <int N>
  void run_lines(const StateRow& row, int64_t head, int64_t line, const std::vector<float>& before,
                 const std::vector<float>& decays) const {
    const int64_t group = head / (heads / groups), window = row.width();
    float* state = states + ((row.slot * heads + head) * width + line) * size;
    float added[N];
    for (int64_t at = N * size; at < 2 * N * size; at += 16) __builtin_prefetch(state + at, 1);  // the next lines
    if (row.is_fresh) std::fill_n(state, N * size, 0.0f);
    for (int64_t each = 0; each < row.replayed; ++each) {
      const int64_t entry = row.replay[each];
      std::copy_n(entry_input(row, entry, head) + line, N, added);
      move<N>(state, state, entry_write(row, entry, group), added, before[each]);
    }
    for (int64_t token = row.first; token < row.first + row.passed; ++token) {
      read_inputs<N>(token, head, line, added);
      run_token<N>(token, head, line, state, state, added, std::exp(logs[token * heads + head]));
    }
    if (!window) return;
    UnitMemory scratch(window * N * size, 1);
    float* after = scratch.take(window * N * size);
    for (int64_t node = 0; node < window; ++node) {
      const float* from = row.parent(node) < 0 ? state : after + row.parent(node) * N * size;
      float* to = row.is_parent(node) ? after + node * N * size : nullptr;
      if (row.is_new(node)) {
        read_inputs<N>(row.token(node), head, line, added);
        run_token<N>(row.token(node), head, line, from, to, added, decays[node]);
      } else {
        std::copy_n(entry_input(row, row.remain[node], head) + line, N, added);
        if (to) move<N>(from, to, entry_write(row, row.remain[node], group), added, decays[node]);
      }
      std::copy_n(added, N, entry_input(row, node, head) + line);
    }
  }

  void run(const StateRow& row, int64_t head) const {
    std::vector<float> before, decays;
    for (int64_t each = 0; each < row.replayed; ++each) before.push_back(std::exp(entry_log(row, row.replay[each], head)));
    for (int64_t node = 0; node < row.width(); ++node) {
      const float log = row.is_new(node) ? logs[row.token(node) * heads + head] : entry_log(row, row.remain[node], head);
      entry_log(row, node, head) = log;
      decays.push_back(std::exp(log));
    }
    int64_t line = 0;
    for (; line + 4 <= width; line += 4) run_lines<4>(row, head, line, before, decays);
    for (; line < width; ++line) run_lines<1>(row, head, line, before, decays);
  }
  // Keeps the window's B, which several heads share: after all heads have read those before.
  void keep_writes(const StateRow& row) const {
    for (int64_t node = 0; node < row.width(); ++node)
      std::copy_n(row.is_new(node) ? writes + row.token(node) * groups * size : entry_write(row, row.remain[node], 0),
                  groups * size, entry_write(row, node, 0));
  }
};

// inputs [T, heads, width], steps and logs [T, heads] (a step's size, and a = A times it), writes and reads [T, groups, size] (B and C),
// skips [heads] (D) → float [T, heads, width]. States [slots, heads, width, size]; entries: B [slots, held, groups, size], x
// [slots, held, heads, width], a [slots, held, heads].
inline Tensor state_space_scan(const Tensor& inputs, const Tensor& steps, const Tensor& logs, const Tensor& writes,
                               const Tensor& reads, const std::optional<Tensor>& skips, const Tensor& states,
                               const Tensor& kept_writes, const Tensor& kept_inputs, const Tensor& kept_logs,
                               const Tensor& plan) {
  const auto type = inputs.scalar_type();
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && inputs.dim() == 3 && steps.dim() == 2 && writes.dim() == 3 &&
                  steps.sizes() == logs.sizes() && writes.sizes() == reads.sizes() && kept_writes.dim() == 4 &&
                  steps.size(0) == inputs.size(0) && steps.size(1) == inputs.size(1) && writes.size(0) == inputs.size(0) &&
                  writes.size(1) > 0 && inputs.size(1) % writes.size(1) == 0 && (!skips || skips->numel() == inputs.size(1)),
              "state_space_scan: sizes or dtypes do not fit: inputs ", type, " ", inputs.sizes(), ", steps ", steps.sizes(),
              ", decays ", logs.sizes(), ", B ", writes.sizes(), ", C ", reads.sizes());
  const int64_t tokens = inputs.size(0), heads = inputs.size(1), width = inputs.size(2), slots = states.size(0);
  const int64_t groups = writes.size(1), size = writes.size(2), held = kept_writes.size(1);
  check_memory(states, {slots, heads, width, size}, "state_space_scan");
  check_memory(kept_writes, {slots, held, groups, size}, "state_space_scan");
  check_memory(kept_inputs, {slots, held, heads, width}, "state_space_scan");
  check_memory(kept_logs, {slots, held, heads}, "state_space_scan");
  const auto rows = read_rows(plan, slots, held, tokens);
  const auto dense = [](const Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); };
  const Tensor x = with_dense_tokens(inputs), step = dense(steps), log = dense(logs), b = dense(writes), c = dense(reads);
  std::optional<Tensor> d;
  if (skips) d = dense(*skips);
  const float *write = data_of<float>(b), *read = data_of<float>(c);
  std::vector<float> overlaps(tokens * groups);
  for (int64_t each = 0; each < tokens * groups; ++each) overlaps[each] = dot(write + each * size, read + each * size, size);
  const Tensor out = at::detail::empty_cpu(
      inputs.sizes(), inputs.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  const auto run = [&]<typename T>(T*) {
    const ScanCall<T> call{heads, width, groups, size, held, x.stride(0), data_of<T>(x), data_of<float>(step),
                           data_of<float>(log), write, read, overlaps.data(), d ? data_of<float>(*d) : nullptr,
                           data_of<float>(states), data_of<float>(kept_writes), data_of<float>(kept_inputs),
                           data_of<float>(kept_logs), data_of<float>(out)};
    at::parallel_for(0, static_cast<int64_t>(rows.size()) * heads, 4, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) call.run(rows[unit / heads], unit % heads);
    });
    for (const StateRow& row : rows) call.keep_writes(row);
  };
  type == at::kFloat ? run(static_cast<float*>(nullptr)) : run(static_cast<bf16*>(nullptr));
  return out;
}

}  // namespace specplug
