// The same products on the matrix units of recent Intel processors (AMX).
//
// One instruction multiplies a tile of 16 rows and 32 inputs with one of 32 inputs and 16 outputs, which is how the panels of
// a packed weight lie already. Up to 16 rows take what reading the weight takes. Sums are float32, and every row's are added
// up in the same order, whichever rows are beside it: a row alone and the same row in a batch give bit-equal results.
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

// Blocks [first, last) of 16 rows of x [rows, inputs] become tiles: [inputs / 32][16][32] each, zeros behind the last row.
inline void tile_rows(const bf16* x, int64_t rows, int64_t inputs, int64_t first, int64_t last, bf16* tiles) {
  for (int64_t row = first * kTileRows; row < last * kTileRows; ++row) {
    bf16* to = tiles + row / kTileRows * kTileRows * inputs + row % kTileRows * kTileInputs;
    for (int64_t input = 0; input < inputs; input += kTileInputs, to += kTileRows * kTileInputs)
      _mm512_storeu_si512(to, row < rows ? _mm512_loadu_si512(x + row * inputs + input) : _mm512_setzero_si512());
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
// `BringsIn`: the panels are not in a cache yet.
template <bool BringsIn>
inline void multiply_two_panels(const bf16* tiles, int64_t inputs, const bf16* one, const bf16* other, float* sums,
                                float* other_sums) {
  settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t input = 0; input < inputs; input += kTileInputs) {
    const bf16 *left = one + input * kPanel, *right = other + input * kPanel;
    if constexpr (BringsIn) bring_in(left, right);
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

// 32 rows, in tiles, times a panel that is in a cache. Sums are [32][32].
inline void multiply_two_blocks(const bf16* tiles, int64_t inputs, const bf16* panel, float* sums) {
  settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const bf16* below = tiles + kTileRows * inputs;
  for (int64_t input = 0; input < inputs; input += kTileInputs) {
    const bf16* weights = panel + input * kPanel;
    _tile_loadd(4, tiles + input * kTileRows, 64);
    _tile_loadd(6, weights, 128);
    _tile_loadd(7, weights + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, below + input * kTileRows, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  float* more = sums + kTileRows * kPanel;
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, more, 128);
  _tile_stored(3, more + 16, 128);
  settle();
}

// Rows that are multiplied with one panel after the other before the next rows come.
inline int64_t rows_at_once(int64_t inputs) {
  return std::clamp(kTiledBytes / (inputs * static_cast<int64_t>(sizeof(bf16))) / 32 * 32, int64_t{32}, kMostTiledRows);
}

// Panels [begin, end) times `rows` rows in tiles, two panels at a time, of which the first 16 rows bring both in; outputs begin
// with `first_row`.
inline void multiply_tiled(const bf16* tiles, int64_t rows, const Panels& panels, int64_t begin, int64_t end,
                           int64_t first_row) {
  alignas(64) static thread_local float sums[2][kMostTiledRows * kPanel];
  const TileShapes shapes(std::min(rows, kTileRows));
  const int64_t inputs = panels.in_features, half = (end - begin + 1) / 2;
  for (int64_t index = begin; index < begin + half; ++index) {
    const Panel one = panels[index], other = panels[std::min(index + half, end - 1)];
    multiply_two_panels<true>(tiles, inputs, one.weight, other.weight, sums[0], sums[1]);
    for (int64_t row = kTileRows; row < rows; row += kTileRows) {
      const bf16* own = tiles + row * inputs;
      if (rows - row > kTileRows) {
        multiply_two_blocks(own, inputs, one.weight, sums[0] + row * kPanel);
        multiply_two_blocks(own, inputs, other.weight, sums[1] + row * kPanel);
        row += kTileRows;
      } else {
        multiply_two_panels<false>(own, inputs, one.weight, other.weight, sums[0] + row * kPanel, sums[1] + row * kPanel);
      }
    }
    store_sums(sums[0], rows, one, first_row);
    if (index + half < end) store_sums(sums[1], rows, other, first_row);
  }
}

#else

inline bool has_matrix_units() { return false; }

#endif

}  // namespace specplug
