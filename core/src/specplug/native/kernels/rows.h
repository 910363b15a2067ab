// Copying some rows of some matrices to places in others: what a step computed to where it is kept.
#pragma once

#include <cstring>

#include "tensors.h"
#include "vector.h"

namespace specplug {

// Past the caches: what is kept is hardly ever read, and should drive nothing out.
inline void put_aside(char* to, const char* from, int64_t bytes) {
#if SPECPLUG_VECTOR
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0) {
    for (int64_t at = 0; at < bytes; at += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// Row read[i] of a source to row write[i] of its destination, as far as that is wide.
inline void copy_rows_of(const Tensor& source, at::IntArrayRef read, const Tensor& to, at::IntArrayRef write) {
  TORCH_CHECK(source.dim() == 2 && to.dim() == 2 && source.size(1) >= to.size(1) && to.stride(1) == 1,
              "copy_rows: expected matrices, the source at least as wide as the destination, not ", source.sizes(),
              " and ", to.sizes());
  for (size_t row = 0; row < read.size(); ++row)
    TORCH_CHECK(read[row] >= 0 && read[row] < source.size(0) && write[row] >= 0 && write[row] < to.size(0),
                "copy_rows: row ", read[row], " of ", source.size(0), " to row ", write[row], " of ", to.size(0));
  const Tensor alike = source.scalar_type() == to.scalar_type() ? source : source.to(to.scalar_type());
  const Tensor from = alike.stride(1) == 1 ? alike : alike.contiguous();
  const int64_t size = to.element_size(), bytes = to.size(1) * size;
  const int64_t from_step = from.stride(0) * size, to_step = to.stride(0) * size;
  for (size_t row = 0; row < read.size(); ++row)
    put_aside(data_of<char>(to) + write[row] * to_step, data_of<char>(from) + read[row] * from_step, bytes);
}

inline void copy_rows(at::TensorList sources, at::IntArrayRef read, at::TensorList destinations, at::IntArrayRef write) {
  TORCH_CHECK(sources.size() == destinations.size(), "copy_rows: ", sources.size(), " sources, ", destinations.size(),
              " destinations");
  TORCH_CHECK(read.size() == write.size(), "copy_rows: ", read.size(), " rows to read, ", write.size(), " to write");
  for (size_t each = 0; each < sources.size(); ++each) copy_rows_of(sources[each], read, destinations[each], write);
#if SPECPLUG_VECTOR
  _mm_sfence();
#endif
}

}  // namespace specplug
