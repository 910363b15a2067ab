// Short causal convolutions: of each channel, a weighted sum of a token's input and those of the few tokens before it.
//
// A row's memory [width - 1 + held, channels] holds the last inputs before its state, then those of its entries.
#pragma once

#include <optional>

#include "common/lanes.h"
#include "recurrent/state_rows.h"

namespace specplug {

constexpr int64_t kChannels = 64;  // of a unit of work

// x / (1 + exp(-x)) of the channels of a unit, in place.
#if SPECPLUG_AVX512
inline void silu(float* at) {
  for (int64_t lane = 0; lane < kChannels; lane += 16) {
    const __m512 x = _mm512_loadu_ps(at + lane), one = _mm512_set1_ps(1.0f);
    const __m512 small = exp2_nonpositive(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-kLog2E)));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 above = _mm512_mask_blend_ps(negative, one, small);
    _mm512_storeu_ps(at + lane, _mm512_div_ps(_mm512_mul_ps(x, above), _mm512_add_ps(small, one)));
  }
}
#elif SPECPLUG_AVX2
inline void silu(float* at) {
  const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
  for (int64_t lane = 0; lane < kChannels; lane += 8) {
    const __m256 x = _mm256_loadu_ps(at + lane);
    const __m256 small = exp2_nonpositive(_mm256_mul_ps(_mm256_andnot_ps(sign, x), _mm256_set1_ps(-kLog2E)));
    const __m256 above = _mm256_blendv_ps(one, small, x);  // by the sign
    _mm256_storeu_ps(at + lane, _mm256_div_ps(_mm256_mul_ps(x, above), _mm256_add_ps(small, one)));
  }
}
#else
inline void silu(float* at) {
  for (int64_t lane = 0; lane < kChannels; ++lane) {
    const float x = at[lane], small = exp2_nonpositive(std::fabs(x) * -kLog2E);
    at[lane] = x * (x < 0.0f ? small : 1.0f) / (small + 1.0f);
  }
}
#endif

// Loops over all channels of a unit have a length that the compiler knows: it unrolls them into registers.
template <typename T>
inline void read_channels(const T* from, int64_t lanes, float* to) {
  if (lanes == kChannels) {
    for (int64_t lane = 0; lane < kChannels; ++lane) to[lane] = to_float(from[lane]);
    return;
  }
  for (int64_t lane = 0; lane < kChannels; ++lane) to[lane] = lane < lanes ? to_float(from[lane]) : 0.0f;
}
template <typename T>
inline void store_channels(const float* from, int64_t lanes, T* to) {
  if (lanes == kChannels) {
    for (int64_t lane = 0; lane < kChannels; ++lane) store(to + lane, from[lane]);
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) store(to + lane, from[lane]);
}

template <typename T>
struct ConvolutionCall {
  int64_t channels, width, held, step;
  const T *inputs, *filters;  // filters [channels, width]
  const float* bias;
  bool is_activated;
  T *memory, *out;

  // Up to 64 channels of a row, from `channel` on.
  void run(const StateRow& row, int64_t channel) const {
    const int64_t lanes = std::min(kChannels, channels - channel), size = width - 1 + held;
    const int64_t past = width - 1 + row.replayed + row.remaining, total = past + row.count;
    UnitMemory scratch((total + 1 + width + 1) * kChannels, 4);
    float* sources = scratch.take(total * kChannels);
    float* sums = scratch.take(kChannels);
    float* factors = scratch.take(width * kChannels);
    T* own = memory + row.slot * size * channels + channel;
    for (int64_t at = 0; at < width - 1; ++at) read_channels(own + at * channels, row.is_fresh ? 0 : lanes, sources + at * kChannels);
    for (int64_t at = 0; at < row.replayed + row.remaining; ++at)
      read_channels(own + (width - 1 + row.replay[at]) * channels, lanes, sources + (width - 1 + at) * kChannels);
    for (int64_t at = 0; at < row.count; ++at)
      read_channels(inputs + (row.first + at) * step + channel, lanes, sources + (past + at) * kChannels);
    for (int64_t tap = 0; tap < width; ++tap)
      for (int64_t lane = 0; lane < kChannels; ++lane)
        factors[tap * kChannels + lane] = lane < lanes ? to_float(filters[(channel + lane) * width + tap]) : 0.0f;
    for (int64_t token = 0; token < row.count; ++token) {
      for (int64_t lane = 0; lane < kChannels; ++lane) sums[lane] = bias && lane < lanes ? bias[channel + lane] : 0.0f;
      int64_t source = past + token;
      for (int64_t tap = width - 1; tap >= 0; --tap) {
        const float *from = sources + source * kChannels, *with = factors + tap * kChannels;
        for (int64_t lane = 0; lane < kChannels; lane += Lanes::kCount)
          Lanes::load(sums + lane).plus_product(Lanes::load(from + lane), Lanes::load(with + lane)).store(sums + lane);
        source = source < past || !row.parents ? source - 1 : past + row.parents[source - past];
      }
      if (is_activated) silu(sums);
      store_channels(sums, lanes, out + (row.first + token) * channels + channel);
    }
    const int64_t begin = row.replayed + row.passed;
    for (int64_t at = begin; at < total; ++at) store_channels(sources + at * kChannels, lanes, own + (at - begin) * channels);
  }
};

template <typename T>
inline void convolve(const Tensor& inputs, const Tensor& filters, const std::optional<Tensor>& bias, const Tensor& memory,
                     const std::vector<StateRow>& rows, bool is_activated, const Tensor& out) {
  const int64_t channels = inputs.size(1), width = filters.size(1), units = (channels + kChannels - 1) / kChannels;
  const ConvolutionCall<T> call{channels, width, memory.size(1) - (width - 1), inputs.stride(0), data_of<T>(inputs),
                                data_of<T>(filters), bias ? data_of<float>(*bias) : nullptr, is_activated,
                                data_of<T>(memory), data_of<T>(out)};
  const int64_t grain = std::max<int64_t>(1, 16 * static_cast<int64_t>(rows.size()) / std::max<int64_t>(1, inputs.size(0)));
  at::parallel_for(0, static_cast<int64_t>(rows.size()) * units, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) call.run(rows[unit / units], unit % units * kChannels);
  });
}

// inputs [T, channels], weight [channels, width], memory [slots, width - 1 + held, channels] → [T, channels].
inline Tensor short_convolution(const Tensor& inputs, const Tensor& weight, const std::optional<Tensor>& bias,
                                const Tensor& memory, const Tensor& plan, bool is_activated) {
  const auto type = inputs.scalar_type();
  TORCH_CHECK((type == at::kFloat || type == at::kBFloat16) && memory.scalar_type() == type && inputs.dim() == 2 &&
                  weight.dim() == 2 && memory.dim() == 3 && memory.is_contiguous() && weight.size(0) == inputs.size(1) &&
                  memory.size(2) == inputs.size(1) && weight.size(1) > 0 && memory.size(1) >= weight.size(1) - 1 &&
                  (!bias || bias->numel() == inputs.size(1)),
              "short_convolution: expected float or bfloat16 inputs and memory, not ", type, " ", inputs.sizes(), ", ",
              memory.scalar_type(), " ", memory.sizes(), ", weight ", weight.sizes());
  const Tensor dense = with_dense_tokens(inputs), filters = weight.to(type).contiguous();
  std::optional<Tensor> added;
  if (bias) added = bias->to(at::kFloat).contiguous();
  const auto rows = read_rows(plan, memory.size(0), memory.size(1) - (weight.size(1) - 1), inputs.size(0));
  const Tensor out = at::detail::empty_cpu(inputs.sizes(), inputs.options().memory_format(at::MemoryFormat::Contiguous));
  if (type == at::kFloat)
    convolve<float>(dense, filters, added, memory, rows, is_activated, out);
  else
    convolve<bf16>(dense, filters, added, memory, rows, is_activated, out);
  return out;
}

}  // namespace specplug
