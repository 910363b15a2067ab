// The same products on the matrix units of recent Intel processors (AMX).
//
// One instruction multiplies a tile of 16 rows and 32 inputs with one of 32 inputs and 16 outputs, which is how the panels of
// a packed weight lie already. Up to 16 rows take what reading the weight takes; with more, the weight is still read but once,
// part by part while other parts are multiplied. Sums are float32, and every row's are added up in the same order, whichever
// rows are beside it: a row alone and the same row in a batch give bit-equal results.
#pragma once

#include "linear.h"

#if SPECPLUG_BF16_DOT && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define SPECPLUG_MATRIX 1
#else
#define SPECPLUG_MATRIX 0
#endif

namespace specplug {

#if SPECPLUG_MATRIX

constexpr int64_t kTileRows = 16, kTileInputs = 32;
constexpr int64_t kTiledBytes = 1 << 20;   // of rows that stay in the second-level cache while panels pass
constexpr int64_t kMostTiledRows = 512;
constexpr int64_t kFewTiledRows = 112;     // for which weights come in small parts
constexpr int64_t kOwnRows = 128;          // of all threads together, which each brings into tiles for itself
constexpr int64_t kAhead = 3072;           // bytes by which weights are fetched ahead

// Whether the processor has matrix units and the system lets this process use them; it has to be asked once.
inline bool has_matrix_units() {
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

// The shapes of this thread's tiles for as long as this lives: 16 rows of 64 bytes each, tiles 0 to 5 fewer rows if so wished.
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
    asm volatile("ldtilecfg %0" ::"m"(shapes));  // older GCCs' intrinsic names 8 of the 64 bytes, and the rest gets lost
  }
  ~TileShapes() { _tile_release(); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// What was written before lies in memory for the tiles that are loaded behind this, and the other way round: older GCCs do not
// know what their intrinsics read and write.
inline void settle() { asm volatile("" ::: "memory"); }

// Blocks [first, last) of 16 rows of x [rows, inputs] become tiles: [inputs / 32][16][32] each. Behind the last row lies whatever
// lay there: it is multiplied into rows that nobody stores.
inline void tile_rows(const bf16* x, int64_t rows, int64_t inputs, int64_t first, int64_t last, bf16* tiles) {
  for (int64_t row = first * kTileRows; row < std::min(last * kTileRows, rows); ++row) {
    bf16* to = tiles + row / kTileRows * kTileRows * inputs + row % kTileRows * kTileInputs;
    for (int64_t input = 0; input < inputs; input += kTileInputs, to += kTileRows * kTileInputs)
      _mm512_storeu_si512(to, _mm512_loadu_si512(x + row * inputs + input));
  }
}

// Brings in what the next tiles take of one or two panels, line by line as it lies: a tile's own loads, of every other line,
// are too few at a time to keep memory busy, and fetching ahead alone is forgotten when it comes too early.
template <typename... Weights>
inline void bring_in(Weights... weights) {
#pragma GCC unroll 32
  for (int64_t line = 0; line < 32; ++line) {
    (_mm_prefetch(reinterpret_cast<const char*>(weights + 32 * line) + kAhead, _MM_HINT_T0), ...);
    (static_cast<void>(*reinterpret_cast<const volatile int64_t*>(weights + 32 * line)), ...);
  }
}

// 16 rows, in tiles, times two panels at once: two streams are read faster than one. Sums are [16][32] for each panel.
inline void multiply_two_panels(const bf16* tiles, int64_t inputs, const bf16* one, const bf16* other, float* sums,
                                float* other_sums) {
  settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t input = 0; input < inputs; input += kTileInputs) {
    const bf16 *left = one + input * kPanel, *right = other + input * kPanel;
    bring_in(left, right);
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
  settle();
}

// Units [begin, end) times up to 16 rows in tiles, two panels at a time; outputs begin with `first_row`.
inline void multiply_few(const bf16* tiles, int64_t rows, const Panels& panels, int64_t begin, int64_t end,
                         int64_t first_row) {
  alignas(64) float sums[2][kTileRows * kPanel];
  const TileShapes shapes(rows);
  const Pairs pairs(panels, begin, end);
  for (int64_t index = 0; index < pairs.count(); ++index) {
    const Pair pair = pairs[index];
    multiply_two_panels(tiles, panels.in_features, pair.one.weight, pair.other.weight, sums[0], sums[1]);
    store_pair(sums[0], sums[1], rows, pair, panels, first_row);
  }
}

// How a panel is divided for many rows: a part stays in the first-level cache while rows pass. Few rows are over before a large
// part has come; of many rows the sums, which go through the second-level cache between two parts, would take long.
struct Parts {
  int64_t inputs, ahead;  // inputs of a part, each of which is a line of weights; bytes by which the next is fetched ahead
};

inline Parts parts_for(int64_t rows) { return rows <= kFewTiledRows ? Parts{128, 2048} : Parts{256, 3072}; }

// The parts of two panels that come next, brought in some lines at each step while those before them are multiplied. Lines are
// read, not only fetched: the hardware's own fetching ahead follows reads, and has more under way than instructions can.
struct NextParts {
  const bf16 *one, *other;
  int64_t left;           // lines of each
  int64_t lines, ahead;

  void bring_in() {
    for (int64_t line = std::min(left, lines); line > 0; --line, --left, one += 32, other += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(one) + ahead, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(other) + ahead, _MM_HINT_T1);
      static_cast<void>(*reinterpret_cast<const volatile int64_t*>(one));
      static_cast<void>(*reinterpret_cast<const volatile int64_t*>(other));
    }
  }
};

// 16 rows, or 32 if `Two`, in tiles of rows that are `inputs` long, times `depth` inputs of a panel. Sums are [rows][32]; they go
// on unless this is the panel's `first` part.
template <bool Two>
inline void multiply_part(const bf16* tiles, int64_t inputs, const bf16* weights, int64_t depth, bool first, float* sums,
                          NextParts& next) {
  const bf16* below = tiles + kTileRows * inputs;
  float* more = sums + kTileRows * kPanel;
  settle();
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
    next.bring_in();
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
  settle();
}

// Units [begin, end) times more than 16 rows in tiles, two panels at a time: memory is kept busy while the matrix units are.
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
      NextParts next{pair.one.weight + behind * kPanel, pair.other.weight + behind * kPanel, inputs - behind, lines,
                     parts.ahead};
      if (behind == inputs && index + 1 < pairs.count()) {
        const Pair following = pairs[index + 1];
        next = {following.one.weight, following.other.weight, inputs, lines, parts.ahead};
      }
      next.left = std::min(next.left, parts.inputs);
      for (int which = 0; which < 2; ++which)
        for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
          const bf16* own = tiles + row * inputs + from * kTileRows;
          const bf16* weights = (which ? pair.other : pair.one).weight + from * kPanel;
          const auto multiply = rows - row > kTileRows ? multiply_part<true> : multiply_part<false>;
          multiply(own, inputs, weights, depth, from == 0, sums[which] + row * kPanel, next);
        }
    }
    store_pair(sums[0], sums[1], rows, pair, panels, first_row);
  }
}

// Rows that are multiplied with one panel after the other before the next rows come.
inline int64_t rows_at_once(int64_t inputs) {
  return std::clamp(kTiledBytes / (inputs * static_cast<int64_t>(sizeof(bf16))) / 32 * 32, int64_t{32}, kMostTiledRows);
}

// Units [begin, end) times `rows` rows in tiles; outputs begin with `first_row`.
inline void multiply_tiled(const bf16* tiles, int64_t rows, const Panels& panels, int64_t begin, int64_t end,
                           int64_t first_row) {
  (rows > kTileRows ? multiply_many : multiply_few)(tiles, rows, panels, begin, end, first_row);
}

#else

inline bool has_matrix_units() { return false; }

#endif

}  // namespace specplug
