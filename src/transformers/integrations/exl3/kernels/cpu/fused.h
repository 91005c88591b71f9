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

// One or two rows and a mul1 weight on vectors of 128 or 256 bits: the bytes of a product with the codebook's multiplier are
// added up and multiplied by the input at once, so that no code is ever stored. cpu.cpp includes this file in the namespace of
// each instruction set that has `Operations` (fused_avx2.h, fused_neon.h); fused_avx512.h is for longer vectors.
//
// A tile is read in the order of its stream, 16 codes in a row ("group") to 128 bits of a vector, of which dword d holds
// codes 4 d to 4 d + 3. One byte shuffle gives each dword the 32 bits of the stream that end where the last of its four codes
// ends ("window"); above 5 bits per weight windows have two codes each. A state is a window, shifted and masked.
// Groups 2 p and 2 p + 1 are columns p (even dwords) and p + 8 (odd ones): they share a sum, whose dwords are added up at the
// end of a block.

template <int RATE>
struct Windows {
  static constexpr int GROUPS = 16, DWORDS = 4 * RATE;  // of a tile

  static constexpr int end(int code) { return RATE * (code + 1) / 2; }  // in bits of the stream
  static constexpr int last(int code, int states) { return code / states * states + states - 1; }
  static constexpr int shift(int code, int states) { return (end(last(code, states)) + 7) / 8 * 8 - end(code); }

  // Whether four states always fit into 32 bits whose end is a byte's.
  static constexpr bool has_four() {
    for (int code = 0; code < TILE; ++code)
      if (shift(code, 4) > 16) return false;
    return true;
  }

  // A group is cut out of two loads of four dwords each. These are where they start; -1 is the last dword of the tile.
  static constexpr int first(int group) {
    int dword = (RATE * group + 2) / 4 - 1;
    return dword < DWORDS - 4 ? dword : DWORDS - 4;
  }
  static constexpr int second(int group) { return first(group) + 4 < DWORDS - 4 ? first(group) + 4 : DWORDS - 4; }

  static constexpr int NOTHING = 0x80;  // gives zeros, for bits that a mask takes away

  int states;                                         // in a window
  bool needs_second = false, is_uniform[4] = {};      // whether all dwords shift alike, at each of their codes
  alignas(32) uint8_t places[2][GROUPS][16] = {};     // of a window's bytes in the first load,
  alignas(32) uint8_t more_places[2][GROUPS][16] = {};  // and in the second
  alignas(32) uint32_t shifts[4][8] = {};             // for two groups, which are alike

  constexpr Windows() : states(has_four() ? 4 : 2) {
    for (int step = 0; step < 4; ++step) {
      is_uniform[step] = true;
      for (int dword = 0; dword < 8; ++dword) {
        shifts[step][dword] = uint32_t(shift(4 * (dword % 4) + step, states));
        is_uniform[step] = is_uniform[step] && shifts[step][dword] == shifts[step][0];
      }
    }
    for (int window = 0; window < 4 / states; ++window)
      for (int group = 0; group < GROUPS; ++group)
        for (int i = 0; i < 16; ++i) place(window, group, i);
  }

  constexpr void place(int window, int group, int i) {
    int behind = (end(TILE * group + i / 4 * 4 + window * states + states - 1) + 7) / 8;
    int byte = behind - 1 - i % 4, dword = (byte + 4) / 4 - 1, at = 3 - (byte + 4) % 4;
    bool is_first = dword >= first(group) && dword < first(group) + 4;
    bool is_second = !is_first && dword >= second(group) && dword < second(group) + 4;
    places[window][group][i] = uint8_t(is_first ? 4 * (dword - first(group)) + at : NOTHING);
    more_places[window][group][i] = uint8_t(is_second ? 4 * (dword - second(group)) + at : NOTHING);
    needs_second = needs_second || is_second;
  }
};
template <int RATE>
constexpr Windows<RATE> WINDOWS{};

using Vector = Operations::Vector;
using Sums = Operations::Sums;
constexpr int HALVES = 2 / Operations::GROUPS;  // vectors that hold the two groups of a pair of columns
constexpr int PAIRS = 4;                        // of columns, at a time
constexpr int COPIES = 2;                       // of an input: the columns of a pair share them
constexpr int INPUTS = COPIES * TILE;           // dwords of a plane: [codes of a dword][8 dwords]

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Signed __attribute__((vector_size(16)));
typedef uint32_t Whole __attribute__((vector_size(16)));

template <int RATE, int GROUP>
static inline Operations::Piece piece(const int16_t* tile) {
  constexpr int FIRST = Windows<RATE>::first(GROUP);
  if constexpr (FIRST < 0) return Operations::piece_behind(tile + 8 * RATE - 2, tile);
  else return Operations::piece(tile + 2 * FIRST);
}

template <int RATE, int VECTOR, int WINDOW>
static inline Vector window(const int16_t* tile) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  constexpr int GROUP = VECTOR * Operations::GROUPS, LAST = GROUP + Operations::GROUPS - 1;
  Vector raw = Operations::join(piece<RATE, GROUP>(tile), piece<RATE, LAST>(tile));
  Vector words = Operations::shuffle(raw, all.places[WINDOW][GROUP]);
  if constexpr (!all.needs_second) return words;
  Vector more = Operations::join(Operations::piece(tile + 2 * all.second(GROUP)), Operations::piece(tile + 2 * all.second(LAST)));
  return Operations::either(words, Operations::shuffle(more, all.more_places[WINDOW][GROUP]));
}

// The state of code STEP of each dword, times the multiplier.
template <int RATE, int STEP>
static inline Vector product(Vector words) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  if constexpr (!all.is_uniform[STEP]) words = Operations::shift_right(words, all.shifts[STEP]);
  else if constexpr (all.shifts[STEP][0] != 0) words = Operations::template shift_right<int(all.shifts[STEP][0])>(words);
  return Operations::multiply(Operations::low_words(words), MULTIPLIERS[MUL1]);
}

// Code STEP of each dword times its input, or two codes times theirs, for which not all `Operations` have some.
template <int RATE, int ROWS, Inputs KIND, int HALF, int STEP, class Own = Operations>
static inline void multiply_step(Vector words, const int32_t* const (&inputs)[ROWS], Sums (&sums)[ROWS][planes_of(KIND)]) {
  constexpr int PLACE = STEP * 8 + HALF * 4;
  if constexpr (KIND == Inputs::PAIRS) {
    Vector codes = Own::pair(product<RATE, 2 * STEP>(words), product<RATE, 2 * STEP + 1>(words));
    for (int row = 0; row < ROWS; ++row) sums[row][0] = Own::add_words(sums[row][0], codes, Own::load(inputs[row] + PLACE));
  } else {
    Vector bytes = product<RATE, STEP>(words);
    for (int row = 0; row < ROWS; ++row)
      for (int plane = 0; plane < planes_of(KIND); ++plane)
        sums[row][plane] = Operations::add_products(sums[row][plane], bytes, inputs[row] + plane * INPUTS + PLACE);
  }
}

template <int RATE, int ROWS, Inputs KIND, int VECTOR, int... STEP>
static inline void multiply_vector(const int16_t* tile, const int32_t* const (&inputs)[ROWS],
                                   Sums (&sums)[ROWS][planes_of(KIND)], std::integer_sequence<int, STEP...>) {
  constexpr int STEPS = WINDOWS<RATE>.states / states_of(KIND);  // of a window
  Vector words;
  ((words = STEP % STEPS == 0 ? window<RATE, VECTOR, STEP / STEPS>(tile) : words,
    multiply_step<RATE, ROWS, KIND, VECTOR % HALVES, STEP>(words, inputs, sums)),
   ...);
}

template <int RATE, int ROWS, Inputs KIND, int FIRST, int... VECTOR>
static inline void multiply_tile(const int16_t* tile, const int32_t* const (&inputs)[ROWS],
                                 Sums (&sums)[PAIRS][ROWS][planes_of(KIND)], std::integer_sequence<int, VECTOR...>) {
  (multiply_vector<RATE, ROWS, KIND, FIRST * HALVES + VECTOR>(tile, inputs, sums[VECTOR / HALVES],
                                                              std::make_integer_sequence<int, 4 / states_of(KIND)>()),
   ...);
}

// PAIRS columns from FIRST on, and those 8 columns on, of a tile's column, over one block.
template <int RATE, int ROWS, Inputs KIND, int FIRST>
static inline void multiply_block(const FusedCall& call, const int16_t* tile, int64_t block, int column) {
  Sums sums[PAIRS][ROWS][planes_of(KIND)];
  for (auto& pair : sums)
    for (auto& planes : pair)
      for (Sums& dwords : planes) dwords = Operations::zeros();
  for (int i = 0; i < BLOCK_TILES; ++i, tile += call.row_stride) {
    if constexpr (FIRST == 0) prefetch<16 * RATE>(tile + call.ahead(block * BLOCK_TILES + i));
    const int32_t* inputs[ROWS];
    for (int row = 0; row < ROWS; ++row)
      inputs[row] = call.inputs + ((row * call.blocks + block) * BLOCK_TILES + i) * dwords_of(KIND) * COPIES;
    multiply_tile<RATE, ROWS, KIND, FIRST>(tile, inputs, sums, std::make_integer_sequence<int, PAIRS * HALVES>());
  }
  for (int row = 0; row < ROWS; ++row) {
    const uint32_t more = uint32_t(Operations::OFFSET - UNITS[MUL1].middle) * uint32_t(call.totals[block * ROWS + row]);
    Whole columns[2] = {};  // and those 8 on
    for (int plane = 0; plane < planes_of(KIND); ++plane) {
      Sums of_pairs[PAIRS];
      for (int pair = 0; pair < PAIRS; ++pair) of_pairs[pair] = sums[pair][row][plane];
      Whole of_plane[2];
      Operations::fold(of_pairs, of_plane);
      for (int half = 0; half < 2; ++half) columns[half] = columns[half] * 256 + of_plane[half];
    }
    for (int half = 0; half < 2; ++half) {
      Floats exact = __builtin_convertvector(Signed(columns[half] + more), Floats), sum;
      float* to = call.sums[row] + column * TILE + half * 8 + FIRST;
      std::memcpy(&sum, to, sizeof sum);
      sum += exact * call.scales[block * ROWS + row];
      std::memcpy(to, &sum, sizeof sum);
    }
  }
}

template <int RATE, int ROWS, Inputs KIND>
EXL3_NOINLINE static void fused_columns(const FusedCall& call) {
  for (int row = 0; row < ROWS; ++row) std::fill_n(call.sums[row], FUSED_COLUMNS * TILE, 0.f);
  for (int64_t block = 0; block < call.blocks; ++block)
    for (int column = 0; column < FUSED_COLUMNS; ++column) {
      const int16_t* tile = call.column + column * call.column_stride + block * BLOCK_TILES * call.row_stride;
      multiply_block<RATE, ROWS, KIND, 0>(call, tile, block, column);
      multiply_block<RATE, ROWS, KIND, PAIRS>(call, tile, block, column);
    }
}

// [8, planes, INPUTS]; of pairs half as much.
template <Inputs KIND>
static void arrange_inputs(const int16_t* whole, int32_t* to) {
  for (int tile = 0; tile < BLOCK_TILES; ++tile, whole += TILE)
    for (int plane = 0; plane < planes_of(KIND); ++plane)
      for (int place = 0; place < INPUTS / states_of(KIND); ++place, ++to) {
        const int16_t* from = whole + row_of(place / 2 % 4, place / 8 * states_of(KIND));
        if constexpr (KIND == Inputs::PAIRS) std::memcpy(to, from, sizeof *to);
        else if constexpr (KIND == Inputs::NUMBERS) *to = two_numbers(*from);
        // The lower byte is a signed number: where it is negative, the upper one is one more.
        else *to = four_bytes(KIND == Inputs::TWO_BYTES && plane == 0 ? (*from + 128) >> 8 : *from);
      }
}

static void arrange_inputs(const int16_t* whole, Inputs kind, int32_t* to) {
  kind == Operations::OF_8_BITS ? arrange_inputs<Operations::OF_8_BITS>(whole, to)
                                : arrange_inputs<Operations::OF_16_BITS>(whole, to);
}

template <int... I>
static FusedProduct fused_product(int rate, int rows, Inputs kind, std::integer_sequence<int, I...>) {
  constexpr Inputs BYTE = Operations::OF_8_BITS, LONG = Operations::OF_16_BITS;
  static constexpr FusedProduct PRODUCTS[][2][2] = {{{fused_columns<RATES[I], 1, BYTE>, fused_columns<RATES[I], 1, LONG>},
                                                     {fused_columns<RATES[I], 2, BYTE>, fused_columns<RATES[I], 2, LONG>}}...};
  return PRODUCTS[rate][rows - 1][kind != BYTE];
}

static FusedProduct fused_product(int, int twice_bits, int rows, Inputs kind) {
  return fused_product(rate_index(twice_bits), rows, kind, std::make_integer_sequence<int, NUM_RATES>());
}

static Inputs fused_inputs(int codebook, int, bool is_byte) {
  return codebook != MUL1 ? Inputs::NONE : is_byte ? Operations::OF_8_BITS : Operations::OF_16_BITS;
}

constexpr Fused FUSED{fused_inputs, fused_product, arrange_inputs, COPIES};
