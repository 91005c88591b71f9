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
// added up and multiplied by the input in one instruction, so that no code is ever stored. For 16 codes, of 16 columns and one
// row, whose states are cut out as `windows_avx512.h` says:
//     vpmulld     the state times the multiplier,
//     vpdpbusd    the sum of its bytes times the input's byte, which is in all four places of a dword.
// `fused.h` does the same on vectors of 128 and 256 bits.

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
    Words product = multiply(state<RATE, STEP>(windows[i]), MULTIPLIERS[MUL1]);
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
    for (int i = 0; i < FUSED_COLUMNS; ++i)
      for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < PARTS; ++part)
          whole[i][row][part] = _mm512_set1_epi32(-UNITS[MUL1].middle * call.totals[(block * ROWS + row) * PARTS + part]);
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
        __m512 scale = _mm512_set1_ps(call.scales[block * ROWS + row]);
        total[i][row] = _mm512_add_ps(total[i][row], _mm512_mul_ps(exact, scale));
      }
  }
  for (int i = 0; i < FUSED_COLUMNS; ++i)
    for (int row = 0; row < ROWS; ++row) _mm512_storeu_ps(call.sums[row] + i * TILE, total[i][row]);
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
