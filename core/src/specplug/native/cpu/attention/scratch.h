// Scratch memory of a work item.
#pragma once

#include <vector>

#include "attention/attention_generic.h"

namespace specplug {

// Which kernel computes a work item: AMX; AVX512-BF16; or the generic tile code (AVX2 included).
enum class Kernel { kAmx, kAvx512, kGeneric };

// Scratch for `count` queries; every part starts at a multiple of 64 bytes.
template <typename T>
struct Scratch {
  float *scores, *highest, *total, *sums;
  float* arranged;                       // queries as float32, in the same memory as `queries`
  T *queries, *keys, *values, *weights;  // the last three are used by AMX only

  Scratch(std::vector<char>& memory, Kernel kernel, int64_t count, int64_t key_dim, int64_t value_dim) {
    const bool on_amx = kernel == Kernel::kAmx;
    const int64_t size = sizeof(T), rows = on_amx ? (count + kLanes - 1) / kLanes * kLanes : count;
    const int64_t tile = on_amx ? kTile * size : 0, query_size = SPECPLUG_AVX2 ? sizeof(float) : size;
    const int64_t scored = on_amx ? kLanes * std::max(kTile, value_dim) : rows * kTile;
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
