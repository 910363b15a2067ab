// Matmul with packed weights on AMX.
//
// One instruction multiplies a tile of 16 rows x 32 inputs with a tile of 32 inputs x 16 outputs, which is the layout of a packed
// weight. Up to 16 rows cost what reading the weight costs; with more rows the weight is still read once, one part while another is
// multiplied. Sums are float32 in a fixed order per row: a row alone and in a batch gives bit-equal results.
#pragma once

#include "gemm/gemm.h"

#if SPECPLUG_AVX512_BF16 && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define SPECPLUG_AMX 1
#else
#define SPECPLUG_AMX 0
#endif

namespace specplug {

#if SPECPLUG_AMX

constexpr int64_t kTileRows = 16, kTileInputs = 32;
constexpr int64_t kTiledBytes = 1 << 20;   // rows kept in L2 while panels pass
constexpr int64_t kMostTiledRows = 512;
constexpr int64_t kFewTiledRows = 112;     // up to here weights are processed in small parts
constexpr int64_t kPrivateTileRows = 128;          // over all threads; up to here each thread tiles the rows itself
constexpr int64_t kAhead = 3072;           // prefetch distance in bytes of weights

// Whether the CPU has AMX and the kernel grants it to this process (asked once).
inline bool has_amx() {
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

// Tile configuration of this thread while the object lives: 16 rows of 64 bytes; tiles 0 to 5 have `rows` rows.
class TileShapes {
 public:
  explicit TileShapes(int64_t rows = kTileRows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = 64;
      shapes.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileRows);
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));  // older GCCs' intrinsic declares only 8 of the 64 bytes
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// Older GCCs do not know which memory their tile intrinsics read and write.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// Packs blocks [first, last) of 16 rows of x [rows, inputs] into tiles [inputs / 32][16][32]. Rows after the last keep stale data; their
// results are never stored.
inline void tile_rows(const bf16* x, int64_t rows, int64_t inputs, int64_t first, int64_t last, bf16* tiles) {
  for (int64_t row = first * kTileRows; row < std::min(last * kTileRows, rows); ++row) {
    bf16* to = tiles + row / kTileRows * kTileRows * inputs + row % kTileRows * kTileInputs;
    for (int64_t input = 0; input < inputs; input += kTileInputs, to += kTileRows * kTileInputs)
      _mm512_storeu_si512(to, _mm512_loadu_si512(x + row * inputs + input));
  }
}

// Loads the weights of the next tiles of one or two panels line by line: tile loads alone do not keep memory busy, and lines that are
// prefetched too early are evicted again.
template <typename... Weights>
inline void prefetch_lines(Weights... weights) {
#pragma GCC unroll 32
  for (int64_t line = 0; line < 32; ++line) {
    (_mm_prefetch(reinterpret_cast<const char*>(weights + 32 * line) + kAhead, _MM_HINT_T0), ...);
    (static_cast<void>(*reinterpret_cast<const volatile int64_t*>(weights + 32 * line)), ...);
  }
}

constexpr int64_t kStagedInputs = 256;  // inputs of a panel converted at once

// This thread's memory for parts of two panels as bfloat16.
inline bf16* stage_buffer(int which) {
  alignas(64) static thread_local bf16 memory[2][kStagedInputs * kPanel];
  return memory[which];
}

// Inputs [from, from + depth) of a panel in bfloat16, at most `kStagedInputs`: int8 weights are converted into the buffer `which`.
inline const bf16* stage(const Panel& panel, int64_t from, int64_t depth, int which) {
  if (!panel.quantised) return panel.weight + from * kPanel;
  bf16* to = stage_buffer(which);
  const int8_t* weights = panel.quantised + from * kPanel;
  for (int64_t at = 0; at < depth * kPanel; at += 32) {
    if (at % 64 == 0) _mm_prefetch(reinterpret_cast<const char*>(weights + at) + kAhead, _MM_HINT_T0);
    _mm512_store_si512(to + at, read_pairs(weights + at));
  }
  return to;
}

// 16 tiled rows times two panels at once: two streams are read faster than one. Sums are [16][32] per panel.
inline void multiply_two_panels(const bf16* tiles, int64_t inputs, const Panel& one, const Panel& other, float* sums,
                                float* other_sums) {
  const bf16 *left = one.weight, *right = other.weight;
  compiler_barrier();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t input = 0; input < inputs; input += kTileInputs, left += kTileInputs * kPanel, right += kTileInputs * kPanel) {
    if (input % kStagedInputs == 0) {
      const int64_t depth = std::min(kStagedInputs, inputs - input);
      left = stage(one, input, depth, 0);
      right = stage(other, input, depth, 1);
      compiler_barrier();
    }
    if (!one.quantised && !other.quantised) prefetch_lines(left, right);
    _tile_loadd(4, tiles + input * kTileRows, 64);
    _tile_loadd(6, left, 128);
    _tile_loadd(7, left + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, right, 128);
    _tile_loadd(7, right + 32, 128);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, other_sums, 128);
  _tile_stored(3, other_sums + 16, 128);
  compiler_barrier();
}

// Units [begin, end) times up to 16 tiled rows, two panels at a time.
inline void multiply_16_rows(const bf16* tiles, int64_t rows, const Panels& panels, int64_t begin, int64_t end,
                         int64_t first_row) {
  alignas(64) float sums[2][kTileRows * kPanel];
  const TileShapes shapes(rows);
  const Pairs pairs(panels, begin, end);
  for (int64_t index = 0; index < pairs.count(); ++index) {
    const Pair pair = pairs[index];
    multiply_two_panels(tiles, panels.in_features, pair.one, pair.other, sums[0], sums[1]);
    store_pair(sums[0], sums[1], rows, pair, panels, first_row);
  }
}

// How a panel is split for many rows. A part stays in L1 while the rows pass. With few rows a large part would not arrive in time; with
// many rows the sums, which pass through L2 between parts, would dominate small parts.
struct Parts {
  int64_t inputs, ahead;  // inputs per part (one line of weights each); prefetch distance in bytes
};

inline Parts parts_for(int64_t rows) { return rows <= kFewTiledRows ? Parts{128, 2048} : Parts{256, 3072}; }

// The next parts of two panels, loaded a few lines at a time while the current ones are multiplied. Lines are read, not only prefetched:
// the hardware prefetcher follows reads and keeps more requests in flight.
struct NextParts {
  const bf16 *one, *other;
  int64_t left;           // lines left in each
  int64_t lines, ahead;

  void prefetch_lines() {
    for (int64_t line = std::min(left, lines); line > 0; --line, --left, one += 32, other += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(one) + ahead, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(other) + ahead, _MM_HINT_T1);
      static_cast<void>(*reinterpret_cast<const volatile int64_t*>(one));
      static_cast<void>(*reinterpret_cast<const volatile int64_t*>(other));
    }
  }
};

// 16 rows (32 if `Two`) in tiles of `inputs` inputs times `depth` inputs of a panel. Sums [rows][32] are accumulated unless this is the
// panel's first part.
template <bool Two>
inline void multiply_part(const bf16* tiles, int64_t inputs, const bf16* weights, int64_t depth, bool first, float* sums,
                          NextParts& next) {
  const bf16* below = tiles + kTileRows * inputs;
  float* more = sums + kTileRows * kPanel;
  compiler_barrier();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + 16, 128);
    if constexpr (Two) {
      _tile_loadd(2, more, 128);
      _tile_loadd(3, more + 16, 128);
    }
  }
  for (int64_t input = 0; input < depth; input += kTileInputs, weights += kTileInputs * kPanel) {
    next.prefetch_lines();
    _tile_loadd(4, tiles + input * kTileRows, 64);
    _tile_loadd(6, weights, 128);
    _tile_loadd(7, weights + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Two) {
      _tile_loadd(5, below + input * kTileRows, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  if constexpr (Two) {
    _tile_stored(2, more, 128);
    _tile_stored(3, more + 16, 128);
  }
  compiler_barrier();
}

// Units [begin, end) times more than 16 tiled rows, two panels at a time.
inline void multiply_many(const bf16* tiles, int64_t rows, const Panels& panels, int64_t begin, int64_t end,
                          int64_t first_row) {
  alignas(64) static thread_local float sums[2][kMostTiledRows * kPanel];
  const TileShapes shapes;
  const Parts parts = parts_for(rows);
  const Pairs pairs(panels, begin, end);
  const int64_t inputs = panels.in_features, blocks = (rows + 2 * kTileRows - 1) / (2 * kTileRows);
  const int64_t lines = (kPanel / 2 + blocks - 1) / blocks;
  for (int64_t index = 0; index < pairs.count(); ++index) {
    const Pair pair = pairs[index];
    for (int64_t from = 0; from < inputs; from += parts.inputs) {
      const int64_t depth = std::min(parts.inputs, inputs - from), behind = from + depth;
      Pair read = pair;
      int64_t at = behind;
      if (behind == inputs && index + 1 < pairs.count()) read = pairs[index + 1], at = 0;
      NextParts next{nullptr, nullptr, 0, lines, parts.ahead};
      if (!read.one.quantised && !read.other.quantised)  // else it is read when it is converted
        next = {read.one.weight + at * kPanel, read.other.weight + at * kPanel, std::min(inputs - at, parts.inputs), lines,
                parts.ahead};
      for (int which = 0; which < 2; ++which) {
        const bf16* weights = stage(which ? pair.other : pair.one, from, depth, which);
        for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
          const bf16* own = tiles + row * inputs + from * kTileRows;
          const auto multiply = rows - row > kTileRows ? multiply_part<true> : multiply_part<false>;
          multiply(own, inputs, weights, depth, from == 0, sums[which] + row * kPanel, next);
        }
      }
    }
    store_pair(sums[0], sums[1], rows, pair, panels, first_row);
  }
}

// Rows multiplied with all panels before the next rows are tiled.
inline int64_t rows_at_once(int64_t inputs) {
  return std::clamp(kTiledBytes / (inputs * static_cast<int64_t>(sizeof(bf16))) / 32 * 32, int64_t{32}, kMostTiledRows);
}

// Units [begin, end) times `rows` tiled rows; `first_row` is the first output row.
inline void multiply_tiled(const bf16* tiles, int64_t rows, const Panels& panels, int64_t begin, int64_t end,
                           int64_t first_row) {
  (rows > kTileRows ? multiply_many : multiply_16_rows)(tiles, rows, panels, begin, end, first_row);
}

#else

inline bool has_amx() { return false; }

#endif

}  // namespace specplug
