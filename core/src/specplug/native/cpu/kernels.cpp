// The kernels. `registration.cpp` registers them as PyTorch operators.
#include "argmax.h"
#include "attention/attention_op.h"
#include "copy_rows.h"
#include "gemm/linear_op.h"
#include "low_rank.h"
#include "operators.h"
#include "recurrent/convolution.h"
#include "recurrent/delta_rule.h"
#include "recurrent/state_space.h"

const specplug::Operators& specplug::operators() {
  static const Operators all{
      &attend,
      &attend_rope,
      &copy_rows,
      &argmax_with_prob,
      &add_low_rank,
      &short_convolution,
      &delta_rule,
      &state_space_scan,
#if SPECPLUG_PACKS_BF16
      &pack,
      &linear,
      &linears_2,
      &linears_3,
      &gated_linears,
#endif
  };
  return all;
}

extern "C" bool kernels_pack_bf16() { return SPECPLUG_PACKS_BF16; }
extern "C" bool kernels_have_amx() { return specplug::has_amx(); }
