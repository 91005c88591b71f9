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

// What `codes.h` and `linear.h` are built from, on AVX-512 with F, BW, DQ and VL. Where EXL3_VNNI is 1 also with VBMI
// and VNNI, which cut states out of a stream and add bytes up in fewer operations.

constexpr int CODES = 32;  // in a vector

using Integers = __m512i;

struct EvenAndOdd {
  Integers even, odd;  // of the even and of the odd codes of a vector, in 32-bit lanes
};

// Where the states of a vector's 32 codes stand in its words, which are counted from the one before those that the vector
// itself adds: there the state of its first code may start.
template <int RATE>
struct StatePlaces {
  alignas(64) uint16_t words[2][32] = {};  // by whether the vector adds its first word at an odd place of the tile
#if EXL3_VNNI
  // Four states are cut out of one qword, whose words are turned around: bit 63 is then the first of the stream.
  alignas(64) uint8_t even[64] = {}, odd[64] = {};
  // Or two are a dword ("window") that ends in the byte where the second of them does, shifted by these and masked.
  alignas(64) uint8_t windows[2][64] = {};
  alignas(64) uint32_t shifts[2][16] = {};  // of even and of odd codes
  bool shifts_odd = false;
#else
  // A state is the end of one word and the start of the next.
  alignas(64) uint16_t next[2][32] = {}, left[32] = {}, right[32] = {};
#endif

  constexpr StatePlaces() {
    for (int lane = 0; lane < 32; ++lane) {
#if EXL3_VNNI
      int first = RATE * (lane / 4 * 4 + 1) / 2 / 16, at = RATE * (lane + 1) / 2 - 16 * first;
      place(words, lane, first + 3 - lane % 4);
      uint8_t* bits = (lane % 2 ? odd : even) + lane / 2 * 4;
      bits[0] = uint8_t(48 - at), bits[1] = uint8_t(56 - at);
#else
      int end = RATE * (lane + 1) / 2;
      place(words, lane, end / 16);
      place(next, lane, end / 16 + 1);
      left[lane] = uint16_t(end % 16), right[lane] = uint16_t(16 - end % 16);
#endif
    }
#if EXL3_VNNI
    for (int pair = 0; pair < 16; ++pair) {
      int end = RATE * (pair + 1), behind = (end + 7) / 8;
      shifts[0][pair] = uint32_t(8 * behind - RATE * (2 * pair + 1) / 2), shifts[1][pair] = uint32_t(8 * behind - end);
      shifts_odd = shifts_odd || 8 * behind != end;
      for (int is_odd = 0; is_odd < 2; ++is_odd)
        for (int i = 0; i < 4; ++i) {
          int byte = behind - 1 - i + 4 - 2 * is_odd;  // of the stream that is loaded; masks take away what is before it
          windows[is_odd][4 * pair + i] = uint8_t(byte < 0 ? 0 : byte / 4 * 4 + 3 - byte % 4);
        }
    }
#endif
  }

  // In memory the two words of a dword are swapped.
  static constexpr void place(uint16_t (&places)[2][32], int lane, int word) {
    places[0][lane] = uint16_t((word + 1) ^ 1);
    places[1][lane] = uint16_t(word ^ 1);
  }
};
template <int RATE>
constexpr StatePlaces<RATE> STATE_PLACES{};

static inline Integers load(const void* from) { return _mm512_load_si512(from); }

// The words of codes 32 * VECTOR ... of a tile, from the dword on that has the word before. Reads nothing beyond the tile.
template <int RATE, int VECTOR>
static inline Integers stream(const int16_t* tile) {
  constexpr int WORD = RATE * VECTOR, ODD = WORD % 2, FIRST = (WORD + ODD) / 2 - 1, COUNT = (RATE + 1 - ODD) / 2 + 1;
  constexpr __mmask16 MASK = (1 << COUNT) - 1;
  if constexpr (VECTOR == 0) {
    // The stream is a ring: before its start comes its end.
    int32_t last;
    std::memcpy(&last, tile + 8 * RATE - 2, sizeof last);
    return _mm512_mask_set1_epi32(_mm512_maskz_loadu_epi32(MASK & ~1, tile - 2), 1, last);
  } else if constexpr (COUNT <= 8 && FIRST + 8 <= 4 * RATE) {
    // Loads without a mask are faster, and here what they read more is still of the tile.
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 2 * FIRST)));
  } else {
    return _mm512_maskz_loadu_epi32(MASK, tile + 2 * FIRST);
  }
}

// On Zen 4 a multishift is done where products are, and shifts where shuffles are: mul1's codes take few shuffles, the others many.
template <int RATE, int VECTOR, int BOOK>
static inline EvenAndOdd states(const int16_t* tile) {
  constexpr const StatePlaces<RATE>& all = STATE_PLACES<RATE>;
  Integers raw = stream<RATE, VECTOR>(tile);
#if EXL3_VNNI
  if constexpr (BOOK == MUL1) {
    const Integers low_halves = _mm512_set1_epi32(0xFFFF);
    Integers windows = _mm512_permutexvar_epi8(load(all.windows[RATE * VECTOR % 2]), raw);
    Integers odd = all.shifts_odd ? _mm512_srlv_epi32(windows, load(all.shifts[1])) : windows;
    Integers even = _mm512_srlv_epi32(windows, load(all.shifts[0]));
    return {_mm512_and_si512(even, low_halves), _mm512_and_si512(odd, low_halves)};
  }
#endif
  Integers words = _mm512_permutexvar_epi16(load(all.words[RATE * VECTOR % 2]), raw);
#if EXL3_VNNI
  constexpr __mmask64 LOW_HALVES = 0x3333333333333333;
  return {_mm512_maskz_multishift_epi64_epi8(LOW_HALVES, load(all.even), words),
          _mm512_maskz_multishift_epi64_epi8(LOW_HALVES, load(all.odd), words)};
#else
  Integers next = _mm512_permutexvar_epi16(load(all.next[RATE * VECTOR % 2]), raw);
  words = _mm512_or_si512(_mm512_sllv_epi16(words, load(all.left)), _mm512_srlv_epi16(next, load(all.right)));
  return {_mm512_and_si512(words, _mm512_set1_epi32(0xFFFF)), _mm512_srli_epi32(words, 16)};
#endif
}

static inline Integers multiply(Integers a, uint32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(int(b))); }
static inline Integers add(Integers a, uint32_t b) { return _mm512_add_epi32(a, _mm512_set1_epi32(int(b))); }

// The sum of the four bytes of each lane.
static inline Integers sum_bytes(Integers a) {
  const Integers ones = _mm512_set1_epi8(1);
#if EXL3_VNNI
  return _mm512_dpbusd_epi32(_mm512_setzero_si512(), a, ones);
#else
  return _mm512_madd_epi16(_mm512_maddubs_epi16(a, ones), _mm512_set1_epi16(1));
#endif
}

// The sum of the two fp16 numbers that the 3inst and mcg codebooks make of a product, in units of 2**-13, exact: each is
// (1024 + mantissa) << n for its two exponent bits, of which the upper one is flipped.
alignas(64) static constexpr int16_t POWERS[32] = {4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2,
                                                   4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2};
static inline Integers negative(Integers a) { return _mm512_sub_epi16(_mm512_setzero_si512(), a); }
static inline Integers powers_of(Integers product, Integers positive, Integers negative) {
  return _mm512_permutex2var_epi16(positive, _mm512_srli_epi16(product, 10), negative);
}
static inline Integers mantissas_of(Integers product) {
  constexpr int AND_XOR = 0x6A;
  return _mm512_ternarylogic_epi32(product, _mm512_set1_epi16(0x3FF), _mm512_set1_epi16(MANTISSA_FLIPS | HIDDEN_BIT), AND_XOR);
}
static inline Integers sum_halves(Integers product) {
  return _mm512_madd_epi16(mantissas_of(product), powers_of(product, load(POWERS), negative(load(POWERS))));
}

static inline void store_codes(int16_t* to, Integers even, Integers odd) {
  _mm512_store_si512(to, _mm512_packs_epi32(even, odd));
}

// 256 codes of a tile to the order of its transpose, rows side by side.
static inline void transpose_codes(const int16_t* codes, int16_t* transposed) {
  for (int i = 0; i < TILE / 2; ++i) {
    Integers rows = _mm512_permutexvar_epi16(load(TRANSPOSED.places), load(codes + i * CODES));
    _mm256_store_si256(reinterpret_cast<__m256i*>(transposed + i * TILE), _mm512_castsi512_si256(rows));
    _mm256_store_si256(reinterpret_cast<__m256i*>(transposed + (i + 8) * TILE), _mm512_extracti64x4_epi64(rows, 1));
  }
}

// 16 codes to the fp16 values that they stand for, in bits.
static inline __m256i values_of(const int16_t* codes, CodeUnits units) {
  __m512 exact = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes))));
  exact = _mm512_add_ps(_mm512_mul_ps(exact, _mm512_set1_ps(units.step)), _mm512_set1_ps(units.start));
  return _mm512_cvtps_ph(exact, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline void store_values(const int16_t* codes, CodeUnits units, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(values_of(codes, units)));
}

static inline void store_values(const int16_t* codes, CodeUnits units, Half* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values_of(codes, units));
}

static inline void store_values(const int16_t* codes, CodeUnits units, BFloat* to) {
  Integers bits = _mm512_castps_si512(_mm512_cvtph_ps(values_of(codes, units)));  // finite: rounding overflows nothing
  Integers odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bits));
}
