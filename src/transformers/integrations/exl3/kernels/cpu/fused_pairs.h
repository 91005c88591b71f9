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

// One or two rows on vectors of 256 bits: a weight is multiplied while it is decoded, and no code is ever stored. The codes of two
// of its rows and 8 columns, as `windows_avx2.h` gives them, times
//     vpbroadcastd    the inputs of these rows,
//   by
//     vpmaddwd, vpaddd    with AVX2 alone, or
//     vpdpwssd            where EXL3_DOT is EXL3_DOT_VEX (AVX-VNNI) or EXL3_DOT_EVEX (AVX-512 VNNI and VL: the same in another
//                         encoding), which for mul1 and inputs of 8 bits have
//     vpdpbusd, vpdpbusd  the bytes of both halves of the products instead of their sums, the codes.

#if EXL3_DOT == EXL3_DOT_VEX
static inline void add_words(Integers& sums, Integers inputs, Integers codes) { sums = _mm256_dpwssd_avx_epi32(sums, inputs, codes); }
static inline void add_bytes(Integers& sums, Integers inputs, Integers bytes) { sums = _mm256_dpbusd_avx_epi32(sums, bytes, inputs); }
#elif EXL3_DOT == EXL3_DOT_EVEX
static inline void add_words(Integers& sums, Integers inputs, Integers codes) { sums = _mm256_dpwssd_epi32(sums, inputs, codes); }
static inline void add_bytes(Integers& sums, Integers inputs, Integers bytes) { sums = _mm256_dpbusd_epi32(sums, bytes, inputs); }
#else
static inline void add_words(Integers& sums, Integers inputs, Integers codes) { add_pairs(sums, inputs, codes); }
#endif

// The halves of products are added to sums of their own, since each addition waits five cycles for the one before.
constexpr int sums_of(Inputs kind) { return kind == Inputs::PAIRS_OF_BYTES ? 2 : 1; }

template <int RATE, int BOOK, int ROWS, Inputs KIND, int... I>
static inline void multiply_tile(const int16_t* tile, const int32_t* const (&inputs)[ROWS],
                                 Integers (&sums)[2][ROWS][sums_of(KIND)], std::integer_sequence<int, I...>) {
  const Columns<RATE> columns(tile);
  auto add = [&](Products products, int rows, Integers (&half)[ROWS][sums_of(KIND)]) {
    for (int row = 0; row < ROWS; ++row) {
      Integers input = in_all_lanes(inputs[row][row_of(rows / 2, rows % 2 * 2) / 2]);
#if EXL3_DOT != EXL3_DOT_NONE
      if constexpr (KIND == Inputs::PAIRS_OF_BYTES) {
        add_bytes(half[row][0], input, products.low);
        add_bytes(half[row][1], input, products.high);
        continue;
      }
#endif
      add_words(half[row][0], input, codes_of<BOOK>(products));
    }
  };
  (add(products_of<BOOK>(columns.template states<place_of_pair(I / 2, I % 2)>()), I / 2, sums[I % 2]), ...);
}

template <int RATE, int BOOK, int ROWS, Inputs KIND>
EXL3_NOINLINE static void fused_columns(const FusedCall& call) {
  for (int row = 0; row < ROWS; ++row) std::fill_n(call.sums[row], FUSED_COLUMNS * TILE, 0.f);
  for (int64_t block = 0; block < call.blocks; ++block)
    for (int column = 0; column < FUSED_COLUMNS; ++column) {
      const int16_t* tile = call.column + column * call.column_stride + block * BLOCK_TILES * call.row_stride;
      Integers sums[2][ROWS][sums_of(KIND)] = {};
      for (auto& half : sums)
        for (int row = 0; row < ROWS; ++row) half[row][0] = in_all_lanes(-UNITS[BOOK].middle * call.totals[block * ROWS + row]);
      for (int i = 0; i < BLOCK_TILES; ++i, tile += call.row_stride) {
        prefetch<16 * RATE>(tile + call.ahead(block * BLOCK_TILES + i));
        const int32_t* inputs[ROWS];
        for (int row = 0; row < ROWS; ++row)
          inputs[row] = call.inputs + ((row * call.blocks + block) * BLOCK_TILES + i) * dwords_of(KIND);
        multiply_tile<RATE, BOOK, ROWS, KIND>(tile, inputs, sums, std::make_integer_sequence<int, 2 * PAIRS>());
      }
      for (int row = 0; row < ROWS; ++row)
        for (int half = 0; half < 2; ++half) {
          float* to = call.sums[row] + column * TILE + half * CODES / 2;
          Places whole = (Places)sums[half][row][0];
          if constexpr (sums_of(KIND) == 2) whole += (Places)sums[half][row][1];
          Real exact = __builtin_convertvector(whole, Real);
          store_real(to, load_real(to) + exact * call.scales[block * ROWS + row]);
        }
    }
}

constexpr Inputs OF_8_BITS = EXL3_DOT == EXL3_DOT_NONE ? Inputs::PAIRS : Inputs::PAIRS_OF_BYTES;

template <int... I>
static FusedProduct fused_product(int codebook, int rate, int rows, Inputs kind, std::integer_sequence<int, I...>) {
  constexpr Inputs WORDS = Inputs::PAIRS;
  static constexpr FusedProduct OF_BYTES[][2] = {
      {fused_columns<RATES[I], MUL1, 1, OF_8_BITS>, fused_columns<RATES[I], MUL1, 2, OF_8_BITS>}...};
  static constexpr FusedProduct OF_WORDS[][NUM_CODEBOOKS][2] = {
      {{fused_columns<RATES[I], THREE_INST, 1, WORDS>, fused_columns<RATES[I], THREE_INST, 2, WORDS>},
       {fused_columns<RATES[I], MCG, 1, WORDS>, fused_columns<RATES[I], MCG, 2, WORDS>},
       {fused_columns<RATES[I], MUL1, 1, WORDS>, fused_columns<RATES[I], MUL1, 2, WORDS>}}...};
  return kind == WORDS ? OF_WORDS[rate][codebook][rows - 1] : OF_BYTES[rate][rows - 1];
}

static FusedProduct fused_product(int codebook, int twice_bits, int rows, Inputs kind) {
  return fused_product(codebook, rate_index(twice_bits), rows, kind, std::make_integer_sequence<int, NUM_RATES>());
}

static Inputs fused_inputs(int, int, bool is_byte) { return is_byte ? OF_8_BITS : Inputs::PAIRS; }

// [8, 8], in the order of the rows of a tile.
static void arrange_inputs(const int16_t* whole, Inputs kind, int32_t* to) {
  if (kind == Inputs::PAIRS) std::memcpy(to, whole, BLOCK * sizeof *whole);
  else for (int i = 0; i < BLOCK; i += 2) *to++ = two_bytes_twice(whole[i], whole[i + 1]);
}

constexpr Fused FUSED{fused_inputs, fused_product, arrange_inputs, 1};
