// Registers the kernels as PyTorch operators. `operators.py` declares their schemas.
#include <torch/library.h>

#include "attention/attention_op.h"
#include "argmax.h"
#include "gemm/linear_op.h"
#include "copy_rows.h"

TORCH_LIBRARY_IMPL(specplug, CPU, library) {
  library.impl("attend", &specplug::attend);
  library.impl("attend_rope", &specplug::attend_rope);
  library.impl("copy_rows", &specplug::copy_rows);
  library.impl("argmax_with_prob", &specplug::argmax_with_prob);
#if SPECPLUG_PACKS_BF16
  library.impl("pack_weight", &specplug::pack);
  library.impl("linear", &specplug::linear);
  library.impl("linears_2", &specplug::linears_2);
  library.impl("linears_3", &specplug::linears_3);
  library.impl("gated_linears", &specplug::gated_linears);
#endif
}

extern "C" bool kernels_pack_bf16() { return SPECPLUG_PACKS_BF16; }
extern "C" bool kernels_have_amx() { return specplug::has_amx(); }
