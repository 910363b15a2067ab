// What a share is computed in.
#pragma once

#include <vector>

#include "tiles.h"

namespace specplug {

// How a share is computed: on matrix units; reading keys and values as they lie, for few queries; or in tiles, one by one.
enum class Way { kMatrix, kFew, kTiles };

// Memory of a share of so many queries; every part begins at a multiple of 64 bytes.
template <typename T>
struct Scratch {
  float *scores, *highest, *total, *sums;
  float* arranged;                       // queries as floats, in the place of
  T *queries, *keys, *values, *weights;  // the last three for matrix units alone

  Scratch(std::vector<char>& memory, Way way, int64_t count, int64_t key_dim, int64_t value_dim) {
    const bool on_matrix_units = way == Way::kMatrix;
    const int64_t size = sizeof(T), rows = on_matrix_units ? (count + kLanes - 1) / kLanes * kLanes : count;
    const int64_t tile = on_matrix_units ? kTile * size : 0, query_size = SPECPLUG_FLOAT_PAIRS ? sizeof(float) : size;
    const int64_t scored = on_matrix_units ? kLanes * std::max(kTile, value_dim) : rows * kTile;
    const int64_t bytes[] = {scored * 4,         rows * 4,           rows * 4,             rows * value_dim * 4,
                             rows * key_dim * query_size, tile * key_dim, tile * value_dim, tile * kLanes};
    int64_t begins[9] = {};
    for (int part = 0; part < 8; ++part) begins[part + 1] = begins[part] + (bytes[part] + 63) / 64 * 64;
    if (static_cast<int64_t>(memory.size()) < begins[8] + 64) memory.resize(begins[8] + 64);
    char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    scores = reinterpret_cast<float*>(base);
    highest = reinterpret_cast<float*>(base + begins[1]);
    total = reinterpret_cast<float*>(base + begins[2]);
    sums = reinterpret_cast<float*>(base + begins[3]);
    queries = reinterpret_cast<T*>(base + begins[4]);
    arranged = reinterpret_cast<float*>(queries);
    keys = reinterpret_cast<T*>(base + begins[5]);
    values = reinterpret_cast<T*>(base + begins[6]);
    weights = reinterpret_cast<T*>(base + begins[7]);
  }
};

}  // namespace specplug
