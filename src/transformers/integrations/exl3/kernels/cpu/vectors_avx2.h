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

// What `codes.h` and `linear.h` are built from, on AVX2 with F16C; vectors_avx512.h explains what is the same there.

constexpr int CODES = 16;  // in a vector

using Integers = __m256i;

struct EvenAndOdd {
  Integers even, odd;
};

// Each lane of 8 codes is cut out of 16 bytes. A state is the end of one word and the start of the next; AVX2 shifts 16-bit
// numbers by different amounts only as products, of which one keeps the lower and one the upper half.
template <int RATE>
struct StatePlaces {
  alignas(32) uint8_t words[LANES_OF_TILE][16] = {}, next[LANES_OF_TILE][16] = {};
  alignas(32) uint16_t powers[LANES_OF_TILE][8] = {};

  // The dword of the tile that the bytes of a lane start with. No byte beyond the tile's is read; -1 is its last dword.
  static constexpr int first(int lane) {
    int word = RATE * (8 * lane + 1) / 2 / 16 - 1, dword = (word + 2) / 2 - 1, end = 4 * RATE - 4;
    return dword < end ? dword : end;
  }

  constexpr StatePlaces() {
    for (int lane = 0; lane < LANES_OF_TILE; ++lane)
      for (int code = 0; code < LANE_CODES; ++code) {
        int end = RATE * (8 * lane + code + 1) / 2, byte = 4 * first(lane);
        powers[lane][code] = uint16_t(1 << end % 16);
        for (int half = 0; half < 2; ++half) {
          words[lane][2 * code + half] = place(end / 16 - 1, byte, half);
          next[lane][2 * code + half] = place(end / 16, byte, half);
        }
      }
  }

  static constexpr uint8_t place(int word, int byte, int half) {
    int at = 2 * ((word + 2) ^ 1) - 4 - byte + half;
    return at < 16 ? uint8_t(at) : 0x80;  // 0x80 gives 0, for what a shift by nothing leaves out
  }
};
template <int RATE>
constexpr StatePlaces<RATE> STATE_PLACES{};

static inline Integers load(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }

template <int RATE, int LANE>
static inline __m128i stream(const int16_t* tile) {
  constexpr int FIRST = StatePlaces<RATE>::first(LANE);
  if constexpr (FIRST < 0) {
    int32_t last;
    std::memcpy(&last, tile + 8 * RATE - 2, sizeof last);
    __m128i start = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile));
    return _mm_insert_epi32(_mm_slli_si128(start, 4), last, 0);
  } else {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 2 * FIRST));
  }
}

template <int RATE, int VECTOR, int>
static inline EvenAndOdd states(const int16_t* tile) {
  constexpr const StatePlaces<RATE>& all = STATE_PLACES<RATE>;
  Integers raw = _mm256_set_m128i(stream<RATE, 2 * VECTOR + 1>(tile), stream<RATE, 2 * VECTOR>(tile));
  Integers words = _mm256_shuffle_epi8(raw, load(all.words[2 * VECTOR]));
  Integers next = _mm256_shuffle_epi8(raw, load(all.next[2 * VECTOR]));
  Integers powers = load(all.powers[2 * VECTOR]);
  words = _mm256_or_si256(_mm256_mullo_epi16(words, powers), _mm256_mulhi_epu16(next, powers));
  return {_mm256_and_si256(words, _mm256_set1_epi32(0xFFFF)), _mm256_srli_epi32(words, 16)};
}

static inline Integers multiply(Integers a, uint32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(int(b))); }
static inline Integers add(Integers a, uint32_t b) { return _mm256_add_epi32(a, _mm256_set1_epi32(int(b))); }

static inline Integers sum_bytes(Integers a) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

static inline Integers powers_of(Integers product) {
  // Of a byte, four bits count: two of the exponent, and two above them that do not matter. The upper byte is nothing.
  const Integers powers = _mm256_setr_epi8(4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2,  //
                                           4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2);
  Integers exponents = _mm256_or_si256(_mm256_srli_epi16(product, 10), _mm256_set1_epi16(int16_t(0x8000)));
  return _mm256_shuffle_epi8(powers, exponents);
}

static inline Integers mantissas_of(Integers product) {
  Integers mantissas = _mm256_and_si256(product, _mm256_set1_epi16(0x3FF));
  mantissas = _mm256_xor_si256(mantissas, _mm256_set1_epi16(MANTISSA_FLIPS | HIDDEN_BIT));
  return _mm256_sign_epi16(mantissas, _mm256_or_si256(product, _mm256_set1_epi16(1)));
}

static inline Integers sum_halves(Integers product) { return _mm256_madd_epi16(mantissas_of(product), powers_of(product)); }

static inline void store_codes(int16_t* to, Integers even, Integers odd) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_packs_epi32(even, odd));
}

static inline __m128i values_of(const int16_t* codes, CodeUnits units) {
  __m256i wide = _mm256_cvtepi16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(codes)));
  __m256 exact = _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(units.step));
  return _mm256_cvtps_ph(_mm256_add_ps(exact, _mm256_set1_ps(units.start)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline void store_values(const int16_t* codes, CodeUnits units, float* to) {
  for (int i = 0; i < TILE; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(values_of(codes + i, units)));
}

static inline void store_values(const int16_t* codes, CodeUnits units, Half* to) {
  for (int i = 0; i < TILE; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), values_of(codes + i, units));
}

static inline void store_values(const int16_t* codes, CodeUnits units, BFloat* to) {
  float values[TILE];
  store_values(codes, units, values);
  for (int i = 0; i < TILE; ++i) to[i].bits = to_bfloat(values[i]);
}
