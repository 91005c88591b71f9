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

// A block of the input times decoded codes: a matrix product of 16-bit numbers, which is faster than to decode a weight to
// memory and to multiply by it. cpu.cpp includes this file where `windows_*.h` decode codes to pairs of neighbouring rows.
//
// The pairs of 16 columns are multiplied by all rows of a group, whose sums stay in registers:
//     vpbroadcastd         the pair of inputs of a row,
//     vpdpwssd             times the codes of a vector; with AVX2 alone vpmaddwd and vpaddd.

constexpr bool IS_WIDE = CODES == 2 * TILE;  // whether a vector has pairs of all columns of a tile
constexpr int GROUP = IS_WIDE ? 8 : 6;       // rows of the input: 12, or 6 of 64 columns, have registers, too, on AVX-512, and are no faster
constexpr int SHARING = 255 / GROUP + 1;     // groups that share the decoding
constexpr int COLUMNS = IS_WIDE ? 2 : 1;     // of tiles, that they take at a time: two vectors; with AVX2, 2 or 4 are no faster
constexpr int ROW_INPUTS = TILE;             // of a tile
constexpr ManyRows MANY_ROWS = IS_WIDE ? WITHOUT_AMX : WITHOUT_BFLOAT16;

struct PairOrder {
  template <int RATE, int BOOK>
  static inline void decode(const int16_t* tile, int16_t* codes) { decode_pairs<RATE, BOOK>(tile, codes); }
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

// Indices are constants everywhere, since compilers would keep an array that is indexed in memory.
template <int... ROW>
EXL3_NOINLINE static void add_group(const RowsCall& call, std::integer_sequence<int, ROW...>) {
  constexpr int ROWS = sizeof...(ROW);
  constexpr int RIGHT = IS_WIDE ? BLOCK_TILES * TILE_SIZE : CODES;  // from the codes of one vector to those of the other
  Integers left[ROWS] = {in_all_lanes(-call.middle * call.totals[ROW])...}, right[ROWS] = {left[ROW]...};
  const int16_t *codes = call.codes, *inputs = call.inputs;
  // What the next group begins and ends with.
  prefetch<1>(call.totals + ROWS);
  prefetch<1>(call.scales + ROWS);
  (prefetch<sizeof(float) * COLUMNS * TILE>(call.sums + (ROWS + ROW) * call.sums_stride), ...);
  for (int pair = 0; pair < BLOCK / 2; ++pair, codes += 2 * TILE, inputs += 2 * ROWS) {
    Integers left_codes = load(codes), right_codes = load(codes + RIGHT);
    auto add = [&](int row, Integers& left_sums, Integers& right_sums) {
      int32_t both;
      std::memcpy(&both, inputs + 2 * row, sizeof both);
      Integers input = in_all_lanes(both);
      add_pairs(left_sums, input, left_codes);
      add_pairs(right_sums, input, right_codes);
    };
    (add(ROW, left[ROW], right[ROW]), ...);
    prefetch<1>(inputs + BLOCK * ROWS);
  }
  auto finish = [&](int row, Integers whole, int column) {
    float* sum = call.sums + row * call.sums_stride + column;
    Real more = __builtin_convertvector((Places)whole, Real) * call.scales[row];
    store_real(sum, load_real(sum) + more);
  };
  ((finish(ROW, left[ROW], 0), finish(ROW, right[ROW], EXL3_LANES)), ...);
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
