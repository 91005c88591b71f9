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

// What `fused.h` is built from on vectors of 256 bits. For each of the four codes of a dword:
//     vpsrld / vpsrlvd, vpand, vpmulld    its state, times the multiplier,
//   and then, where EXL3_DOT is EXL3_DOT_VEX (AVX-VNNI) or EXL3_DOT_EVEX (AVX-512 VNNI and VL: the same in another encoding),
//     vpdpbusd                            the sum of its bytes times the input's byte;
//   or, for two codes and inputs of 16 bits:
//     vpdpbusd, vpslld, vpdpbusd          the sums of their bytes in the halves of a dword,
//     vpdpwssd                            times both inputs;
//   with AVX2 alone, where inputs are numbers of 16 bits whatever they are rounded to:
//     vpmaddubsw, vpmaddwd, vpaddd        the sums of two bytes each, times the input, added up.

struct Operations {
  using Vector = __m256i;
  using Sums = __m256i;
  using Piece = __m128i;
  static constexpr int GROUPS = 2, OFFSET = 0;

  static inline Piece piece(const int16_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

  // A dword, and three from somewhere else.
  static inline Piece piece_behind(const int16_t* dword, const int16_t* from) {
    int32_t before;
    std::memcpy(&before, dword, sizeof before);
    return _mm_insert_epi32(_mm_slli_si128(piece(from), 4), before, 0);
  }

  static inline Vector join(Piece low, Piece high) { return _mm256_set_m128i(high, low); }
  static inline Vector load(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
  static inline Vector shuffle(Vector bytes, const uint8_t* places) { return _mm256_shuffle_epi8(bytes, load(places)); }
  static inline Vector either(Vector one, Vector other) { return _mm256_or_si256(one, other); }
  static inline Vector shift_right(Vector dwords, const uint32_t* by) { return _mm256_srlv_epi32(dwords, load(by)); }
  template <int BY>
  static inline Vector shift_right(Vector dwords) { return _mm256_srli_epi32(dwords, BY); }
  static inline Vector low_words(Vector dwords) { return _mm256_and_si256(dwords, _mm256_set1_epi32(0xFFFF)); }
  static inline Vector multiply(Vector dwords, uint32_t by) { return _mm256_mullo_epi32(dwords, _mm256_set1_epi32(int(by))); }
  static inline Sums zeros() { return _mm256_setzero_si256(); }

#if EXL3_DOT == EXL3_DOT_NONE
  static constexpr Inputs OF_8_BITS = Inputs::NUMBERS, OF_16_BITS = Inputs::NUMBERS;
  static inline Sums add_products(Sums sums, Vector bytes, const int32_t* inputs) {
    Vector of_two = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(of_two, load(inputs)));
  }
#else
  static constexpr Inputs OF_8_BITS = Inputs::BYTES, OF_16_BITS = Inputs::PAIRS;
#if EXL3_DOT == EXL3_DOT_VEX
  static inline Sums add_bytes(Sums sums, Vector a, Vector b) { return _mm256_dpbusd_avx_epi32(sums, a, b); }
  static inline Sums add_words(Sums sums, Vector a, Vector b) { return _mm256_dpwssd_avx_epi32(sums, a, b); }
#else
  static inline Sums add_bytes(Sums sums, Vector a, Vector b) { return _mm256_dpbusd_epi32(sums, a, b); }
  static inline Sums add_words(Sums sums, Vector a, Vector b) { return _mm256_dpwssd_epi32(sums, a, b); }
#endif
  static inline Sums add_products(Sums sums, Vector bytes, const int32_t* inputs) { return add_bytes(sums, bytes, load(inputs)); }

  // The sums of the four bytes of both, in the lower and the upper half of a dword.
  static inline Vector pair(Vector first, Vector second) {
    const Vector ones = _mm256_set1_epi8(1);
    return add_bytes(_mm256_slli_epi32(add_bytes(zeros(), second, ones), 16), first, ones);
  }
#endif

  template <typename Four>
  static inline void fold(const Sums (&pairs)[4], Four (&columns)[2]) {
    __m128i halves[4], two[2];
    for (int i = 0; i < 4; ++i)
      halves[i] = _mm_add_epi32(_mm256_castsi256_si128(pairs[i]), _mm256_extracti128_si256(pairs[i], 1));
    for (int i = 0; i < 2; ++i)
      two[i] = _mm_add_epi32(_mm_unpacklo_epi64(halves[2 * i], halves[2 * i + 1]),
                             _mm_unpackhi_epi64(halves[2 * i], halves[2 * i + 1]));
    __m128 first = _mm_castsi128_ps(two[0]), second = _mm_castsi128_ps(two[1]);
    columns[0] = reinterpret_cast<Four>(_mm_shuffle_ps(first, second, _MM_SHUFFLE(2, 0, 2, 0)));
    columns[1] = reinterpret_cast<Four>(_mm_shuffle_ps(first, second, _MM_SHUFFLE(3, 1, 3, 1)));
  }
};

#include "fused.h"
