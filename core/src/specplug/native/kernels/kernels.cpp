// The kernels; `registration.cpp` makes them PyTorch's operators.
#include "attend_tensors.h"
#include "likeliest.h"
#include "multiply_tensors.h"
#include "operators.h"
#include "rows.h"

const specplug::Operators& specplug::operators() {
  static const Operators all{
      &attend,
      &attend_turned,
      &copy_rows,
      &likeliest,
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
extern "C" bool kernels_have_matrix_units() { return specplug::has_matrix_units(); }
