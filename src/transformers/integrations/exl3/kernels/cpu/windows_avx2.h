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

// The codes of a tile in pairs of neighbouring rows, with AVX2: of 8 columns at once, each pair in one lane of a vector.
//
// The stream of a tile has columns c and c + 8 after columns c - 1 and c + 7. Its dwords are transposed first, so that lane c
// of a vector has what begins where column c does, so and so many dwords on:
//     vmovdqu, vinserti128     four dwords of two columns,
//     vpunpck*dq, vpunpck*qdq  one of each of 8.
// The states of a pair are then cut out of 32 bits of the stream, alike in all lanes:
//     vpslld, vpsrld, vpblendw    32 bits that begin in the middle of a dword,
//     vpsrld, vpslld, vpblendw    one state in the lower half of a dword, and one in the upper half,
//   and multiplied in 16-bit numbers, since products of 32 bits take twice as long:
//     vpmullw, vpmulhuw, vpmullw, vpaddw    the lower and the upper half of a product,
//     vpmaddubsw, vpmaddubsw, vpaddw        mul1: the sum of its bytes,
//     vpshufb, vpsignw, vpmullw             others: each half as in `vectors_avx512.h`.

constexpr int PAIRS = TILE / 2;  // of rows of a tile

template <int RATE>
struct Columns {
  static constexpr int TILE_DWORDS = 4 * RATE, DWORDS = (RATE + 1) / 2;  // of a tile, and of one with its partner 8 on
  static constexpr bool HAS_HALVES = RATE % 2 != 0;                      // whether odd ones begin in the middle of a dword
  static constexpr int first(int column) { return RATE * column / 2; }   // dword

  Integers dwords[DWORDS + 1];  // the one before, and those of each

  // Dwords PIECE to PIECE + 3 of a column, as far as it has them. Nothing beyond the tile is read.
  template <int COLUMN, int PIECE>
  static inline __m128i piece(const int16_t* tile) {
    constexpr int FROM = first(COLUMN) + PIECE, LAST = TILE_DWORDS - 4;
    __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 2 * (FROM < LAST ? FROM : LAST)));
    if constexpr (FROM <= LAST) return loaded;
    else return _mm_srli_si128(loaded, 4 * (FROM - LAST));
  }

  template <int COLUMN, int PIECE>
  static inline Integers two_pieces(const int16_t* tile) {
    return _mm256_set_m128i(piece<COLUMN + 4, PIECE>(tile), piece<COLUMN, PIECE>(tile));
  }

  template <int PIECE>
  inline void transpose(const int16_t* tile) {
    if constexpr (PIECE < DWORDS) {
      Integers zero = two_pieces<0, PIECE>(tile), one = two_pieces<1, PIECE>(tile);
      Integers two = two_pieces<2, PIECE>(tile), three = two_pieces<3, PIECE>(tile);
      Integers low = _mm256_unpacklo_epi32(zero, one), other_low = _mm256_unpacklo_epi32(two, three);
      Integers high = _mm256_unpackhi_epi32(zero, one), other_high = _mm256_unpackhi_epi32(two, three);
      Integers* to = dwords + 1 + PIECE;
      to[0] = _mm256_unpacklo_epi64(low, other_low);
      if constexpr (PIECE + 1 < DWORDS) to[1] = _mm256_unpackhi_epi64(low, other_low);
      if constexpr (PIECE + 2 < DWORDS) to[2] = _mm256_unpacklo_epi64(high, other_high);
      if constexpr (PIECE + 3 < DWORDS) to[3] = _mm256_unpackhi_epi64(high, other_high);
      transpose<PIECE + 4>(tile);
    }
  }

  inline explicit Columns(const int16_t* tile) {
    if constexpr (DWORDS == 1) dwords[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile));
    else transpose<0>(tile);
    // The stream is a ring: before its start comes its end.
    dwords[0] = _mm256_permutevar8x32_epi32(dwords[DWORDS], _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6));
  }

  // 32 bits of the stream from so many words on after `first`; the one before is -1.
  template <int WORD>
  inline Integers words() const {
    constexpr int DWORD = (WORD + 3) / 2;
    if constexpr (WORD % 2 == 0) return dwords[DWORD];
    else return _mm256_blend_epi16(_mm256_slli_epi32(dwords[DWORD - 1], 16), _mm256_srli_epi32(dwords[DWORD], 16), 0x55);
  }

  // The 16 bits that end at a bit of each column, in the lower half of a dword or in the upper one.
  template <int END, bool IS_UPPER>
  inline Integers state() const {
    constexpr int WORD = (END + 15) / 16 - 2, LEFT = 16 * (WORD + 2) - END;  // bits of the 32 that come after them
    Integers window = words<WORD>();
    if constexpr (HAS_HALVES) window = _mm256_blend_epi32(window, words<WORD + 1>(), 0xAA);
    if constexpr (IS_UPPER) return _mm256_slli_epi32(window, 16 - LEFT);
    else return _mm256_srli_epi32(window, LEFT);
  }

  // The states of codes 2 PAIR and 2 PAIR + 1 of each column.
  template <int PAIR>
  inline Integers states() const {
    constexpr int FIRST = RATE * (2 * PAIR + 1) / 2, SECOND = RATE * (2 * PAIR + 2) / 2;
    return _mm256_blend_epi16(state<FIRST, false>(), state<SECOND, true>(), 0xAA);
  }
};

// 16 states times the codebook's multiplier.
struct Products {
  Integers low, high;  // halves
};
template <int BOOK>
static inline Products products_of(Integers states) {
  const Integers low_factor = _mm256_set1_epi16(int16_t(MULTIPLIERS[BOOK] & 0xFFFF));
  const Integers high_factor = _mm256_set1_epi16(int16_t(MULTIPLIERS[BOOK] >> 16));
  Integers low = _mm256_mullo_epi16(states, low_factor);
  Integers high = _mm256_add_epi16(_mm256_mulhi_epu16(states, low_factor), _mm256_mullo_epi16(states, high_factor));
  if constexpr (BOOK == THREE_INST) {
    // The sum of the lower halves carries where it is below either of them: what is compared is -1 elsewhere.
    const Integers addend = _mm256_set1_epi16(int16_t(THREE_INST_ADDEND & 0xFFFF));
    low = _mm256_add_epi16(low, addend);
    high = _mm256_add_epi16(high, _mm256_set1_epi16(int16_t((THREE_INST_ADDEND >> 16) + 1)));
    high = _mm256_add_epi16(high, _mm256_cmpeq_epi16(_mm256_max_epu16(low, addend), low));
  }
  return {low, high};
}

template <int BOOK>
static inline Integers codes_of(Products products) {
  if constexpr (BOOK != MUL1) {
    Integers low = _mm256_mullo_epi16(mantissas_of(products.low), powers_of(products.low));
    Integers high = _mm256_mullo_epi16(mantissas_of(products.high), powers_of(products.high));
    return _mm256_add_epi16(low, high);
  }
  const Integers ones = _mm256_set1_epi8(1);
  return _mm256_add_epi16(_mm256_maddubs_epi16(products.low, ones), _mm256_maddubs_epi16(products.high, ones));
}

// Where in the stream of a column, counted in pairs, the codes of two of its rows are, or those of the column 8 on.
constexpr int place_of_pair(int rows, int half) { return rows / 2 * 4 + half * 2 + rows % 2; }

template <int RATE, int BOOK, int... I>
static inline void decode_pairs(const int16_t* tile, int16_t* codes, std::integer_sequence<int, I...>) {
  const Columns<RATE> columns(tile);
  (_mm256_store_si256(reinterpret_cast<__m256i*>(codes + I * CODES),
                      codes_of<BOOK>(products_of<BOOK>(columns.template states<place_of_pair(I / 2, I % 2)>()))),
   ...);
}

// The codes of a tile to [8, 16, 2]: pairs of rows, of which each is of 16 columns.
template <int RATE, int BOOK>
static inline void decode_pairs(const int16_t* tile, int16_t* codes) {
  decode_pairs<RATE, BOOK>(tile, codes, std::make_integer_sequence<int, 2 * PAIRS>());
}

static inline Integers in_all_lanes(int32_t dword) { return _mm256_set1_epi32(dword); }

// `sums = sums + vpmaddwd(inputs, codes)`, around which GCC 12 keeps half of all sums in memory.
static inline void add_pairs(Integers& sums, Integers inputs, Integers codes) {
  Integers products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(inputs), "x"(codes));
}
