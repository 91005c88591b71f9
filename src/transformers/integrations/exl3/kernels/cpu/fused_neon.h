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

// One or two rows and a mul1 weight on aarch64: the bytes of a product with the codebook's multiplier are added up and multiplied
// by the input at once, so that no code is ever stored.
//
// A tile is read in the order of its stream, 16 codes in a row ("group") to a vector, of which dword d holds codes 4 d to 4 d + 3.
// One byte shuffle gives each dword the 32 bits of the stream that end where the last of its four codes ends ("window"); above 5
// bits per weight windows have two codes each. For each of the four codes:
//     ushr / ushl, and, mul    its state, times the multiplier,
//   and then, where EXL3_I8MM is 1,
//     usdot                    the sum of its bytes times the input's byte;
//   with dotprod alone, whose products are of signed bytes both, so that 128 times the input's bytes is added later:
//     eor, sdot                its bytes less 128 each, times the input's byte.
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
  alignas(16) uint8_t places[2][GROUPS][16] = {};     // of a window's bytes in the first load,
  alignas(16) uint8_t more_places[2][GROUPS][16] = {};  // and in the second
  alignas(16) uint32_t shifts[4][4] = {};             // for all groups, which are alike

  constexpr Windows() : states(has_four() ? 4 : 2) {
    for (int step = 0; step < 4; ++step) {
      is_uniform[step] = true;
      for (int dword = 0; dword < 4; ++dword) {
        shifts[step][dword] = uint32_t(shift(4 * dword + step, states));
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

using Vector = uint32x4_t;
using Sums = int32x4_t;
constexpr int PAIRS = 4;                         // of columns, at a time
constexpr int COPIES = 2;                        // of an input: the columns of a pair share them
constexpr int INPUTS = COPIES * TILE;            // dwords of a plane: [codes of a dword][8 dwords]
constexpr int OFFSET = EXL3_I8MM ? 0 : 4 * 128;  // what the four bytes of a product are less: 128 each where they are signed

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Signed __attribute__((vector_size(16)));
typedef uint32_t Whole __attribute__((vector_size(16)));

// Four dwords of a tile, from FIRST on: -1 is its last one, which the others follow.
template <int RATE, int FIRST>
static inline uint8x16_t piece(const int16_t* tile) {
  uint8x16_t four = vld1q_u8(reinterpret_cast<const uint8_t*>(FIRST < 0 ? tile : tile + 2 * FIRST));
  if constexpr (FIRST >= 0) return four;
  uint32_t before;
  std::memcpy(&before, tile + 8 * RATE - 2, sizeof before);
  return vextq_u8(vreinterpretq_u8_u32(vdupq_n_u32(before)), four, 12);
}

template <int RATE, int GROUP, int WINDOW>
static inline Vector window(const int16_t* tile) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  uint8x16_t words = vqtbl1q_u8(piece<RATE, all.first(GROUP)>(tile), vld1q_u8(all.places[WINDOW][GROUP]));
  if constexpr (!all.needs_second) return vreinterpretq_u32_u8(words);
  uint8x16_t more = vqtbl1q_u8(piece<RATE, all.second(GROUP)>(tile), vld1q_u8(all.more_places[WINDOW][GROUP]));
  return vreinterpretq_u32_u8(vorrq_u8(words, more));
}

// The state of code STEP of each dword, times the multiplier.
template <int RATE, int STEP>
static inline Vector product(Vector words) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  if constexpr (!all.is_uniform[STEP]) words = vshlq_u32(words, vnegq_s32(vreinterpretq_s32_u32(vld1q_u32(all.shifts[STEP]))));
  else if constexpr (all.shifts[STEP][0] != 0) words = vshrq_n_u32(words, int(all.shifts[STEP][0]));
  return vmulq_u32(vandq_u32(words, vdupq_n_u32(0xFFFF)), vdupq_n_u32(MULTIPLIERS[MUL1]));
}

static inline Sums add_products(Sums sums, Vector bytes, const int32_t* inputs) {
  int8x16_t input = vreinterpretq_s8_s32(vld1q_s32(inputs));
#if EXL3_I8MM
  return vusdotq_s32(sums, vreinterpretq_u8_u32(bytes), input);
#else
  return vdotq_s32(sums, vreinterpretq_s8_u32(veorq_u32(bytes, vdupq_n_u32(0x80808080))), input);
#endif
}

template <int RATE, int ROWS, Inputs KIND, int GROUP, int... STEP>
static inline void multiply_group(const int16_t* tile, const int32_t* const (&inputs)[ROWS],
                                  Sums (&sums)[ROWS][planes_of(KIND)], std::integer_sequence<int, STEP...>) {
  constexpr int STATES = WINDOWS<RATE>.states;  // of a window
  auto multiply = [&](Vector bytes, int place) {
    for (int row = 0; row < ROWS; ++row)
      for (int plane = 0; plane < planes_of(KIND); ++plane)
        sums[row][plane] = add_products(sums[row][plane], bytes, inputs[row] + plane * INPUTS + place);
  };
  Vector words;
  ((words = STEP % STATES == 0 ? window<RATE, GROUP, STEP / STATES>(tile) : words,
    multiply(product<RATE, STEP>(words), STEP * 8 + GROUP % 2 * 4)),
   ...);
}

template <int RATE, int ROWS, Inputs KIND, int FIRST, int... GROUP>
static inline void multiply_tile(const int16_t* tile, const int32_t* const (&inputs)[ROWS],
                                 Sums (&sums)[PAIRS][ROWS][planes_of(KIND)], std::integer_sequence<int, GROUP...>) {
  constexpr auto STEPS = std::make_integer_sequence<int, 4>();
  (multiply_group<RATE, ROWS, KIND, FIRST * 2 + GROUP>(tile, inputs, sums[GROUP / 2], STEPS), ...);
}

// The dwords of four pairs' sums, added up: of the first column of each, and of those 8 on.
static inline void fold(const Sums (&pairs)[PAIRS], Whole (&columns)[2]) {
  int32x4_t two[2];
  for (int i = 0; i < 2; ++i) {
    int64x2_t one = vreinterpretq_s64_s32(pairs[2 * i]), other = vreinterpretq_s64_s32(pairs[2 * i + 1]);
    two[i] = vaddq_s32(vreinterpretq_s32_s64(vzip1q_s64(one, other)), vreinterpretq_s32_s64(vzip2q_s64(one, other)));
  }
  columns[0] = reinterpret_cast<Whole>(vuzp1q_s32(two[0], two[1]));
  columns[1] = reinterpret_cast<Whole>(vuzp2q_s32(two[0], two[1]));
}

// PAIRS columns from FIRST on, and those 8 columns on, of a tile's column, over one block.
template <int RATE, int ROWS, Inputs KIND, int FIRST>
static inline void multiply_block(const FusedCall& call, const int16_t* tile, int64_t block, int column) {
  Sums sums[PAIRS][ROWS][planes_of(KIND)];
  for (auto& pair : sums)
    for (auto& planes : pair)
      for (Sums& dwords : planes) dwords = vdupq_n_s32(0);
  for (int i = 0; i < BLOCK_TILES; ++i, tile += call.row_stride) {
    if constexpr (FIRST == 0) prefetch<16 * RATE>(tile + call.ahead(block * BLOCK_TILES + i));
    const int32_t* inputs[ROWS];
    for (int row = 0; row < ROWS; ++row)
      inputs[row] = call.inputs + ((row * call.blocks + block) * BLOCK_TILES + i) * dwords_of(KIND) * COPIES;
    multiply_tile<RATE, ROWS, KIND, FIRST>(tile, inputs, sums, std::make_integer_sequence<int, 2 * PAIRS>());
  }
  for (int row = 0; row < ROWS; ++row) {
    const uint32_t more = uint32_t(OFFSET - UNITS[MUL1].middle) * uint32_t(call.totals[block * ROWS + row]);
    Whole columns[2] = {};  // and those 8 on
    for (int plane = 0; plane < planes_of(KIND); ++plane) {
      Sums of_pairs[PAIRS];
      for (int pair = 0; pair < PAIRS; ++pair) of_pairs[pair] = sums[pair][row][plane];
      Whole of_plane[2];
      fold(of_pairs, of_plane);
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

// [8, planes, INPUTS]
static void arrange_inputs(const int16_t* whole, Inputs kind, int32_t* to) {
  for (int tile = 0; tile < BLOCK_TILES; ++tile, whole += TILE)
    for (int plane = 0; plane < planes_of(kind); ++plane)
      for (int place = 0; place < INPUTS; ++place) {
        int16_t input = whole[row_of(place / 2 % 4, place / 8)];
        // The lower byte is a signed number: where it is negative, the upper one is one more.
        *to++ = four_bytes(kind == Inputs::TWO_BYTES && plane == 0 ? (input + 128) >> 8 : input);
      }
}

template <int... I>
static FusedProduct fused_product(int rate, int rows, Inputs kind, std::integer_sequence<int, I...>) {
  constexpr Inputs BYTE = Inputs::BYTES, LONG = Inputs::TWO_BYTES;
  static constexpr FusedProduct PRODUCTS[][2][2] = {{{fused_columns<RATES[I], 1, BYTE>, fused_columns<RATES[I], 1, LONG>},
                                                     {fused_columns<RATES[I], 2, BYTE>, fused_columns<RATES[I], 2, LONG>}}...};
  return PRODUCTS[rate][rows - 1][kind != BYTE];
}

static FusedProduct fused_product(int, int twice_bits, int rows, Inputs kind) {
  return fused_product(rate_index(twice_bits), rows, kind, std::make_integer_sequence<int, NUM_RATES>());
}

static Inputs fused_inputs(int codebook, int, bool is_byte) {
  return codebook != MUL1 ? Inputs::NONE : is_byte ? Inputs::BYTES : Inputs::TWO_BYTES;
}

constexpr Fused FUSED{fused_inputs, fused_product, arrange_inputs, COPIES};
