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

// A block of the input times decoded codes, with AVX-512 VNNI and VBMI: a matrix product of 16-bit numbers, which is as fast as
// that of bfloat16 ones, and faster than to decode a weight to memory first.
//
// Codes are kept in pairs of neighbouring rows of the weight, of 16 columns. A pair is decoded from the states that
// `windows_avx512.h` cuts out,
//     vpmulld, vpdpbusd                   mul1: the two sums of bytes; others: sums of halves as in `vectors_avx512.h`,
//     vpslld, then vpdpbusd or vpblendmw  the second one in the upper half of a dword,
//   and multiplied by all rows of a group that keeps its sums in registers, two columns of tiles at a time:
//     vpbroadcastd                        the pair of inputs of a row,
//     vpdpwssd, vpdpwssd                  times the codes of 32 columns.

constexpr int GROUP = 8;            // rows of the input: 12, or 6 of 64 columns, have registers for their sums, too, and are no faster
constexpr int SHARING = 32;         // groups that share the decoding
constexpr int COLUMNS = 2;          // of tiles, that they take at a time
constexpr int ROW_INPUTS = TILE;    // of a tile
constexpr bool MANY_ROWS = true;
constexpr int PAIRS = TILE / 2;     // of rows of a tile

// Codes 2 PAIR and 2 PAIR + 1 of 16 columns, out of the window that has their states. Where shuffles are many, a multishift for
// one of the two, and shifts for the other, are faster than either for both: 1.09 times with one row of mul1 at 6 bits.
template <int RATE, int BOOK, int PAIR>
static inline Integers pair_of(Integers words) {
  constexpr bool MANY_SHUFFLES = BOOK != MUL1 || WINDOWS<RATE>.states == 2;
  Integers first = MANY_SHUFFLES ? cut_state<RATE, 2 * PAIR>(words) : state<RATE, 2 * PAIR>(words);
  Integers second = codes_of<RATE, BOOK>(state<RATE, 2 * PAIR + 1>(words));
  second = _mm512_slli_epi32(second, 16);
  if constexpr (BOOK == MUL1) return _mm512_dpbusd_epi32(second, multiply(first, MULTIPLIERS[MUL1]), _mm512_set1_epi8(1));
  constexpr __mmask32 UPPER_HALVES = 0xAAAAAAAA;
  first = codes_of<RATE, BOOK>(first);
  return _mm512_mask_blend_epi16(UPPER_HALVES, first, second);
}

struct PairOrder {
  template <int RATE, int BOOK, int... PAIR>
  static inline void decode_pairs(const int16_t* tile, int16_t* codes, std::integer_sequence<int, PAIR...>) {
    constexpr int STATES = WINDOWS<RATE>.states;
    Integers words;
    ((words = 2 * PAIR % STATES == 0 ? window<RATE, 2 * PAIR / STATES>(tile) : words,
      _mm512_store_si512(codes + PAIR * CODES, pair_of<RATE, BOOK, PAIR>(words))),
     ...);
  }

  template <int RATE, int BOOK>
  static inline void decode(const int16_t* tile, int16_t* codes) {
    decode_pairs<RATE, BOOK>(tile, codes, std::make_integer_sequence<int, PAIRS>());
  }
};
using RowsOrder = PairOrder;

// The 128 inputs of row `row` of `rows` of a group, as `add_rows` reads them: pair after pair, and each of all rows.
static void arrange_row(const int16_t* whole, int row, int rows, int16_t* to) {
  to += 2 * row;
  for (int tile = 0; tile < BLOCK_TILES; ++tile, whole += TILE)
#pragma GCC unroll 8
    for (int place = 0; place < PAIRS; ++place, to += 2 * rows)
      std::memcpy(to, whole + row_of(place / 2, place % 2 * 2), 2 * sizeof *whole);
}

// `sums = _mm512_dpwssd_epi32(sums, inputs, codes)`, around which GCC 12 copies all sums: 3 % of the time of 512 rows.
static inline void add_products(Integers& sums, Integers inputs, Integers codes) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(inputs), "v"(codes));
}

// Indices are constants everywhere, since compilers would keep an array that is indexed in memory.
template <int... ROW>
EXL3_NOINLINE static void add_group(const RowsCall& call, std::integer_sequence<int, ROW...>) {
  constexpr int ROWS = sizeof...(ROW);
  Integers left[ROWS] = {_mm512_set1_epi32(-call.middle * call.totals[ROW])...}, right[ROWS] = {left[ROW]...};
  const int16_t *codes = call.codes, *inputs = call.inputs;
  // What the next group begins and ends with.
  prefetch<1>(call.totals + ROWS);
  prefetch<1>(call.scales + ROWS);
  (prefetch<sizeof(float) * COLUMNS * TILE>(call.sums + (ROWS + ROW) * call.sums_stride), ...);
  for (int pair = 0; pair < BLOCK / 2; ++pair, codes += CODES, inputs += 2 * ROWS) {
    Integers left_codes = load(codes), right_codes = load(codes + BLOCK_TILES * TILE_SIZE);
    auto add = [&](int row, Integers& left_sums, Integers& right_sums) {
      int32_t both;
      std::memcpy(&both, inputs + 2 * row, sizeof both);
      Integers input = _mm512_set1_epi32(both);
      add_products(left_sums, input, left_codes);
      add_products(right_sums, input, right_codes);
    };
    (add(ROW, left[ROW], right[ROW]), ...);
    prefetch<1>(inputs + BLOCK * ROWS);
  }
  auto finish = [&](int row, Integers whole, int column) {
    float* sum = call.sums + row * call.sums_stride + column * TILE;
    __m512 more = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(call.scales[row]));
    _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), more));
  };
  ((finish(ROW, left[ROW], 0), finish(ROW, right[ROW], 1)), ...);
}

template <int ROWS>
static void add_group(const RowsCall& call) { add_group(call, std::make_integer_sequence<int, ROWS>()); }

template <int... I>
static void add_rows(const RowsCall& call, int rows, std::integer_sequence<int, I...>) {
  static constexpr void (*FUNCTIONS[])(const RowsCall&) = {add_group<I + 1>...};
  FUNCTIONS[rows - 1](call);
}

// `sums` += `scales` times the sums of inputs times codes less their middle, which are whole numbers below 2**31.
static void add_rows(const RowsCall& call, int rows) { add_rows(call, rows, std::make_integer_sequence<int, GROUP>()); }
