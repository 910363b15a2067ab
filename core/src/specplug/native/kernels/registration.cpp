// The kernels, registered as PyTorch's operators. Their schemas stand in `operators.py`.
//
// A file of its own: PyTorch's header takes as long to compile as all kernels, and both are compiled at the same time.
#include <torch/library.h>

#include "operators.h"

TORCH_LIBRARY_IMPL(specplug, CPU, library) {
  const specplug::Operators& operators = specplug::operators();
  library.impl("attend", operators.attend);
  library.impl("attend_turned", operators.attend_turned);
  library.impl("copy_rows", operators.copy_rows);
  library.impl("likeliest", operators.likeliest);
  if (!operators.linear) return;
  library.impl("pack_weight", operators.pack_weight);
  library.impl("linear", operators.linear);
  library.impl("linears_2", operators.linears_2);
  library.impl("linears_3", operators.linears_3);
  library.impl("gated_linears", operators.gated_linears);
}
