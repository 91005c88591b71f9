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

// One or two rows, with AVX-512 VNNI and VBMI: a weight is multiplied while it is decoded, and no code is ever stored. For 16
// codes, of 16 columns and one row, whose states are cut out as `windows_avx512.h` says, and inputs of 8 bits (mul1 alone):
//     vpmulld     the state times the multiplier,
//     vpdpbusd    the sum of its bytes times the input's byte, which is in all four places of a dword.
// For one row and numbers of 16 bits (mcg and 3inst alone):
//     vpmulld     the same, for 3inst and vpaddd,
//     vpternlogd  the mantissas of both halves,
//     vpsrlw, vpermi2w   the powers of two that belong to them, from a table of their products with the input,
//     vpdpwssd    the sum of their products.
// Otherwise two codes are decoded to a dword, as `windows_avx512.h` says, and
//     vpdpwssd    multiplied by two inputs at once.
// `fused_pairs.h` does the same on vectors of 256 bits.

// The codes of one step of FUSED_COLUMNS tiles, times the inputs of the rows that they are of.
template <int RATE, int BOOK, int ROWS, Inputs KIND, int STEP>
static inline void fused_step(const int16_t* const (&tiles)[FUSED_COLUMNS], const int32_t* const (&inputs)[ROWS],
                              Integers (&windows)[FUSED_COLUMNS], Integers (&sums)[FUSED_COLUMNS][ROWS]) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  constexpr int STATE = STEP * states_of(KIND);
  if constexpr (STATE % all.states == 0)
    for (int i = 0; i < FUSED_COLUMNS; ++i) windows[i] = window<RATE, STATE / all.states>(tiles[i]);
  Integers input[ROWS], negatives;
  constexpr int PLACE = row_of(STATE / 4, STATE % 4) / states_of(KIND);
  for (int row = 0; row < ROWS; ++row) input[row] = _mm512_set1_epi32(inputs[row][PLACE]);
  if constexpr (KIND == Inputs::NUMBERS) {
    static_assert(ROWS == 1, "two rows are no faster so than by pairs");
    input[0] = _mm512_mullo_epi16(load(POWERS), input[0]), negatives = negative(input[0]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < FUSED_COLUMNS; ++i) {
    if constexpr (KIND == Inputs::NUMBERS) {
      Integers product = product_of<BOOK>(cut_state<RATE, STATE>(windows[i]));
      sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], mantissas_of(product), powers_of(product, input[0], negatives));
    } else if constexpr (KIND == Inputs::BYTES) {
      Integers product = product_of<BOOK>(state<RATE, STATE>(windows[i]));
      for (int row = 0; row < ROWS; ++row) sums[i][row] = _mm512_dpbusd_epi32(sums[i][row], product, input[row]);
    } else {
      Integers codes = pair_of<RATE, BOOK, STEP>(windows[i]);
      for (int row = 0; row < ROWS; ++row) sums[i][row] = _mm512_dpwssd_epi32(sums[i][row], codes, input[row]);
    }
  }
}

template <int RATE, int BOOK, int ROWS, Inputs KIND, int... STEP>
static inline void fused_tiles(const int16_t* const (&tiles)[FUSED_COLUMNS], const int32_t* const (&inputs)[ROWS],
                               Integers (&sums)[FUSED_COLUMNS][ROWS], std::integer_sequence<int, STEP...>) {
  Integers windows[FUSED_COLUMNS];
  (fused_step<RATE, BOOK, ROWS, KIND, STEP>(tiles, inputs, windows, sums), ...);
}

template <int RATE, int BOOK, int ROWS, Inputs KIND>
EXL3_NOINLINE static void fused_columns(const FusedCall& call) {
  __m512 total[FUSED_COLUMNS][ROWS];
  for (auto& some : total)
    for (__m512& lanes : some) lanes = _mm512_setzero_ps();
  for (int64_t block = 0; block < call.blocks; ++block) {
    Integers whole[FUSED_COLUMNS][ROWS];
    for (auto& some : whole)
      for (int row = 0; row < ROWS; ++row)
        some[row] = _mm512_set1_epi32(-UNITS[BOOK].middle * call.totals[block * ROWS + row]);
    for (int64_t tile = block * BLOCK_TILES; tile < (block + 1) * BLOCK_TILES; ++tile) {
      const int16_t* tiles[FUSED_COLUMNS];
      const int32_t* input[ROWS];
      const int64_t ahead = call.ahead(tile);
      for (int i = 0; i < FUSED_COLUMNS; ++i) {
        tiles[i] = call.column + i * call.column_stride + tile * call.row_stride;
        prefetch<Windows<RATE>::BYTES>(tiles[i] + ahead);
      }
      for (int row = 0; row < ROWS; ++row)
        input[row] = call.inputs + (row * call.blocks * BLOCK_TILES + tile) * dwords_of(KIND);
      fused_tiles<RATE, BOOK, ROWS, KIND>(tiles, input, whole, std::make_integer_sequence<int, TILE / states_of(KIND)>());
    }
    for (int i = 0; i < FUSED_COLUMNS; ++i)
      for (int row = 0; row < ROWS; ++row) {
        __m512 scale = _mm512_set1_ps(call.scales[block * ROWS + row]);
        total[i][row] = _mm512_add_ps(total[i][row], _mm512_mul_ps(_mm512_cvtepi32_ps(whole[i][row]), scale));
      }
  }
  for (int i = 0; i < FUSED_COLUMNS; ++i)
    for (int row = 0; row < ROWS; ++row) _mm512_storeu_ps(call.sums[row] + i * TILE, total[i][row]);
}

// [8, dwords_of(kind)], in the order of the rows of a tile.
static void arrange_inputs(const int16_t* whole, Inputs kind, int32_t* to) {
  if (kind == Inputs::PAIRS) std::memcpy(to, whole, BLOCK * sizeof *whole);
  else if (kind == Inputs::NUMBERS) std::transform(whole, whole + BLOCK, to, two_numbers);
  else std::transform(whole, whole + BLOCK, to, four_bytes);
}

static Inputs fused_inputs(int codebook, int rows, bool is_byte) {
  return is_byte ? Inputs::BYTES : codebook == MUL1 ? Inputs::PAIRS : rows == 1 ? Inputs::NUMBERS : Inputs::PAIRS;
}

template <int... I>
static FusedProduct fused_product(int codebook, int rate, int rows, Inputs kind, std::integer_sequence<int, I...>) {
  static constexpr FusedProduct OF_BYTES[][2] = {
      {fused_columns<RATES[I], MUL1, 1, Inputs::BYTES>, fused_columns<RATES[I], MUL1, 2, Inputs::BYTES>}...};
  static constexpr FusedProduct OTHERS[][NUM_CODEBOOKS][2] = {
      {{fused_columns<RATES[I], THREE_INST, 1, Inputs::NUMBERS>, fused_columns<RATES[I], THREE_INST, 2, Inputs::PAIRS>},
       {fused_columns<RATES[I], MCG, 1, Inputs::NUMBERS>, fused_columns<RATES[I], MCG, 2, Inputs::PAIRS>},
       {fused_columns<RATES[I], MUL1, 1, Inputs::PAIRS>, fused_columns<RATES[I], MUL1, 2, Inputs::PAIRS>}}...};
  return kind == Inputs::BYTES ? OF_BYTES[rate][rows - 1] : OTHERS[rate][codebook][rows - 1];
}

static FusedProduct fused_product(int codebook, int twice_bits, int rows, Inputs kind) {
  return fused_product(codebook, rate_index(twice_bits), rows, kind, std::make_integer_sequence<int, NUM_RATES>());
}

constexpr Fused FUSED{fused_inputs, fused_product, arrange_inputs, 1};
