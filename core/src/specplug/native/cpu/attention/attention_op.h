// The attention operators: checks arguments, stores new keys and values in the cache, attends.
#pragma once

#include <optional>
#include <vector>

#include "attention/attention.h"
#include "attention/rope.h"
#include "common/torch_util.h"

namespace specplug {

constexpr int64_t kSingleThreadWork = 8192;  // not worth waking a second thread

// Stores new keys and values in the cache. Applies RoPE to keys and queries if cosines and sines are given.
template <typename T>
void store_kv(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
             const Tensor& slots, const Shape& shape, int64_t tokens, const Rope<T>& rope, T* rotated) {
  T *cached_keys = data_of<T>(keys), *cached_values = data_of<T>(values);
  const T *queries = data_of<T>(query), *new_keys = data_of<T>(key), *new_values = data_of<T>(value);
  const int64_t* write = slots.const_data_ptr<int64_t>();
  const int64_t group = shape.heads / shape.kv_heads, dim = shape.key_dim;
  const int64_t elements = dim + shape.value_dim + (rope ? 4 * (group + 1) * dim : 0);
  const int64_t grain = std::max<int64_t>(1, 32768 / elements);
  at::parallel_for(0, shape.kv_heads * tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t head = index / tokens, token = index % tokens, slot = head * shape.slots + write[token];
      const T* from = new_keys + head * key.stride(1) + token * key.stride(2);
      if (rope) {
        rope.rotate(from, token, dim, cached_keys + slot * dim);
        for (int64_t q = head * group; q < (head + 1) * group; ++q)
          rope.rotate(queries + q * query.stride(1) + token * query.stride(2), token, dim,
                        rotated + (token * shape.heads + q) * dim);
      } else {
        std::memcpy(cached_keys + slot * dim, from, sizeof(T) * dim);
      }
      std::memcpy(cached_values + slot * shape.value_dim, new_values + head * value.stride(1) + token * value.stride(2),
                  sizeof(T) * shape.value_dim);
    }
  });
}

template <typename T>
void attend_typed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                  const Plan& plan, const Tensor& slots, Shape shape, const float* sinks, const Rope<T>& rope,
                  Tensor& out) {
  const T* queries = data_of<T>(query);
  Tensor buffer;
  T* rotated = nullptr;
  if (rope) {
    buffer = at::detail::empty_cpu({shape.tokens, shape.heads, shape.key_dim}, query.options());
    queries = rotated = data_of<T>(buffer);
  }
  store_kv<T>(query, key, value, keys, values, slots, shape, plan.tokens(), rope, rotated);
  if (rope) shape.query_head = shape.key_dim, shape.query_token = shape.heads * shape.key_dim;
  Partition partition = partition_work(plan, shape, Attention<T>::most_queries(shape), at::get_num_threads());
  thread_local std::vector<float> partials;
  if (static_cast<int64_t>(partials.size()) < partition.partials) partials.resize(partition.partials);
  Attention<T> attention(queries, data_of<T>(keys), data_of<T>(values), data_of<T>(out), plan, shape, sinks, partition,
                         partials.data());
  int64_t work = 0;
  for (const WorkItem& item : partition.items) work += item.work();
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), work < kSingleThreadWork ? 1 : partition.items.size());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { attention.work(threads); });
}

inline void check_slots(const Tensor& slots, int64_t tokens, int64_t most) {
  TORCH_CHECK(slots.numel() >= tokens, "attend: ", slots.numel(), " slots for ", tokens, " tokens");
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < tokens; ++token)
    TORCH_CHECK(slot[token] >= 0 && slot[token] < most, "attend: slot ", slot[token], " of a cache of ", most);
}

inline void check_attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
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

// Checks cosines or sines: one row per token, covering all or part of a head.
inline Tensor check_angles(const Tensor& given, const Tensor& query, int64_t width, const char* name) {
  TORCH_CHECK(given.scalar_type() == query.scalar_type() && given.dim() >= 2 && given.size(-1) == width && width % 2 == 0 &&
                  width <= query.size(3) && given.numel() == query.size(2) * width,
              "attend: expected ", name, " of ", query.size(2), " tokens and an even number of at most ", query.size(3),
              " elements in ", query.scalar_type(), ", not ", given.sizes(), " in ", given.scalar_type());
  return given.contiguous();
}

template <typename T>
void attend_as(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
               const Plan& plan, const Tensor& slots, const Shape& shape, const float* sinks,
               const std::optional<Tensor>& cosines, const std::optional<Tensor>& sines, Tensor& out) {
  if (!cosines.has_value()) return attend_typed<T>(query, key, value, keys, values, plan, slots, shape, sinks, {}, out);
  const int64_t width = cosines->dim() ? cosines->size(-1) : 0;
  const Tensor c = check_angles(*cosines, query, width, "cosines"), s = check_angles(*sines, query, width, "sines");
  attend_typed<T>(query, key, value, keys, values, plan, slots, shape, sinks, {data_of<T>(c), data_of<T>(s), width}, out);
}

// See `AttentionSite.attend`. `plan` and `slots` belong to the batch. Cosines and sines, if given, apply RoPE first.
inline Tensor attend_with(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                   const Tensor& plan, const Tensor& slots, double scaling, int64_t window, double softcap,
                   const std::optional<Tensor>& sinks, const std::optional<Tensor>& cosines,
                   const std::optional<Tensor>& sines) {
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
    attend_as<bf16>(q, k, v, keys, values, view, slots, shape, sink, cosines, sines, out);
  } else {
    attend_as<float>(q, k, v, keys, values, view, slots, shape, sink, cosines, sines, out);
  }
  return out;
}

inline Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
              const Tensor& plan, const Tensor& slots, double scaling, int64_t window, double softcap,
              const std::optional<Tensor>& sinks) {
  return attend_with(query, key, value, keys, values, plan, slots, scaling, window, softcap, sinks, {}, {});
}

inline Tensor attend_rope(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                     const Tensor& plan, const Tensor& slots, double scaling, int64_t window, double softcap,
                     const std::optional<Tensor>& sinks, const Tensor& cosines, const Tensor& sines) {
  return attend_with(query, key, value, keys, values, plan, slots, scaling, window, softcap, sinks, cosines, sines);
}

}  // namespace specplug
