// The gated delta rule over packed rows: S <- exp(g) S, then S += k u^T with u = beta (v - S^T k); the result is S^T q.
//
// Tokens run one after the other, whether they are a prompt's, a window's or entries that are accepted, by the same sums: a state
// does not depend on how its tokens came. Columns of a state do not depend on each other; some are kept in a cache meanwhile.
#pragma once

#include "common/lanes.h"
#include "recurrent/state_rows.h"

namespace specplug {

constexpr int64_t kSegment = 64;  // tokens whose keys are prepared together
constexpr float kNormEpsilon = 1e-6f;

// What a token's columns need, apart from its value.
struct DeltaToken {
  float *key, *decay, *key_seen, *query_seen;  // [K]: k, exp(g), exp(g) k, exp(g) q
  float overlap, strength;                     // q k, beta

  static DeltaToken take(UnitMemory& scratch, int64_t size) {
    DeltaToken token{};
    token.key = scratch.take(size), token.decay = scratch.take(size);
    token.key_seen = scratch.take(size), token.query_seen = scratch.take(size);
    return token;
  }
};

template <typename T>
inline void read_floats(const T* from, int64_t count, float* to) {
  for (int64_t at = 0; at < count; ++at) to[at] = to_float(from[at]);
}

inline void scale(float* at, int64_t count, float factor) {
  for (int64_t each = 0; each < count; ++each) at[each] *= factor;
}

template <typename T>
struct DeltaCall {
  int64_t heads, key_heads, key_dim, value_dim, rates, held, query_step, key_step, value_step;
  bool is_normalised;
  const T *queries, *keys, *values;
  const float *logs, *strengths;  // g [T, heads, rates], beta [T, heads]
  float *states, *kept_keys, *corrections, *kept_logs;
  T* out;

  float* entry_key(const StateRow& row, int64_t entry, int64_t head) const {
    return kept_keys + ((row.slot * held + entry) * key_heads + head) * key_dim;
  }
  float* entry_correction(const StateRow& row, int64_t entry, int64_t head) const {
    return corrections + ((row.slot * held + entry) * heads + head) * value_dim;
  }
  float* entry_log(const StateRow& row, int64_t entry, int64_t head) const {
    return kept_logs + ((row.slot * held + entry) * heads + head) * rates;
  }
  void read_key(int64_t token, int64_t key_head, float* key) const {
    read_floats(keys + token * key_step + key_head * key_dim, key_dim, key);
    if (is_normalised) scale(key, key_dim, 1.0f / std::sqrt(dot(key, key, key_dim) + kNormEpsilon));
  }
  void read_decay(const float* log, float* decay) const {
    if (rates == 1) {
      std::fill_n(decay, key_dim, std::exp(*log));
    } else {
      for (int64_t at = 0; at < key_dim; ++at) decay[at] = std::exp(log[at]);
    }
  }
  void prepare(int64_t token, int64_t head, DeltaToken& to) const {
    const int64_t key_head = head / (heads / key_heads);
    float* query = to.query_seen;
    read_key(token, key_head, to.key);
    read_decay(logs + (token * heads + head) * rates, to.decay);
    read_floats(queries + token * query_step + key_head * key_dim, key_dim, query);
    const float factor = 1.0f / std::sqrt(static_cast<float>(key_dim));
    scale(query, key_dim, is_normalised ? factor / std::sqrt(dot(query, query, key_dim) + kNormEpsilon) : factor);
    to.overlap = dot(query, to.key, key_dim);
    to.strength = strengths[token * heads + head];
    for (int64_t at = 0; at < key_dim; ++at) to.key_seen[at] = to.decay[at] * to.key[at], query[at] *= to.decay[at];
  }

  // Calls `body` for columns [0, value_dim) in blocks of several registers, of one, and of one float.
  template <typename Body>
  void each_block(const Body& body) const {
    int64_t column = 0;
    for (; column + 4 * Lanes::kCount <= value_dim; column += 4 * Lanes::kCount) body.template operator()<Lanes, 4>(column);
    for (; column + Lanes::kCount <= value_dim; column += Lanes::kCount) body.template operator()<Lanes, 1>(column);
    for (; column < value_dim; ++column) body.template operator()<OneLane, 1>(column);
  }

  // A token's result, and its correction, from the columns of the state before it.
  template <typename L, int N>
  void read(const float* state, int64_t stride, const DeltaToken& with, int64_t token, int64_t head, int64_t column,
            L (&correction)[N]) const {
    L seen[N], result[N];
    for (int n = 0; n < N; ++n) seen[n] = result[n] = L::all(0.0f);
    for (int64_t row = 0; row < key_dim; ++row, state += stride) {
      const L key = L::all(with.key_seen[row]), query = L::all(with.query_seen[row]);
      for (int n = 0; n < N; ++n) {
        const L part = L::load(state + n * L::kCount);
        seen[n] = seen[n].plus_product(part, key), result[n] = result[n].plus_product(part, query);
      }
    }
    const T* value = values + token * value_step + head * value_dim + column;
    T* to = out + (token * heads + head) * value_dim + column;
    for (int n = 0; n < N; ++n) {
      float wanted[L::kCount];
      read_floats(value + n * L::kCount, L::kCount, wanted);
      correction[n] = L::all(with.strength) * L::load(wanted).plus_product(L::all(-1.0f), seen[n]);
      float results[L::kCount];
      result[n].plus_product(L::all(with.overlap), correction[n]).store(results);
      for (int64_t lane = 0; lane < L::kCount; ++lane) store(to + n * L::kCount + lane, results[lane]);
    }
  }
  // The columns of the state after a token.
  template <typename L, int N>
  void move(const float* from, int64_t from_stride, const float* key, const float* decay, const L (&correction)[N], float* to,
            int64_t to_stride) const {
    for (int64_t row = 0; row < key_dim; ++row, from += from_stride, to += to_stride) {
      const L left = L::all(decay[row]), factor = L::all(key[row]);
      for (int n = 0; n < N; ++n)
        (L::load(from + n * L::kCount) * left).plus_product(factor, correction[n]).store(to + n * L::kCount);
    }
  }

  void replay(const StateRow& row, int64_t head, float* state) const {
    UnitMemory scratch(row.replayed * key_dim, row.replayed);
    std::vector<float*> decays;
    for (int64_t each = 0; each < row.replayed; ++each) {
      decays.push_back(scratch.take(key_dim));
      read_decay(entry_log(row, row.replay[each], head), decays.back());
    }
    const int64_t key_head = head / (heads / key_heads);
    for (int64_t line = 0; line < key_dim; ++line, state += value_dim)
      each_block([&]<typename L, int N>(int64_t column) {
        L parts[N];
        for (int n = 0; n < N; ++n) parts[n] = L::load(state + column + n * L::kCount);
        for (int64_t each = 0; each < row.replayed; ++each) {
          const int64_t entry = row.replay[each];
          const L left = L::all(decays[each][line]), factor = L::all(entry_key(row, entry, key_head)[line]);
          const float* correction = entry_correction(row, entry, head) + column;
          for (int n = 0; n < N; ++n)
            parts[n] = (parts[n] * left).plus_product(factor, L::load(correction + n * L::kCount));
        }
        for (int n = 0; n < N; ++n) parts[n].store(state + column + n * L::kCount);
      });
  }

  // Tokens over which the state is brought forward.
  void pass(int64_t begin, int64_t end, int64_t head, float* state) const {
    constexpr int64_t kBlock = 4 * Lanes::kCount;
    UnitMemory scratch(std::min(kSegment, end - begin) * 4 * key_dim + key_dim * kBlock, 4 * kSegment + 1);
    float* block = scratch.take(key_dim * kBlock);
    std::vector<DeltaToken> prepared;
    for (int64_t each = 0; each < std::min(kSegment, end - begin); ++each)
      prepared.push_back(DeltaToken::take(scratch, key_dim));
    for (int64_t first = begin; first < end; first += kSegment) {
      const int64_t count = std::min(kSegment, end - first);
      for (int64_t each = 0; each < count; ++each) prepare(first + each, head, prepared[each]);
      each_block([&]<typename L, int N>(int64_t column) {
        constexpr int64_t width = N * L::kCount;
        for (int64_t line = 0; line < key_dim; ++line)
          std::copy_n(state + line * value_dim + column, width, block + line * width);
        for (int64_t each = 0; each < count; ++each) {
          const DeltaToken& with = prepared[each];
          L correction[N];
          read<L, N>(block, width, with, first + each, head, column, correction);
          move<L, N>(block, width, with.key, with.decay, correction, block, width);
        }
        for (int64_t line = 0; line < key_dim; ++line)
          std::copy_n(block + line * width, width, state + line * value_dim + column);
      });
    }
  }

  // Tokens that may be rejected: the state stays, what they add to it is kept.
  void look(const StateRow& row, int64_t head, const float* state) const {
    constexpr int64_t kBlock = 4 * Lanes::kCount;
    const int64_t width = row.width(), key_head = head / (heads / key_heads);
    UnitMemory scratch(width * (4 + kBlock) * key_dim, 5 * width);
    std::vector<DeltaToken> nodes;
    std::vector<float*> after;
    for (int64_t node = 0; node < width; ++node) {
      nodes.push_back(DeltaToken::take(scratch, key_dim));
      after.push_back(row.is_parent(node) ? scratch.take(key_dim * kBlock) : nullptr);
      if (row.is_new(node)) {
        prepare(row.token(node), head, nodes[node]);
        std::copy_n(logs + (row.token(node) * heads + head) * rates, rates, entry_log(row, node, head));
        continue;
      }
      std::copy_n(entry_key(row, row.remain[node], key_head), key_dim, nodes[node].key);
      std::copy_n(entry_log(row, row.remain[node], head), rates, entry_log(row, node, head));
      read_decay(entry_log(row, node, head), nodes[node].decay);
    }
    each_block([&]<typename L, int N>(int64_t column) {
      constexpr int64_t own = N * L::kCount;
      for (int64_t node = 0; node < width; ++node) {
        const int64_t parent = row.parent(node), stride = parent < 0 ? value_dim : own;
        const float* before = parent < 0 ? state + column : after[parent];
        L correction[N];
        if (row.is_new(node)) {
          read<L, N>(before, stride, nodes[node], row.token(node), head, column, correction);
        } else {
          const float* from = entry_correction(row, row.remain[node], head) + column;
          for (int n = 0; n < N; ++n) correction[n] = L::load(from + n * L::kCount);
        }
        float* to = entry_correction(row, node, head) + column;
        for (int n = 0; n < N; ++n) correction[n].store(to + n * L::kCount);
        if (after[node]) move<L, N>(before, stride, nodes[node].key, nodes[node].decay, correction, after[node], own);
      }
    });
  }

  void run(const StateRow& row, int64_t head) const {
    float* state = states + (row.slot * heads + head) * key_dim * value_dim;
    if (row.is_fresh) std::fill_n(state, key_dim * value_dim, 0.0f);
    if (row.replayed) replay(row, head, state);
    if (row.passed) pass(row.first, row.first + row.passed, head, state);
    if (row.width()) look(row, head, state);
  }
  // Keeps the window's keys, which several heads may share: after all heads have read those before.
  void keep_keys(const StateRow& row) const {
    for (int64_t node = 0; node < row.width(); ++node)
      for (int64_t head = 0; head < key_heads; ++head) {
        if (row.is_new(node)) {
          read_key(row.token(node), head, entry_key(row, node, head));
        } else {
          std::copy_n(entry_key(row, row.remain[node], head), key_dim, entry_key(row, node, head));
        }
      }
  }
};

// query and key [T, key heads, K], value [T, heads, V], g [T, heads, 1 or K], beta [T, heads] → [T, heads, V]. States [slots, heads, K, V];
// entries: keys [slots, held, key heads, K], corrections [slots, held, heads, V], logs [slots, held, heads, 1 or K].
inline Tensor delta_rule(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& g, const Tensor& beta,
                         const Tensor& states, const Tensor& keys, const Tensor& corrections, const Tensor& logs,
                         const Tensor& plan, bool is_normalised) {
  const auto type = value.scalar_type();
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && query.scalar_type() == type && key.scalar_type() == type,
              "delta_rule: expected queries, keys and values of float or bfloat16, not ", query.scalar_type(), ", ",
              key.scalar_type(), ", ", type);
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3 && g.dim() == 3 && beta.dim() == 2 && keys.dim() == 4 &&
                  query.sizes() == key.sizes() && key.size(0) == value.size(0) && g.size(0) == value.size(0) &&
                  beta.size(0) == value.size(0) && g.size(1) == value.size(1) && beta.size(1) == value.size(1) &&
                  key.size(1) > 0 && value.size(1) % key.size(1) == 0 && (g.size(2) == 1 || g.size(2) == key.size(2)),
              "delta_rule: sizes do not fit: queries ", query.sizes(), ", keys ", key.sizes(), ", values ", value.sizes(), ", g ",
              g.sizes(), ", beta ", beta.sizes());
  const int64_t tokens = value.size(0), heads = value.size(1), key_heads = key.size(1), slots = states.size(0);
  const int64_t held = keys.size(1), key_dim = key.size(2), value_dim = value.size(2), rates = g.size(2);
  check_memory(states, {slots, heads, key_dim, value_dim}, "delta_rule");
  check_memory(keys, {slots, held, key_heads, key_dim}, "delta_rule");
  check_memory(corrections, {slots, held, heads, value_dim}, "delta_rule");
  check_memory(logs, {slots, held, heads, rates}, "delta_rule");
  const auto rows = read_rows(plan, slots, held, tokens);
  const Tensor q = with_dense_tokens(query), k = with_dense_tokens(key), v = with_dense_tokens(value);
  const Tensor rate = g.to(at::kFloat).contiguous(), strength = beta.to(at::kFloat).contiguous();
  const Tensor out = at::detail::empty_cpu(value.sizes(), value.options().memory_format(at::MemoryFormat::Contiguous));
  const auto run = [&]<typename T>(T*) {
    const DeltaCall<T> call{heads, key_heads, key_dim, value_dim, rates, held, q.stride(0), k.stride(0), v.stride(0),
                            is_normalised, data_of<T>(q), data_of<T>(k), data_of<T>(v), data_of<float>(rate),
                            data_of<float>(strength), data_of<float>(states), data_of<float>(keys),
                            data_of<float>(corrections), data_of<float>(logs), data_of<T>(out)};
    at::parallel_for(0, static_cast<int64_t>(rows.size()) * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) call.run(rows[unit / heads], unit % heads);
    });
    for (const StateRow& row : rows) call.keep_keys(row);
  };
  type == at::kFloat ? run(static_cast<float*>(nullptr)) : run(static_cast<bf16*>(nullptr));
  return out;
}

}  // namespace specplug
