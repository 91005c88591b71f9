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

// What the compiled kernels share whatever the instruction set: constants of the format, dtypes, threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(_MSC_VER)
#define EXL3_NOINLINE __declspec(noinline)
#else
#define EXL3_NOINLINE __attribute__((noinline))
#endif

namespace {

constexpr int TILE = 16, TILE_SIZE = TILE * TILE, BLOCK = 128, NUM_STATES = 1 << 16;  // as in format.py
constexpr int BLOCK_TILES = BLOCK / TILE;
constexpr float HADAMARD_SCALE = 0.08838834764831845f;  // 128 ** -0.5, the factor of a rotation
constexpr int RATES[] = {2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16};  // `format.BITS`, twice
constexpr int NUM_RATES = sizeof RATES / sizeof *RATES;

enum Status { OK = 0, NO_SUCH_RATE = 1, OUT_OF_MEMORY = 2, NO_SUCH_ISA = 3, NO_SUCH_INPUT_BITS = 4, NO_SUCH_ROWS = 5 };
// When products of any number of rows are faster than to decode a weight first: where torch's have no such instructions.
enum ManyRows { NEVER, WITHOUT_BFLOAT16, WITHOUT_AMX };
enum Codebook { THREE_INST, MCG, MUL1, NUM_CODEBOOKS };  // the order of `format.CODEBOOKS`
enum Dtype { FLOAT32, FLOAT16, BFLOAT16 };               // the order of `cpu.DTYPES`

// The index of a rate in RATES, -1 for one that the format does not have.
int rate_index(int twice_bits) {
  for (int i = 0; i < NUM_RATES; ++i)
    if (RATES[i] == twice_bits) return i;
  return -1;
}

// Memory that starts on a cache line, not initialised.
template <typename Value>
struct Buffer {
  static constexpr size_t LINE = 64;
  std::unique_ptr<unsigned char[]> memory;
  Value* data;
  explicit Buffer(size_t size) : memory(new unsigned char[size * sizeof(Value) + LINE]) {
    void* start = memory.get();
    size_t space = size * sizeof(Value) + LINE;
    data = static_cast<Value*>(std::align(LINE, size * sizeof(Value), start, space));
  }
};

// OpenMP's entry for a parallel region, as GCC calls it. It is that of the library that torch itself computes on: its
// threads are the same ones, and are not woken beside others that still spin. Null where torch has none.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
ParallelRegion parallel_region = nullptr;

// Runs `work(index)` for every index below `count`, in any order, on up to `threads` threads. It must not throw.
template <typename Work>
void for_each_index(int64_t count, int threads, const Work& work) {
  if (threads > count) threads = int(count);
  if (threads <= 1) {
    for (int64_t index = 0; index < count; ++index) work(index);
    return;
  }
  struct Region {
    const Work& work;
    int64_t count, chunk;  // so many indices are taken at a time, since neighbours often share memory
    std::atomic<int64_t> next{0};
    static void run(void* self) {
      Region& region = *static_cast<Region*>(self);
      for (int64_t first; (first = region.next.fetch_add(region.chunk)) < region.count;)
        for (int64_t index = first; index < first + region.chunk && index < region.count; ++index) region.work(index);
    }
  } region{work, count, count / (32 * threads) + 1};
  if (parallel_region) return parallel_region(Region::run, &region, unsigned(threads), 0);
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(Region::run, &region);
  } catch (const std::system_error&) {
    // The system has no more threads: those that there are do it all.
  }
  Region::run(&region);
  for (auto& other : others) other.join();
}

// Has the cache fetch bytes that may lie beyond the end of the memory, where nothing happens.
template <int BYTES>
inline void prefetch(const void* from) {
#if defined(__GNUC__)
  for (int byte = 0; byte < BYTES; byte += 64) __builtin_prefetch(static_cast<const char*>(from) + byte);
#endif
}

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "of the same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float from_half(uint16_t half) {
  uint32_t magnitude = uint32_t(half & 0x7FFF) << 13;
  // The exponent's bias is 112 less: multiplying by 2**112 also makes subnormal numbers normal.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  bits = magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : bits;  // infinite or no number
  return bit_cast<float>(bits | uint32_t(half & 0x8000) << 16);
}

inline uint16_t to_half(float value) {
  uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFF;
  // Subnormal numbers are multiples of 2**-24, which is the last place of numbers from 0.5 to 1.
  uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  uint32_t normal = (magnitude + 0xC8000FFF + (magnitude >> 13 & 1)) >> 13;
  uint32_t large = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
  uint32_t result = magnitude < 0x38800000 ? small : magnitude < 0x47800000 ? normal : large;
  return uint16_t(result | (bits >> 16 & 0x8000));
}

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float from_bfloat(uint16_t value) { return bit_cast<float>(uint32_t(value) << 16); }

inline uint16_t to_bfloat(float value) {
  uint32_t bits = bit_cast<uint32_t>(value);
  uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
}

inline float to_float(float value) { return value; }
inline float to_float(Half value) { return from_half(value.bits); }
inline float to_float(BFloat value) { return from_bfloat(value.bits); }
inline void from_float(float value, float* to) { *to = value; }
inline void from_float(float value, Half* to) { to->bits = to_half(value); }
inline void from_float(float value, BFloat* to) { to->bits = to_bfloat(value); }

// A tensor's numbers, in rows that are `stride` elements apart, each contiguous.
struct Rows {
  void* data;  // null for none
  int64_t stride;
  int32_t dtype;
};

// Codes of a weight. Strides are in words.
struct Trellis {
  const int16_t* data;  // [in_tiles, out_tiles, 16 K], each tile contiguous
  int64_t row_stride, column_stride, in_tiles, out_tiles;
  int32_t twice_bits, codebook;
};

// How many words on from a tile the one to fetch is: `ahead` tiles further in its column, and where this has no more than `tiles`, in
// the one that is read next, `columns` later.
inline int64_t to_fetch(int64_t tile, int64_t tiles, int64_t ahead, int64_t columns, int64_t row_stride, int64_t column_stride) {
  return ahead * row_stride + (tile + ahead < tiles ? 0 : columns * column_stride - tiles * row_stride);
}

// What `exl3_linear` computes: `y = x @ W + bias`.
struct LinearCall {
  Rows x, y;  // [rows, in_features] and [rows, out_features]
  Rows suh, svh, bias;
  Trellis trellis;
  int64_t rows, in_features, out_features;
  const int64_t* places;  // [rows]: which row of `y` each is; null where they are in order
  int64_t sharing;        // rows of `y`, one after the other, that are products of one row of `x`

  int64_t place_of(int64_t row) const { return places ? places[row] : row; }
};

// What `exl3_grouped_linear` computes: groups of rows, each with a weight of its own out of a stack.
struct GroupedCall {
  LinearCall first;       // with the first weight, and all rows
  const int64_t* ranges;  // [groups, 2]: the first row of each group, and the one after its last
  int64_t group_stride, end_stride, groups;
  int64_t most;                     // groups of more rows are left out
  int64_t trellis, suh, svh, bias;  // from one weight to the next: strides in words and elements
};

// What `exl3_mix` computes: `y[token] = sum(weights[token, i] * x[token * count + i])`.
struct MixCall {
  Rows x, y;     // [tokens * count, features] and [tokens, features]
  Rows weights;  // [tokens, count]
  int64_t tokens, count, features;
};

// What `exl3_rotate` computes: `y = hadamard(x * before) * after + bias`.
struct RotateCall {
  Rows x, y;  // [rows, in_features] and [rows, out_features], both padded to the same number of blocks
  Rows before, after, bias;
  int64_t rows, in_features, out_features;
};

// What `exl3_decode` and `exl3_dequantize` compute: the inner matrix, or the weight, transposed.
struct DecodeCall {
  Rows y;         // [16 out_tiles, 16 in_tiles]
  Rows suh, svh;  // of `exl3_dequantize` alone
  Trellis trellis;
};

// A tile is stored as 32 lanes of 8 codes, in the order of a tensor core's operand. Codes are kept in memory lane by lane,
// the codes of a lane in this order: neighbours are then of the same column.
constexpr int LANES_OF_TILE = 32, LANE_CODES = 8;
constexpr int LANE_ORDER[LANE_CODES] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int row_of(int lane, int code) { return 2 * (lane % 4) + code % 2 + 8 * (code / 2 % 2); }

// What a code stands for before it is rounded to fp16: `step * code + start`. Both terms and the sum are exact in fp32.
struct CodeUnits {
  float step, start;
  int middle, largest;  // of all codes, and how far at most one is from it
  int largest_input;    // of the whole inputs that codes are multiplied with
};
// An input times a power of two of the two fp16 numbers (`sum_halves`), of which 8 is the largest, has 16 bits.
constexpr int LARGEST_OF_HALVES = 32767 / 8;
constexpr CodeUnits UNITS[NUM_CODEBOOKS] = {
    {0x1p-13f, 0, 0, 2047 << 4, LARGEST_OF_HALVES}, {0x1p-13f, 0, 0, 2047 << 4, LARGEST_OF_HALVES},
    {0.00676727294921875f, 1024 * 0.00676727294921875f - 10.3828125f, 510, 510, 32767}};

// The largest magnitude of a block's whole inputs together, so that their products with codes less `middle` add up to less than
// 2**31. Each is rounded by up to a half. Every block of mul1's is below.
constexpr int largest_inputs(CodeUnits units) { return INT32_MAX / units.largest - BLOCK / 2 - 2; }
static_assert(largest_inputs(UNITS[MUL1]) > BLOCK * UNITS[MUL1].largest_input, "mul1's sums have room for all inputs");

// Rows that may be multiplied while a weight is decoded ("fused"), and rates up to which their inputs then have 8 bits instead
// of 16, for mul1. The error of 8 bits is 0.65 % of the output's RMS, that of coding 6.3 % at 4 bits and 3.2 % at 5: by
// the squares, 1 % and 4 % of the divergence. Measured on Gemma 3 270M: 0.1 % at 2 and 3 bits, 0.8 % at 4.
constexpr int FUSED_ROWS = 2, BYTE_INPUTS_TWICE_BITS = 2 * 4;
constexpr int FUSED_COLUMNS = 4;  // of tiles, that they take at a time: as fast as one at 2 bits, 1.1 times at 4 bits
constexpr int FUSED_AHEAD = 12;   // tiles of each that are fetched ahead
constexpr int LARGEST_BYTE = 127, LARGEST_TWO_BYTES = 127 * 256 + 127;  // whose two bytes are signed numbers each

// The bits that EXL3_CPU_INPUT_BITS asks for: 8, 16, or 0 where it is not set; -1 for anything else.
int input_bits_wanted() {
  const char* wanted = std::getenv("EXL3_CPU_INPUT_BITS");
  if (!wanted || !*wanted) return 0;
  return !std::strcmp(wanted, "8") ? 8 : !std::strcmp(wanted, "16") ? 16 : -1;
}

// What a product that decodes takes as a dword of its inputs.
enum class Inputs {
  NONE,            // it takes none: to decode the weight first is faster
  BYTES,           // an input of 8 bits, four times
  TWO_BYTES,       // the upper byte of one of 16 bits, four times, and the lower one: signed numbers, in a dword each
  NUMBERS,         // one of 16 bits, twice
  PAIRS,           // two of 16 bits, of neighbouring rows of the weight
  PAIRS_OF_BYTES,  // two of 8 bits, of such rows, each twice
};
constexpr bool are_pairs(Inputs kind) { return kind == Inputs::PAIRS || kind == Inputs::PAIRS_OF_BYTES; }
constexpr int states_of(Inputs kind) { return are_pairs(kind) ? 2 : 1; }            // whose inputs are in a dword
constexpr int planes_of(Inputs kind) { return kind == Inputs::TWO_BYTES ? 2 : 1; }  // dwords for an input
constexpr int dwords_of(Inputs kind) { return TILE * planes_of(kind) / states_of(kind); }  // for a tile
inline int32_t four_bytes(int byte) { return int32_t(uint8_t(byte) * 0x01010101u); }
inline int32_t two_bytes_twice(int first, int second) {
  return int32_t(uint8_t(first) * 0x0101u | uint8_t(second) * 0x01010000u);
}
inline int32_t two_numbers(int16_t number) { return int32_t(uint16_t(number) * 0x00010001u); }

// Some columns of tiles times whole inputs. The sums of a block are below 2**31, so that those of its parts may wrap around.
struct FusedCall {
  const int16_t* column;                           // the first tile
  int64_t row_stride, column_stride;               // in words
  int64_t blocks;                                  // of the input
  const int32_t* inputs;                           // [rows, blocks]: what `Fused::arrange` makes of a block
  const int32_t* totals;                           // [blocks, rows]: sums of the inputs
  const float* scales;                             // [blocks, rows]
  float* sums[FUSED_ROWS];                         // each [16 FUSED_COLUMNS]

  int64_t ahead(int64_t tile) const {
    return to_fetch(tile, blocks * BLOCK_TILES, FUSED_AHEAD, FUSED_COLUMNS, row_stride, column_stride);
  }
};
using FusedProduct = void (*)(const FusedCall&);

// How an instruction set multiplies one or two rows by a weight while it decodes it.
struct Fused {
  Inputs (*inputs)(int codebook, int rows, bool is_byte);  // what it takes where inputs have 8 bits, or 16
  FusedProduct (*product)(int codebook, int twice_bits, int rows, Inputs kind);
  void (*arrange)(const int16_t* whole, Inputs kind, int32_t* to);  // the 128 inputs of a block as the product reads them,
  int copies;                                                       // each so often
};

// One block of a group's rows of the input, times decoded codes.
struct RowsCall {
  const int16_t* codes;    // [COLUMNS, 8, 256], of so many columns of tiles as an instruction set takes at a time
  const int16_t* inputs;   // what `arrange_row` makes of each row
  const float* scales;     // [rows],
  const int32_t* totals;   // [rows]: and the sums of their inputs
  int middle;              // of the codes
  float* sums;             // [rows, 16 COLUMNS], rows `sums_stride` apart
  int64_t sums_stride;
};

// Some columns of tiles times rows of bfloat16 numbers, by instructions that multiply matrices of 16 rows ("groups").
constexpr int MATRIX_ROWS = 16, MATRIX_SHARING = 32;  // of a group, and groups that share the decoding
struct MatrixCall {
  Trellis trellis;         // from the first of these columns on
  int64_t width;           // columns, an even number
  const uint16_t* inputs;  // [blocks, groups, 4, 16, 32], blocks `block_stride` apart
  int64_t block_stride, groups;
  float* sums;             // [16 groups, 16 width], rows `stride` apart
  int64_t stride;
};

// How an instruction set does that.
struct Matrices {
  int64_t least;                                       // rows for which it is faster
  float (*arrange)(const float* block, uint16_t* to);  // 128 inputs of a row to [4, 16, 32], and what they add up to there
  void (*multiply)(const MatrixCall&);
};

constexpr uint32_t MULTIPLIERS[NUM_CODEBOOKS] = {89226354, 0xCBAC1FED, 0x83DCD12D};  // as in format.py
constexpr uint32_t THREE_INST_ADDEND = 64248484;
// The bits below its exponent that a half of 0x3B603B60 flips, and the first bit of a mantissa, which fp16 leaves out.
constexpr int16_t MANTISSA_FLIPS = 0x3B60 & 0x3FF, HIDDEN_BIT = 0x400;

// For 16 rows of a tile's column and 16 of the one 8 columns on: where in the codes of four lanes each stands.
struct Transposition {
  alignas(64) uint16_t places[2 * TILE] = {};
  constexpr Transposition() {
    for (int lane = 0; lane < 4; ++lane)
      for (int place = 0; place < LANE_CODES; ++place) {
        int code = LANE_ORDER[place];
        places[code / 4 * TILE + row_of(lane, code)] = uint16_t(lane * LANE_CODES + place);
      }
  }
};
constexpr Transposition TRANSPOSED{};

// The 256 codes of a tile to the order of its transpose, row after row.
inline void transpose_codes(const int16_t* codes, int16_t* transposed) {
  for (int i = 0; i < TILE / 2; ++i, codes += 32)
    for (int row = 0; row < TILE; ++row) {
      transposed[i * TILE + row] = codes[TRANSPOSED.places[row]];
      transposed[(i + 8) * TILE + row] = codes[TRANSPOSED.places[TILE + row]];
    }
}

}  // namespace
