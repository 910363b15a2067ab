// PyTorch's view of the kernels. The operators' schemas stand in `operators.py`.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include "attention.h"
#include "matrix.h"

namespace specplug {
namespace {

using at::Tensor;

constexpr int64_t kTooLittle = 8192;  // work that is over before another thread wakes up

template <typename T>
T* data_of(const Tensor& tensor) {
  return reinterpret_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

template <typename T>
void attend_typed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                  const Plan& plan, const Tensor& slots, const Shape& shape, const float* sinks, Tensor& out) {
  T *cached_keys = data_of<T>(keys), *cached_values = data_of<T>(values);
  const T *new_keys = data_of<T>(key), *new_values = data_of<T>(value);
  const int64_t* write = slots.const_data_ptr<int64_t>();
  const int64_t tokens = plan.tokens(), kv_heads = shape.kv_heads;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, tokens * (shape.key_dim + shape.value_dim)));
  at::parallel_for(0, kv_heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      for (int64_t token = 0; token < tokens; ++token) {
        std::memcpy(cached_keys + (head * shape.slots + write[token]) * shape.key_dim,
                    new_keys + head * key.stride(1) + token * key.stride(2), sizeof(T) * shape.key_dim);
        std::memcpy(cached_values + (head * shape.slots + write[token]) * shape.value_dim,
                    new_values + head * value.stride(1) + token * value.stride(2), sizeof(T) * shape.value_dim);
      }
  });
  Shares shares = share_out(plan, shape, Attention<T>::most_queries(shape), at::get_num_threads());
  thread_local std::vector<float> partials;
  if (static_cast<int64_t>(partials.size()) < shares.partials) partials.resize(shares.partials);
  Attention<T> attention(data_of<T>(query), cached_keys, cached_values, data_of<T>(out), plan, shape, sinks, shares,
                         partials.data());
  int64_t work = 0;
  for (const Share& share : shares.items) work += share.work();
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), work < kTooLittle ? 1 : shares.items.size());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { attention.work(threads); });
}

void check_slots(const Tensor& slots, int64_t tokens, int64_t most) {
  TORCH_CHECK(slots.numel() >= tokens, "attend: ", slots.numel(), " slots for ", tokens, " tokens");
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < tokens; ++token)
    TORCH_CHECK(slot[token] >= 0 && slot[token] < most, "attend: slot ", slot[token], " of a cache of ", most);
}

void check_attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                  const Tensor& plan, const Tensor& slots, const std::optional<Tensor>& sinks) {
  const auto type = query.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "attend: runs in float32 or bfloat16, not ", type);
  for (const auto& [name, other] : {std::pair<const char*, const Tensor&>{"key", key}, {"value", value},
                                    {"cached keys", keys}, {"cached values", values}})
    TORCH_CHECK(other.scalar_type() == type, "attend: the query is ", type, ", but the ", name, " ", other.scalar_type());
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && query.size(0) == 1 && key.size(0) == 1 &&
                  value.size(0) == 1,
              "attend: expected query, key and value of shape [1, heads, tokens, dim], not ", query.sizes(), ", ",
              key.sizes(), " and ", value.sizes());
  const int64_t heads = key.size(1), tokens = query.size(2);
  TORCH_CHECK(heads > 0 && query.size(1) % heads == 0 && value.size(1) == heads && key.size(2) == tokens &&
                  value.size(2) == tokens && key.size(3) == query.size(3),
              "attend: query ", query.sizes(), ", key ", key.sizes(), " and value ", value.sizes(), " do not go together");
  for (const auto& [name, cached, own] : {std::tuple<const char*, const Tensor&, const Tensor&>{"keys", keys, key},
                                          {"values", values, value}})
    TORCH_CHECK(cached.dim() == 3 && cached.is_contiguous() && cached.size(0) == heads && cached.size(2) == own.size(3),
                "attend: expected a dense cache of ", name, " of shape [", heads, ", slots, ", own.size(3), "], not ",
                cached.sizes());
  TORCH_CHECK(keys.size(1) == values.size(1), "attend: ", keys.size(1), " slots of keys, but ", values.size(1), " of values");
  TORCH_CHECK(plan.scalar_type() == at::kInt && plan.dim() == 1 && plan.is_contiguous(),
              "attend: expected a dense int32 plan, not ", plan.scalar_type(), " ", plan.sizes());
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.dim() == 1 && slots.is_contiguous(),
              "attend: expected dense int64 slots, not ", slots.scalar_type(), " ", slots.sizes());
  TORCH_CHECK(!sinks.has_value() || sinks->numel() == query.size(1), "attend: expected ", query.size(1), " sinks");
}

// See `AttentionSite.attend`; `plan` and `slots` are those of the batch.
Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
              const Tensor& plan, const Tensor& slots, double scaling, int64_t window, double softcap,
              const std::optional<Tensor>& sinks) {
  check_attend(query, key, value, keys, values, plan, slots, sinks);
  const Tensor q = query.stride(3) == 1 ? query : query.contiguous(), k = key.stride(3) == 1 ? key : key.contiguous(),
               v = value.stride(3) == 1 ? value : value.contiguous();
  const Plan view{plan.const_data_ptr<int32_t>(), plan.numel()};
  view.check(q.size(2), keys.size(1));
  check_slots(slots, view.tokens(), keys.size(1));
  Tensor out = at::detail::empty_cpu({1, q.size(2), q.size(1), v.size(3)}, q.options());
  if (view.tokens() < q.size(2)) out.zero_();
  const Shape shape{q.size(1), k.size(1), q.size(2), q.size(3), v.size(3), keys.size(1), q.stride(1), q.stride(2),
                    static_cast<float>(scaling), window, static_cast<float>(softcap)};
  Tensor float_sinks;
  if (sinks.has_value()) float_sinks = sinks->to(at::kFloat).contiguous();
  const float* sink = sinks.has_value() ? float_sinks.const_data_ptr<float>() : nullptr;
  if (q.scalar_type() == at::kBFloat16) {
    attend_typed<bf16>(q, k, v, keys, values, view, slots, shape, sink, out);
  } else {
    attend_typed<float>(q, k, v, keys, values, view, slots, shape, sink, out);
  }
  return out;
}

#if SPECPLUG_BF16_DOT

void check_packed(const Tensor& packed, int64_t ins, int64_t outs) {
  const int64_t panels = (outs + kPanel - 1) / kPanel;
  TORCH_CHECK(outs > 0 && ins % 2 == 0 && packed.scalar_type() == at::kBFloat16 && packed.dim() == 2 &&
                  packed.is_contiguous() && packed.size(0) == panels && packed.size(1) == panel_elements(ins),
              "linear: for ", ins, " inputs and ", outs, " outputs expected a packed bfloat16 weight of ", panels, " x ",
              panel_elements(ins), ", not ", packed.scalar_type(), " ", packed.sizes());
}

void pack(const Tensor& weight, const Tensor& packed) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2 && weight.size(1) > 0,
              "pack_weight: expected a bfloat16 matrix, not ", weight.scalar_type(), " ", weight.sizes());
  check_packed(packed, weight.size(1), weight.size(0));
  pack_weight(data_of<bf16>(weight.contiguous()), weight.size(0), weight.size(1), data_of<bf16>(packed));
}

void check_product(const Tensor& packed, const std::optional<Tensor>& bias, int64_t ins, int64_t outs) {
  check_packed(packed, ins, outs);
  TORCH_CHECK(!bias.has_value() || bias->numel() == outs, "linear: expected a bias of ", outs, ", not ", bias->sizes());
}

// Panels that are worth another thread's waking up.
int64_t grain_of(int64_t ins) { return std::max<int64_t>(1, 16384 / (ins * kPanel)); }

#if SPECPLUG_MATRIX

// Memory of this thread's own for rows in tiles.
bf16* room_for_tiles(int64_t elements) {
  thread_local std::vector<char> memory;
  const size_t bytes = elements * sizeof(bf16) + 64;
  if (memory.size() < bytes) memory.resize(bytes);
  return reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

void multiply_on_matrix_units(const bf16* x, int64_t rows, const Panels& panels) {
  const int64_t ins = panels.in_features, at_once = std::min(rows_at_once(ins), rows);
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t count = std::min(at_once, rows - row), blocks = (count + kTileRows - 1) / kTileRows;
    const bf16* from = x + row * ins;
    if (count * at::get_num_threads() <= kOwnRows) {  // sooner done than waiting for each other
      at::parallel_for(0, panels.count, grain_of(ins), [&](int64_t begin, int64_t end) {
        bf16* tiles = room_for_tiles(blocks * kTileRows * ins);
        tile_rows(from, count, ins, 0, blocks, tiles);
        multiply_tiled(tiles, count, panels, begin, end, row);
      });
      continue;
    }
    bf16* tiles = room_for_tiles(blocks * kTileRows * ins);
    at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) { tile_rows(from, count, ins, begin, end, tiles); });
    at::parallel_for(0, panels.count, grain_of(ins), [&](int64_t begin, int64_t end) {
      multiply_tiled(tiles, count, panels, begin, end, row);
    });
  }
}

#endif

// Several products of the same rows, in one parallel region: each weight is [out_features, in], packed.
std::vector<Tensor> linears(const Tensor& input, const std::vector<Tensor>& packed,
                            const std::vector<std::optional<Tensor>>& biases, const std::vector<int64_t>& out_features) {
  TORCH_CHECK(input.scalar_type() == at::kBFloat16 && input.dim() > 0 && input.size(-1) > 0,
              "linear: expected bfloat16 rows, not ", input.scalar_type(), " ", input.sizes());
  const Tensor x = input.contiguous();
  const int64_t ins = x.size(-1), rows = x.numel() / ins;
  std::vector<Tensor> outs, kept;
  Panels panels;
  panels.in_features = ins;
  for (size_t index = 0; index < packed.size(); ++index) {
    check_product(packed[index], biases[index], ins, out_features[index]);
    auto sizes = x.sizes().vec();
    sizes.back() = out_features[index];
    outs.push_back(at::detail::empty_cpu(sizes, x.options()));
    const std::optional<Tensor>& bias = biases[index];
    const float* added = nullptr;
    if (bias.has_value()) {
      kept.push_back(bias->to(at::kFloat).contiguous());
      added = kept.back().const_data_ptr<float>();
    }
    panels.add(data_of<bf16>(packed[index]), added, data_of<bf16>(outs.back()), out_features[index]);
  }
#if SPECPLUG_MATRIX
  if (has_matrix_units() && ins % kTileInputs == 0) {
    multiply_on_matrix_units(data_of<bf16>(x), rows, panels);
    return outs;
  }
#endif
  const bf16* from = data_of<bf16>(x);
  for (int64_t row = 0; row < rows; row += kRowChunk)
    at::parallel_for(0, panels.count, grain_of(ins), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel)
        multiply_panel(from + row * ins, std::min(kRowChunk, rows - row), ins, panels[panel], row);
    });
  return outs;
}

Tensor linear(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features) {
  return linears(input, {packed}, {bias}, {out_features})[0];
}

using Bias = std::optional<Tensor>;

std::tuple<Tensor, Tensor> linears_2(const Tensor& input, const Tensor& packed_0, const Tensor& packed_1,
                                     const Bias& bias_0, const Bias& bias_1, int64_t out_0, int64_t out_1) {
  const auto outs = linears(input, {packed_0, packed_1}, {bias_0, bias_1}, {out_0, out_1});
  return {outs[0], outs[1]};
}

std::tuple<Tensor, Tensor, Tensor> linears_3(const Tensor& input, const Tensor& packed_0, const Tensor& packed_1,
                                             const Tensor& packed_2, const Bias& bias_0, const Bias& bias_1,
                                             const Bias& bias_2, int64_t out_0, int64_t out_1, int64_t out_2) {
  const auto outs =
      linears(input, {packed_0, packed_1, packed_2}, {bias_0, bias_1, bias_2}, {out_0, out_1, out_2});
  return {outs[0], outs[1], outs[2]};
}

#endif

}  // namespace
}  // namespace specplug

TORCH_LIBRARY_IMPL(specplug, CPU, library) {
  library.impl("attend", &specplug::attend);
#if SPECPLUG_BF16_DOT
  library.impl("pack_weight", &specplug::pack);
  library.impl("linear", &specplug::linear);
  library.impl("linears_2", &specplug::linears_2);
  library.impl("linears_3", &specplug::linears_3);
#endif
}

extern "C" bool kernels_have_bf16_dot() { return SPECPLUG_BF16_DOT; }
extern "C" bool kernels_have_matrix_units() { return specplug::has_matrix_units(); }
