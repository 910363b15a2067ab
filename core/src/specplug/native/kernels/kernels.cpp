// The kernels, registered as PyTorch's operators. Their schemas stand in `operators.py`.
#include <torch/library.h>

#include "attend_tensors.h"
#include "likeliest.h"
#include "multiply_tensors.h"
#include "rows.h"

TORCH_LIBRARY_IMPL(specplug, CPU, library) {
  library.impl("attend", &specplug::attend);
  library.impl("attend_turned", &specplug::attend_turned);
  library.impl("copy_rows", &specplug::copy_rows);
  library.impl("likeliest", &specplug::likeliest);
#if SPECPLUG_PACKS_BF16
  library.impl("pack_weight", &specplug::pack);
  library.impl("linear", &specplug::linear);
  library.impl("linears_2", &specplug::linears_2);
  library.impl("linears_3", &specplug::linears_3);
  library.impl("gated_linears", &specplug::gated_linears);
#endif
}

extern "C" bool kernels_pack_bf16() { return SPECPLUG_PACKS_BF16; }
extern "C" bool kernels_have_matrix_units() { return specplug::has_matrix_units(); }
