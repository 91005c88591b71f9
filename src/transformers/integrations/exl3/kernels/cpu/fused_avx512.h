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

// One or two rows (of mcg and 3inst one), with AVX-512 VNNI and VBMI: what a product with the codebook's multiplier is made of is added up and multiplied
// by the input in one instruction, so that no code is ever stored. For 16 codes, of 16 columns and one row, whose states are cut
// out as `windows_avx512.h` says:
//     vpmulld     the state times the multiplier,
//   and for mul1
//     vpdpbusd    the sum of its bytes times the input's byte, which is in all four places of a dword,
//   for the others (3inst after vpaddd)
//     vpternlogd  the mantissas of both halves,
//     vpsrlw, vpermi2w   the powers of two that belong to them, from a table of their products with the input,
//     vpdpwssd    the sum of their products.
// `fused.h` does mul1's on vectors of 128 and 256 bits.

// The codes of one step of FUSED_COLUMNS tiles, times the input of the row that they are of.
template <int RATE, int BOOK, int ROWS, int PARTS, int STEP>
static inline void fused_step(const int16_t* const (&tiles)[FUSED_COLUMNS], const int32_t* const (&inputs)[ROWS],
                              Integers (&windows)[FUSED_COLUMNS], Integers (&sums)[FUSED_COLUMNS][ROWS][PARTS]) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  if constexpr (STEP % all.states == 0)
    for (int i = 0; i < FUSED_COLUMNS; ++i) windows[i] = window<RATE, STEP / all.states>(tiles[i]);
  constexpr int FEATURE = row_of(STEP / 4, STEP % 4);
  Integers input[ROWS][PARTS];
  for (int row = 0; row < ROWS; ++row)
    for (int part = 0; part < PARTS; ++part) input[row][part] = _mm512_set1_epi32(inputs[row][part * TILE + FEATURE]);
  if constexpr (BOOK == MUL1) {
#pragma GCC unroll 4
    for (int i = 0; i < FUSED_COLUMNS; ++i) {
      Integers product = product_of<BOOK>(state<RATE, STEP>(windows[i]));
      for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < PARTS; ++part)
          sums[i][row][part] = _mm512_dpbusd_epi32(sums[i][row][part], product, input[row][part]);
    }
  } else {
    static_assert(ROWS == 1 && PARTS == 1, "two rows are no faster so than by a weight that is decoded first");
    Integers positive = _mm512_mullo_epi16(load(POWERS), input[0][0]), negatives = negative(positive);
#pragma GCC unroll 4
    for (int i = 0; i < FUSED_COLUMNS; ++i) {
      Integers product = product_of<BOOK>(cut_state<RATE, STEP>(windows[i]));
      sums[i][0][0] = _mm512_dpwssd_epi32(sums[i][0][0], mantissas_of(product), powers_of(product, positive, negatives));
    }
  }
}

template <int RATE, int BOOK, int ROWS, int PARTS, int... STEP>
static inline void fused_tiles(const int16_t* const (&tiles)[FUSED_COLUMNS], const int32_t* const (&inputs)[ROWS],
                               Integers (&sums)[FUSED_COLUMNS][ROWS][PARTS], std::integer_sequence<int, STEP...>) {
  Integers windows[FUSED_COLUMNS];
  (fused_step<RATE, BOOK, ROWS, PARTS, STEP>(tiles, inputs, windows, sums), ...);
}

// `Fused::product` for inputs of PARTS bytes, or of one number.
template <int RATE, int BOOK, int ROWS, int PARTS>
EXL3_NOINLINE static void fused_columns(const FusedCall& call) {
  __m512 total[FUSED_COLUMNS][ROWS];
  for (auto& some : total)
    for (__m512& lanes : some) lanes = _mm512_setzero_ps();
  for (int64_t block = 0; block < call.blocks; ++block) {
    Integers whole[FUSED_COLUMNS][ROWS][PARTS];
    for (int i = 0; i < FUSED_COLUMNS; ++i)
      for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < PARTS; ++part)
          whole[i][row][part] = BOOK == MUL1 ? _mm512_set1_epi32(-UNITS[MUL1].middle * call.totals[(block * ROWS + row) * PARTS + part])
                                             : _mm512_setzero_si512();
    for (int64_t tile = block * BLOCK_TILES; tile < (block + 1) * BLOCK_TILES; ++tile) {
      const int16_t* tiles[FUSED_COLUMNS];
      const int32_t* input[ROWS];
      const int64_t ahead = call.ahead(tile);
      for (int i = 0; i < FUSED_COLUMNS; ++i) {
        tiles[i] = call.column + i * call.column_stride + tile * call.row_stride;
        prefetch<Windows<RATE>::BYTES>(tiles[i] + ahead);
      }
      for (int row = 0; row < ROWS; ++row)
        input[row] = call.inputs + (row * call.blocks * BLOCK_TILES + tile) * PARTS * TILE;
      fused_tiles<RATE, BOOK, ROWS, PARTS>(tiles, input, whole, std::make_integer_sequence<int, Windows<RATE>::STEPS>());
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

// [8, parts, 16]: a byte in all four of a dword, or a number in both halves.
static void arrange_inputs(const int16_t* whole, int codebook, int parts, int32_t* to) {
  for (int tile = 0; tile < BLOCK_TILES; ++tile, whole += TILE)
    for (int part = 0; part < parts; ++part, to += TILE)
      if (codebook == MUL1)
        for (int i = 0; i < TILE; ++i) to[i] = four_bytes(byte_of(whole[i], part, parts));
      else
        for (int i = 0; i < TILE; ++i) to[i] = int32_t(uint16_t(whole[i]) * 0x00010001u);
}

template <int... I>
static FusedProduct fused_product(int codebook, int rate, int rows, int parts, std::integer_sequence<int, I...>) {
  static constexpr FusedProduct OF_BYTES[][2][2] = {
      {{fused_columns<RATES[I], MUL1, 1, 1>, fused_columns<RATES[I], MUL1, 1, 2>},
       {fused_columns<RATES[I], MUL1, 2, 1>, fused_columns<RATES[I], MUL1, 2, 2>}}...};
  static constexpr FusedProduct OTHERS[][2] = {
      {fused_columns<RATES[I], THREE_INST, 1, 1>, fused_columns<RATES[I], MCG, 1, 1>}...};
  return codebook == MUL1 ? OF_BYTES[rate][rows - 1][parts - 1] : OTHERS[rate][codebook == MCG];
}

static FusedProduct fused_product(int codebook, int twice_bits, int rows, int parts) {
  return fused_product(codebook, rate_index(twice_bits), rows, parts, std::make_integer_sequence<int, NUM_RATES>());
}

static bool has_fused(int codebook, int rows) { return codebook == MUL1 || rows == 1; }

constexpr Fused FUSED{has_fused, fused_product, arrange_inputs, {TILE, 2 * TILE}};
