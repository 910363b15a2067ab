// The linear operators: check arguments, distribute panels over threads.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "gemm/gemm_amx.h"
#include "common/torch_util.h"

namespace specplug {

#if SPECPLUG_PACKS_BF16

inline void check_packed(const Tensor& packed, int64_t ins, int64_t outs) {
  const int64_t panels = (outs + kPanel - 1) / kPanel;
  const bool is_int8 = packed.scalar_type() == at::kChar;
  const int64_t width = is_int8 ? int8_panel_bytes(ins) : panel_elements(ins);
  TORCH_CHECK(outs > 0 && ins % 2 == 0 && (is_int8 || packed.scalar_type() == at::kBFloat16) && packed.dim() == 2 &&
                  packed.is_contiguous() && packed.size(0) == panels && packed.size(1) == width,
              "linear: for ", ins, " inputs and ", outs, " outputs expected a packed bfloat16 weight of ", panels, " x ",
              panel_elements(ins), " or a packed int8 weight of ", panels, " x ", int8_panel_bytes(ins), ", not ",
              packed.scalar_type(), " ", packed.sizes());
}

inline void pack(const Tensor& weight, const Tensor& packed) {
  TORCH_CHECK(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2 && weight.size(1) > 0,
              "pack_weight: expected a bfloat16 matrix, not ", weight.scalar_type(), " ", weight.sizes());
  check_packed(packed, weight.size(1), weight.size(0));
  TORCH_CHECK(packed.scalar_type() == at::kBFloat16, "pack_weight: expected bfloat16 memory, not ", packed.scalar_type());
  pack_weight(data_of<bf16>(weight.contiguous()), weight.size(0), weight.size(1), data_of<bf16>(packed));
}

inline void check_product(const Tensor& packed, const std::optional<Tensor>& bias, int64_t ins, int64_t outs) {
  check_packed(packed, ins, outs);
  TORCH_CHECK(!bias.has_value() || bias->numel() == outs, "linear: expected a bias of ", outs, ", not ", bias->sizes());
}

// Units per thread that are worth a wake-up.
inline int64_t grain_of(const Panels& panels) {
  return std::max<int64_t>(1, 16384 / (panels.in_features * kPanel * (panels.gate ? 2 : 1)));
}

#if SPECPLUG_AMX

// This thread's buffer for tiled rows.
inline bf16* tile_buffer(int64_t elements) {
  thread_local std::vector<char> memory;
  const size_t bytes = elements * sizeof(bf16) + 64;
  if (memory.size() < bytes) memory.resize(bytes);
  return reinterpret_cast<bf16*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

inline void multiply_amx(const bf16* x, int64_t rows, const Panels& panels) {
  const int64_t ins = panels.in_features, at_once = std::min(rows_at_once(ins), rows);
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t count = std::min(at_once, rows - row), blocks = (count + kTileRows - 1) / kTileRows;
    const bf16* from = x + row * ins;
    const int64_t grain = grain_of(panels);
    if (count * at::get_num_threads() <= kPrivateTileRows) {  // cheaper than a second barrier
      at::parallel_for(0, panels.units(), grain, [&](int64_t begin, int64_t end) {
        bf16* tiles = tile_buffer(blocks * kTileRows * ins);
        tile_rows(from, count, ins, 0, blocks, tiles);
        multiply_tiled(tiles, count, panels, begin, end, row);
      });
      continue;
    }
    bf16* tiles = tile_buffer(blocks * kTileRows * ins);
    at::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) { tile_rows(from, count, ins, begin, end, tiles); });
    at::parallel_for(0, panels.units(), grain, [&](int64_t begin, int64_t end) {
      multiply_tiled(tiles, count, panels, begin, end, row);
    });
  }
}

#endif

inline void multiply(const bf16* x, int64_t rows, const Panels& panels) {
#if SPECPLUG_AMX
  if (has_amx() && panels.in_features % kTileInputs == 0) return multiply_amx(x, rows, panels);
#endif
  const int64_t chunk = chunk_of(panels.in_features);
  for (int64_t row = 0; row < rows; row += chunk)
    at::parallel_for(0, panels.units(), grain_of(panels), [&](int64_t begin, int64_t end) {
      multiply_units(x + row * panels.in_features, std::min(chunk, rows - row), panels, begin, end, row);
    });
}

using Bias = std::optional<Tensor>;

// Linears over the same rows in one call; each weight is a packed [out_features, in].
class LinearCall {
 public:
  explicit LinearCall(const Tensor& input) : x_(input.contiguous()) {
    TORCH_CHECK(input.scalar_type() == at::kBFloat16 && input.dim() > 0 && input.size(-1) > 0,
                "linear: expected bfloat16 rows, not ", input.scalar_type(), " ", input.sizes());
    panels.in_features = x_.size(-1);
  }

  // Allocates the output of one linear.
  Tensor allocate(int64_t outs) const {
    auto sizes = x_.sizes().vec();
    sizes.back() = outs;
    return at::detail::empty_cpu(sizes, x_.options());
  }
  void add(const Tensor& packed, const Bias& bias, int64_t outs, const Tensor& out) {
    check_product(packed, bias, panels.in_features, outs);
    const float* added = nullptr;
    if (bias.has_value()) {
      kept_.push_back(bias->to(at::kFloat).contiguous());
      added = kept_.back().const_data_ptr<float>();
    }
    panels.add(data_of<char>(packed), packed.scalar_type() == at::kChar, added, data_of<bf16>(out), outs);
  }
  void run() const { multiply(data_of<bf16>(x_), x_.numel() / panels.in_features, panels); }

  Panels panels;

 private:
  const Tensor x_;
  std::vector<Tensor> kept_;
};

// Several linears in one parallel region.
inline std::vector<Tensor> linears(const Tensor& input, const std::vector<Tensor>& packed, const std::vector<Bias>& biases,
                            const std::vector<int64_t>& out_features) {
  LinearCall call(input);
  std::vector<Tensor> outs;
  for (size_t index = 0; index < packed.size(); ++index) {
    outs.push_back(call.allocate(out_features[index]));
    call.add(packed[index], biases[index], out_features[index], outs.back());
  }
  call.run();
  return outs;
}

// activation(gate linear) * up linear.
inline Tensor gated_linears(const Tensor& input, const Tensor& gate, const Tensor& up, const Bias& gate_bias, const Bias& up_bias,
                     int64_t out_features, int64_t activation) {
  TORCH_CHECK(activation == static_cast<int64_t>(Activation::kSilu) ||
                  activation == static_cast<int64_t>(Activation::kGeluTanh),
              "linear: unknown activation ", activation);
  LinearCall call(input);
  const Tensor out = call.allocate(out_features);
  call.add(gate, gate_bias, out_features, out);
  call.add(up, up_bias, out_features, out);
  call.panels.gate = static_cast<Activation>(activation);
  call.run();
  return out;
}

inline Tensor linear(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features) {
  return linears(input, {packed}, {bias}, {out_features})[0];
}

inline std::tuple<Tensor, Tensor> linears_2(const Tensor& input, const Tensor& packed_0, const Tensor& packed_1,
                                     const Bias& bias_0, const Bias& bias_1, int64_t out_0, int64_t out_1) {
  const auto outs = linears(input, {packed_0, packed_1}, {bias_0, bias_1}, {out_0, out_1});
  return {outs[0], outs[1]};
}

inline std::tuple<Tensor, Tensor, Tensor> linears_3(const Tensor& input, const Tensor& packed_0, const Tensor& packed_1,
                                             const Tensor& packed_2, const Bias& bias_0, const Bias& bias_1,
                                             const Bias& bias_2, int64_t out_0, int64_t out_1, int64_t out_2) {
  const auto outs =
      linears(input, {packed_0, packed_1, packed_2}, {bias_0, bias_1, bias_2}, {out_0, out_1, out_2});
  return {outs[0], outs[1], outs[2]};
}

#endif

}  // namespace specplug
