// Copyright 2026 The HuggingFace Team. All rights reserved.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

// The compiled CPU kernels of EXL3: plain C functions, for any Python and any torch. `cpu.py` loads and checks them.

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(_MSC_VER)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr int ABI_VERSION = 1;  // `cpu.ABI_VERSION`: raised with every change of a signature below

constexpr int TILE = 16, TILE_SIZE = TILE * TILE, NUM_STATES = 1 << 16;  // as in format.py
constexpr int WINDOW = 80;         // `encoder.BOUNDARY_WINDOW`
constexpr int MAX_LANES = 16;      // floats in the longest vector
constexpr int KEPT_BITS = 8;       // a row of costs is kept for every so many bits of a tile's stream
constexpr int MAX_CONE_BITS = 8;   // so many of which are open on the way back between two kept rows

enum Status { OK = 0, NO_SUCH_RATE = 1, OUT_OF_MEMORY = 2, NO_SUCH_ISA = 3 };

// Zeroed floats that start on a cache line.
struct FloatBuffer {
  static constexpr size_t LINE = 64;
  std::unique_ptr<float[]> memory;
  float* data;
  explicit FloatBuffer(size_t size) : memory(new float[size + LINE / sizeof(float)]()) {
    void* start = memory.get();
    size_t space = size * sizeof(float) + LINE;
    data = static_cast<float*>(std::align(LINE, size * sizeof(float), start, space));
  }
};

// Runs `task(job, scratch, index)` for every index below `count`, in any order, on up to `threads` threads that have
// `scratch_size` floats each.
void parallel(void (*task)(const void*, float*, int64_t), const void* job, int64_t count, size_t scratch_size,
              int threads) {
  if (threads > count) threads = int(count);
  if (threads < 1) return;
  std::vector<FloatBuffer> scratch;
  for (int i = 0; i < threads; ++i) scratch.emplace_back(scratch_size);
  std::atomic<int64_t> next{0};
  auto work = [&](float* own) {
    for (int64_t index; (index = next.fetch_add(1)) < count;) task(job, own, index);
  };
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(work, scratch[i].data);
  } catch (const std::system_error&) {
    // The system has no more threads: those that there are do it all.
  }
  work(scratch[0].data);
  for (auto& other : others) other.join();
}

struct SearchJob {
  const float* tiles;  // [count, 256], in stream order
  int64_t count;
  const float* values;  // [65536]
  int32_t* states;      // [count, 256]
  const float* arranged[2];
};

#if defined(__GNUC__)
#define EXL3_VECTORS 1
#endif

#if defined(EXL3_VECTORS) && defined(__x86_64__)
#define EXL3_X86 1
#endif

struct DecodeJob {
  const int16_t* trellis;  // [rows, columns, 8 * twice_bits], the tiles of a row side by side
  int64_t row_stride;      // from a row of tiles to the next, in int16
  int64_t rows, columns;
  int twice_bits;
  const void* values;  // [65536] of the output's type
  void* inner;         // [16 * rows, inner_stride]
  int64_t inner_stride;
};

// A task of `parallel`: one row of tiles to 16 rows of the inner matrix.
template <typename Value>
void decode_row(const void* job, float*, int64_t row) {
  const DecodeJob& all = *static_cast<const DecodeJob*>(job);
  const Value* values = static_cast<const Value*>(all.values);
  const int words = 8 * all.twice_bits, bits = 8 * words * 2;
  // For each element of the row-major tile the 16-bit word that its state starts in, and the shift that then ends it.
  uint16_t first[TILE_SIZE], shift[TILE_SIZE];
  for (int t = 0; t < TILE_SIZE; ++t) {
    int lane = t >> 3, tile_row = 2 * (lane & 3) + (t & 1) + 8 * (t >> 1 & 1);
    int element = tile_row * TILE + (lane >> 2) + 8 * (t >> 2 & 1);
    int start = ((t + 1) * all.twice_bits / 2 - 16 + bits) % bits;
    first[element] = uint16_t(start / 16);
    shift[element] = uint16_t(16 - start % 16);
  }
  const int16_t* tile = all.trellis + row * all.row_stride;
  Value* inner = static_cast<Value*>(all.inner) + row * TILE * all.inner_stride;
  for (int64_t column = 0; column < all.columns; ++column, tile += words, inner += TILE) {
    uint32_t pairs[16 * 8];  // every word of the stream with the one after it
    for (int i = 0; i < words; ++i)
      pairs[i] = uint32_t(uint16_t(tile[i ^ 1])) << 16 | uint16_t(tile[(i + 1 == words ? 0 : i + 1) ^ 1]);
    for (int r = 0; r < TILE; ++r)
      for (int c = 0; c < TILE; ++c) {
        int element = r * TILE + c;
        inner[r * all.inner_stride + c] = values[pairs[first[element]] >> shift[element] & 0xFFFF];
      }
  }
}

namespace base {
#if defined(EXL3_VECTORS)
#define EXL3_LANES 4
#else
#define EXL3_LANES 1
#endif
#include "search.inc"
#undef EXL3_LANES
}  // namespace base

#if defined(EXL3_X86)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
#define EXL3_LANES 8
#include "search.inc"
#undef EXL3_LANES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif
namespace avx512 {
#define EXL3_LANES 16
#include "search.inc"
#undef EXL3_LANES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// One instruction set's kernels.
struct Isa {
  const char* name;
  bool (*search)(const SearchJob&, int twice_bits, int threads);
};

// The best that this machine has, or the one that EXL3_CPU_ISA names; null where that is none of this machine's.
const Isa* isa() {
  static const Isa isas[] = {
#if defined(EXL3_X86)
      {"avx512", avx512::search},
      {"avx2", avx2::search},
#endif
      {"base", base::search},
  };
  const char* wanted = std::getenv("EXL3_CPU_ISA");
  for (const Isa& candidate : isas) {
    if (wanted && *wanted && std::strcmp(wanted, candidate.name)) continue;
#if defined(EXL3_X86)
    if (!std::strcmp(candidate.name, "avx512") && !__builtin_cpu_supports("avx512f")) continue;
    if (!std::strcmp(candidate.name, "avx2") && !__builtin_cpu_supports("avx2")) continue;
#endif
    return &candidate;
  }
  return nullptr;
}

}  // namespace

EXPORT int32_t exl3_abi_version() { return ABI_VERSION; }

// The name of the instruction set in use, null where EXL3_CPU_ISA names one that this machine lacks.
EXPORT const char* exl3_isa() { return isa() ? isa()->name : nullptr; }

// `encoder.search_reference`: `tiles` [count, 256], `values` [65536], `states` [count, 256].
EXPORT int32_t exl3_search(const float* tiles, int64_t count, int32_t twice_bits, const float* values, int32_t* states,
                           int32_t threads) {
  if (!isa()) return NO_SUCH_ISA;
  try {
    return isa()->search({tiles, count, values, states, {}}, twice_bits, threads) ? OK : NO_SUCH_RATE;
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
}

// `format.decode` for a rectangle of tiles, whose first are at `trellis` and `inner`; strides are in elements. `values`
// [65536] and `inner` have `value_size` bytes an element, 2 or 4.
EXPORT int32_t exl3_decode(const int16_t* trellis, int64_t row_stride, int64_t rows, int64_t columns,
                           int32_t twice_bits, const void* values, int32_t value_size, void* inner,
                           int64_t inner_stride, int32_t threads) {
  DecodeJob job{trellis, row_stride, rows, columns, twice_bits, values, inner, inner_stride};
  try {
    parallel(value_size == 2 ? decode_row<uint16_t> : decode_row<float>, &job, rows, 0, threads);
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}
