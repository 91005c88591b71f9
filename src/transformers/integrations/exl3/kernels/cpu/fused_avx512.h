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

// One or two rows and a mul1 weight, with AVX-512 VNNI and VBMI: the bytes of a product with the codebook's multiplier are
// added up and multiplied by the input in one instruction, so that no code is ever stored.
//
// Lanes 2 l and 2 l + 1 of a vector are columns l and l + 8 of a tile, whose codes follow each other in the stream, four of a
// column at a time. For each four, in 16 columns:
//     vpermb / vpermi2b    the 32 bits of the stream that end where the last of the four ends ("window")
//   and for each of the four, all of one row of the weight:
//     vpsrld / vpsrlvd     its state, which is the last 16 bits of the stream up to its end,
//     vpandd               without what stands above,
//     vpmulld              times the multiplier,
//     vpdpbusd             the sum of its bytes times the input's byte, which is in all four places of a dword.
// `fused.h` does the same on vectors of 128 and 256 bits. On Zen 4 the multishift that `vectors_avx512.h` cuts states out with shares a pipe with the products, shifts do not.

template <int RATE>
struct Windows {
  static constexpr int BYTES = 16 * RATE, STEPS = 16;  // of a tile, and states of a lane in it

  static constexpr int code(int step, int lane) { return lane / 2 * 32 + step / 4 * 8 + lane % 2 * 4 + step % 4; }
  static constexpr int end(int code) { return RATE * (code + 1) / 2; }  // in bits of the stream

  // Whether four states always fit into 32 bits whose end is a byte's; if not, windows have two.
  static constexpr bool has_four() {
    for (int lane = 0; lane < 16; ++lane)
      for (int step = 0; step < STEPS; ++step)
        if (shift(step, lane, 4) > 16) return false;
    return true;
  }
  static constexpr int last(int step, int states) { return step / states * states + states - 1; }
  static constexpr int shift(int step, int lane, int states) {
    return (end(code(last(step, states), lane)) + 7) / 8 * 8 - end(code(step, lane));
  }

  int states;                                    // in a window
  alignas(64) uint8_t bytes[STEPS / 2][64] = {};  // of a tile, for each window
  uint64_t is_upper[STEPS / 2] = {};             // which of them are behind the first 128
  alignas(64) uint32_t shifts[STEPS][16] = {};
  bool is_uniform[STEPS] = {};  // whether all lanes shift alike

  constexpr Windows() : states(has_four() ? 4 : 2) {
    for (int step = 0; step < STEPS; ++step) {
      is_uniform[step] = true;
      for (int lane = 0; lane < 16; ++lane) {
        shifts[step][lane] = uint32_t(shift(step, lane, states));
        is_uniform[step] = is_uniform[step] && shifts[step][lane] == shifts[step][0];
        int behind = (end(code(last(step, states), lane)) + 7) / 8, window = step / states;
        for (int i = 0; i < 4; ++i) {
          int byte = (behind - 1 - i + BYTES) % BYTES, place = byte / 4 * 4 + 3 - byte % 4;
          bytes[window][4 * lane + i] = uint8_t(place);
          if (place >= 128) is_upper[window] |= uint64_t(1) << (4 * lane + i);
        }
      }
    }
  }
};
template <int RATE>
constexpr Windows<RATE> WINDOWS{};

// 64 bytes of a tile, or as many as it has.
template <int RATE, int PART>
static inline Words tile_part(const int16_t* tile) {
  constexpr int LEFT = Windows<RATE>::BYTES - 64 * PART;
  const int16_t* from = tile + 32 * PART;
  if constexpr (LEFT >= 64) return _mm512_loadu_si512(from);
  if constexpr (LEFT == 48) return _mm512_maskz_loadu_epi32(0xFFF, from);
  if constexpr (LEFT == 32) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  if constexpr (LEFT == 16) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

template <int RATE, int WINDOW>
static inline Words window(const int16_t* tile) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  Words places = load(all.bytes[WINDOW]), first = tile_part<RATE, 0>(tile);
  if constexpr (all.BYTES <= 64) return _mm512_permutexvar_epi8(places, first);
  else {
    Words lower = _mm512_permutex2var_epi8(first, places, tile_part<RATE, 1>(tile));
    if constexpr (all.BYTES <= 128) return lower;
    else if constexpr (all.BYTES <= 192)
      return _mm512_mask_permutexvar_epi8(lower, all.is_upper[WINDOW], places, tile_part<RATE, 2>(tile));
    else
      return _mm512_mask_mov_epi8(lower, all.is_upper[WINDOW],
                                  _mm512_permutex2var_epi8(tile_part<RATE, 2>(tile), places, tile_part<RATE, 3>(tile)));
  }
}

// The codes of one step of FUSED_COLUMNS tiles, times the input of the row that they are of.
template <int RATE, int ROWS, int PARTS, int STEP>
static inline void fused_step(const int16_t* const (&tiles)[FUSED_COLUMNS], const int32_t* const (&inputs)[ROWS],
                              Words (&windows)[FUSED_COLUMNS], Words (&sums)[FUSED_COLUMNS][ROWS][PARTS]) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  if constexpr (STEP % all.states == 0)
    for (int i = 0; i < FUSED_COLUMNS; ++i) windows[i] = window<RATE, STEP / all.states>(tiles[i]);
  constexpr int FEATURE = row_of(STEP / 4, STEP % 4);
  Words input[ROWS][PARTS];
  for (int row = 0; row < ROWS; ++row)
    for (int part = 0; part < PARTS; ++part) input[row][part] = _mm512_set1_epi32(inputs[row][part * TILE + FEATURE]);
#pragma GCC unroll 4
  for (int i = 0; i < FUSED_COLUMNS; ++i) {
    Words state;
    if constexpr (all.is_uniform[STEP] && all.shifts[STEP][0] == 0) state = windows[i];
    else if constexpr (all.is_uniform[STEP]) state = _mm512_srli_epi32(windows[i], all.shifts[STEP][0]);
    else state = _mm512_srlv_epi32(windows[i], load(all.shifts[STEP]));
    Words product = multiply(_mm512_and_si512(state, _mm512_set1_epi32(0xFFFF)), MULTIPLIERS[MUL1]);
    for (int row = 0; row < ROWS; ++row)
      for (int part = 0; part < PARTS; ++part)
        sums[i][row][part] = _mm512_dpbusd_epi32(sums[i][row][part], product, input[row][part]);
  }
}

template <int RATE, int ROWS, int PARTS, int... STEP>
static inline void fused_tiles(const int16_t* const (&tiles)[FUSED_COLUMNS], const int32_t* const (&inputs)[ROWS],
                               Words (&sums)[FUSED_COLUMNS][ROWS][PARTS], std::integer_sequence<int, STEP...>) {
  Words windows[FUSED_COLUMNS];
  (fused_step<RATE, ROWS, PARTS, STEP>(tiles, inputs, windows, sums), ...);
}

// `Fused::product` for inputs of PARTS bytes.
template <int RATE, int ROWS, int PARTS>
EXL3_NOINLINE static void fused_columns(const FusedCall& call) {
  __m512 total[FUSED_COLUMNS][ROWS];
  for (auto& some : total)
    for (__m512& lanes : some) lanes = _mm512_setzero_ps();
  for (int64_t block = 0; block < call.blocks; ++block) {
    Words whole[FUSED_COLUMNS][ROWS][PARTS];
    for (auto& some : whole)
      for (auto& parts : some)
        for (Words& lanes : parts) lanes = _mm512_setzero_si512();
    for (int64_t tile = block * BLOCK_TILES; tile < (block + 1) * BLOCK_TILES; ++tile) {
      const int16_t* tiles[FUSED_COLUMNS];
      const int32_t* input[ROWS];
      for (int i = 0; i < FUSED_COLUMNS; ++i) {
        tiles[i] = call.column + i * call.column_stride + tile * call.row_stride;
        prefetch<Windows<RATE>::BYTES>(tiles[i] + FUSED_AHEAD * call.row_stride);
      }
      for (int row = 0; row < ROWS; ++row)
        input[row] = call.inputs + (row * call.blocks * BLOCK_TILES + tile) * PARTS * TILE;
      fused_tiles<RATE, ROWS, PARTS>(tiles, input, whole, std::make_integer_sequence<int, Windows<RATE>::STEPS>());
    }
    for (int i = 0; i < FUSED_COLUMNS; ++i)
      for (int row = 0; row < ROWS; ++row) {
        __m512 exact = _mm512_cvtepi32_ps(whole[i][row][0]);  // the number that both parts make is rounded once
        if constexpr (PARTS == 2)
          exact = _mm512_add_ps(_mm512_mul_ps(exact, _mm512_set1_ps(256)), _mm512_cvtepi32_ps(whole[i][row][PARTS - 1]));
        __m512 scale = _mm512_set1_ps(call.scales[row * call.blocks + block]);
        total[i][row] = _mm512_add_ps(total[i][row], _mm512_mul_ps(exact, scale));
      }
  }
  const Words columns = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  for (int i = 0; i < FUSED_COLUMNS; ++i)
    for (int row = 0; row < ROWS; ++row)
      _mm512_storeu_ps(call.sums[row] + i * TILE, _mm512_permutexvar_ps(columns, total[i][row]));
}

// Each byte of an input in all four of a dword [8, parts, 16].
static void arrange_inputs(const int16_t* whole, int parts, int32_t* to) {
  for (int i = 0; i < BLOCK; ++i)
    for (int part = 0; part < parts; ++part)
      to[(i / TILE * parts + part) * TILE + i % TILE] = four_bytes(byte_of(whole[i], part, parts));
}

template <int... I>
static FusedProduct fused_product(int rate, int rows, int parts, std::integer_sequence<int, I...>) {
  static constexpr FusedProduct PRODUCTS[][2][2] = {{{fused_columns<RATES[I], 1, 1>, fused_columns<RATES[I], 1, 2>},
                                                     {fused_columns<RATES[I], 2, 1>, fused_columns<RATES[I], 2, 2>}}...};
  return PRODUCTS[rate][rows - 1][parts - 1];
}

static FusedProduct fused_product(int twice_bits, int rows, int parts) {
  return fused_product(rate_index(twice_bits), rows, parts, std::make_integer_sequence<int, NUM_RATES>());
}

constexpr Fused FUSED{fused_product, arrange_inputs, {TILE, 2 * TILE}};
