// Registers the kernels as PyTorch operators. `operators.py` declares their schemas.
//
// A separate translation unit: PyTorch's library header takes as long to compile as all kernels, and both compile in parallel.
#include <torch/library.h>

#include "operators.h"

TORCH_LIBRARY_IMPL(specplug, CPU, library) {
  const specplug::Operators& operators = specplug::operators();
  library.impl("attend", operators.attend);
  library.impl("attend_rope", operators.attend_rope);
  library.impl("copy_rows", operators.copy_rows);
  library.impl("argmax_with_prob", operators.argmax_with_prob);
  library.impl("add_low_rank", operators.add_low_rank);
  library.impl("short_convolution", operators.short_convolution);
  library.impl("delta_rule", operators.delta_rule);
  library.impl("state_space_scan", operators.state_space_scan);
  if (!operators.linear) return;
  library.impl("pack_weight", operators.pack_weight);
  library.impl("linear", operators.linear);
  library.impl("linears_2", operators.linears_2);
  library.impl("linears_3", operators.linears_3);
  library.impl("gated_linears", operators.gated_linears);
}
