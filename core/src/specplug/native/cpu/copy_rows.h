// Copies rows of matrices to rows of others: hidden states of a step into the buffers that keep them.
#pragma once

#include <cstring>

#include "common/torch_util.h"
#include "common/simd.h"

namespace specplug {

// Non-temporal stores: kept states are rarely read and should not evict anything.
inline void stream_row(char* to, const char* from, int64_t bytes) {
#if SPECPLUG_AVX512
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0) {
    for (int64_t at = 0; at < bytes; at += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// Row read[i] of the source to row write[i] of the destination, cut to its width.
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
    stream_row(data_of<char>(to) + write[row] * to_step, data_of<char>(from) + read[row] * from_step, bytes);
}

// Several steps in order: per step one source for each destination, and `counts` rows.
inline void copy_rows(at::TensorList sources, at::IntArrayRef counts, at::IntArrayRef read, at::TensorList destinations,
                      at::IntArrayRef write) {
  const size_t channels = destinations.size();
  TORCH_CHECK(sources.size() == counts.size() * channels, "copy_rows: ", sources.size(), " sources of ", counts.size(),
              " steps, ", channels, " destinations");
  int64_t total = 0;
  for (const int64_t count : counts) {
    TORCH_CHECK(count >= 0, "copy_rows: ", count, " rows of a step");
    total += count;
  }
  TORCH_CHECK(total == static_cast<int64_t>(read.size()) && read.size() == write.size(), "copy_rows: ", total, " rows, ",
              read.size(), " to read, ", write.size(), " to write");
  size_t row = 0;
  for (size_t step = 0; step < counts.size(); ++step) {
    for (size_t each = 0; each < channels; ++each)
      copy_rows_of(sources[step * channels + each], read.slice(row, counts[step]), destinations[each],
                   write.slice(row, counts[step]));
    row += counts[step];
  }
#if SPECPLUG_AVX512
  _mm_sfence();
#endif
}

}  // namespace specplug
