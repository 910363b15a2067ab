// Access to PyTorch tensors.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

namespace specplug {

using at::Tensor;

template <typename T>
T* data_of(const Tensor& tensor) {
  return reinterpret_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

}  // namespace specplug
