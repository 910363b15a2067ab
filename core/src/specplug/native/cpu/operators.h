// Table of operator functions: `kernels.cpp` fills it, `registration.cpp` registers them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace specplug {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The operators on packed bfloat16 weights are null where the CPU has neither AVX2 nor AVX-512.
struct Operators {
  Tensor (*attend)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                   double, int64_t, double, const MaybeTensor&);
  Tensor (*attend_rope)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, double, int64_t, double, const MaybeTensor&, const Tensor&, const Tensor&);
  void (*copy_rows)(at::TensorList, at::IntArrayRef, at::IntArrayRef, at::TensorList, at::IntArrayRef);
  std::tuple<Tensor, Tensor> (*argmax_with_prob)(const Tensor&);
  Tensor (*add_low_rank)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
  Tensor (*short_convolution)(const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&, const Tensor&, bool);
  Tensor (*delta_rule)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                       const Tensor&, const Tensor&, const Tensor&, bool);
  Tensor (*state_space_scan)(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                             const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
  void (*pack_weight)(const Tensor&, const Tensor&) = nullptr;
  Tensor (*linear)(const Tensor&, const Tensor&, const MaybeTensor&, int64_t) = nullptr;
  std::tuple<Tensor, Tensor> (*linears_2)(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                          const MaybeTensor&, int64_t, int64_t) = nullptr;
  std::tuple<Tensor, Tensor, Tensor> (*linears_3)(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                  const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, int64_t,
                                                  int64_t, int64_t) = nullptr;
  Tensor (*gated_linears)(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, const MaybeTensor&, int64_t,
                          int64_t) = nullptr;
};

const Operators& operators();

}  // namespace specplug
