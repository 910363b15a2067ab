// Which KV entries the queries of a work item may attend to: causal, sliding-window and tree masks.
#pragma once

#include <algorithm>
#include <limits>

#include "attention/plan.h"
#include "attention/softmax.h"
#include "attention/attention_generic.h"

namespace specplug {

// Entries [from, to) that all of some queries see, and the end of what any of them sees.
struct Span {
  int64_t from, to, end;
  bool holds(int64_t entry, int64_t count) const { return from <= entry && entry + count <= to; }
};

class Mask {
 public:
  // For the folded queries [first, last) of group x row.count, group-major.
  Mask(const Plan& plan, const Row& row, int64_t window, int64_t first, int64_t last)
      : plan_(plan), row_(row), window_(window), count_(last - first) {
    const int64_t start = row.length - row.count;
    for (int64_t q = 0; q < count_; ++q) {
      token_[q] = (first + q) % row.count;
      if (row.tree >= 0) {  // for trees: the range that needs no mask
        oldest_[q] = row.hidden;
        newest_[q] = window ? -1 : row.prefix - 1;
      } else {
        newest_[q] = start + token_[q];
        oldest_[q] = std::max<int64_t>(row.hidden, window ? newest_[q] + 1 - window : 0);
      }
    }
    for (int64_t q = count_; q % kLanes; ++q) oldest_[q] = 0, newest_[q] = -1;
  }

  int64_t count() const { return count_; }

  // The span of queries [first, last).
  Span span(int64_t first, int64_t last) const {
    Span span{0, std::numeric_limits<int64_t>::max(), 0};
    for (int64_t q = first; q < std::min(last, count_); ++q) {
      span.from = std::max<int64_t>(span.from, oldest_[q]);
      span.to = std::min<int64_t>(span.to, newest_[q] + 1);
      span.end = std::max<int64_t>(span.end, newest_[q] + 1);
    }
    if (row_.tree >= 0) span.end = row_.length;
    return span;
  }

  // Sets the scores of masked keys to -inf: query `q`, `width` entries from `tile` on.
  void apply(int64_t q, int64_t tile, int64_t width, float* scores) const {
    if (row_.tree < 0) {
      std::fill(scores, scores + std::clamp<int64_t>(oldest_[q] - tile, 0, width), kMasked);
      std::fill(scores + std::clamp<int64_t>(newest_[q] + 1 - tile, 0, width), scores + width, kMasked);
      return;
    }
    for (int64_t k = 0; k < width; ++k)
      if (!sees(q, tile + k)) scores[k] = kMasked;
  }

#if SPECPLUG_AVX512
  // The same for 16 queries from `first` on, with scores [width][16].
  void apply_columns(int64_t first, int64_t tile, int64_t width, float* scores) const {
    const __m512 none = _mm512_set1_ps(kMasked);
    const __m512i oldest = _mm512_loadu_si512(oldest_ + first), newest = _mm512_loadu_si512(newest_ + first);
    for (int64_t k = 0; k < width; ++k) {
      const __m512i entry = _mm512_set1_epi32(static_cast<int>(tile + k));
      __mmask16 seen = _mm512_cmpge_epi32_mask(entry, oldest) & _mm512_cmple_epi32_mask(entry, newest);
      if (row_.tree >= 0)
        for (int64_t q = first; q < std::min(first + kLanes, count_); ++q) seen |= sees(q, tile + k) << (q - first);
      _mm512_storeu_ps(scores + k * kLanes, _mm512_mask_mov_ps(none, seen, _mm512_loadu_ps(scores + k * kLanes)));
    }
  }
#endif

 private:
  bool sees(int64_t q, int64_t entry) const {
    if (entry < row_.hidden || !plan_.sees(row_, token_[q], entry)) return false;
    if (!window_) return true;
    const int64_t position = plan_.position(row_, row_.length - row_.count + token_[q]);
    return position - plan_.position(row_, entry) < window_;
  }

  const Plan& plan_;
  const Row& row_;
  int64_t window_, count_;
  int32_t token_[kMostQueries];
  int32_t oldest_[kMostQueries], newest_[kMostQueries];
};

}  // namespace specplug
