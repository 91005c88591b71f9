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

// The states of a tile row by row, with AVX-512 and VBMI: of 16 columns at once, one in each lane of a vector.
//
// Of a tile's column, four codes each follow each other in the stream. For each four, in 16 columns:
//     vpermb / vpermi2b    the 32 bits of the stream that end where the last of the four ends ("window"; above 5 bits per
//                          weight one has two codes),
//   and for each of the four, all of one row of the weight ("step"):
//     vpsrld / vpsrlvd     its state, which is the last 16 bits of the stream up to its end,
//     vpandd               without what stands above,
//   or both at once:
//     vpmultishiftqb.
// Codes are kept in pairs of neighbouring rows:
//     vpmulld, vpdpbusd                   mul1: the two sums of bytes; others: sums of halves as in `vectors_avx512.h`,
//     vpslld, then vpdpbusd or vpblendmw  the second one in the upper half of a dword.
// On Zen 4 a multishift is done where products are, and shifts where shuffles are: to multiply mul1's codes takes few shuffles,
// the others take more.

constexpr int PAIRS = TILE / 2;  // of rows of a tile

template <int RATE>
struct Windows {
  static constexpr int BYTES = 16 * RATE, STEPS = 16;  // of a tile, and states of a lane in it

  static constexpr int code(int step, int lane) { return lane % 8 * 32 + step / 4 * 8 + lane / 8 * 4 + step % 4; }
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
  alignas(64) uint8_t bits[STEPS][64] = {};  // of a qword, where the two bytes of a state start

  constexpr Windows() : states(has_four() ? 4 : 2) {
    for (int step = 0; step < STEPS; ++step) {
      is_uniform[step] = true;
      for (int lane = 0; lane < 16; ++lane) {
        shifts[step][lane] = uint32_t(shift(step, lane, states));
        is_uniform[step] = is_uniform[step] && shifts[step][lane] == shifts[step][0];
        for (int i = 0; i < 2; ++i) bits[step][4 * lane + i] = uint8_t(shifts[step][lane] + 8 * i + lane % 2 * 32);
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
static inline Integers tile_part(const int16_t* tile) {
  constexpr int LEFT = Windows<RATE>::BYTES - 64 * PART;
  const int16_t* from = tile + 32 * PART;
  if constexpr (LEFT >= 64) return _mm512_loadu_si512(from);
  if constexpr (LEFT == 48) return _mm512_maskz_loadu_epi32(0xFFF, from);
  if constexpr (LEFT == 32) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  if constexpr (LEFT == 16) return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

template <int RATE, int WINDOW>
static inline Integers window(const int16_t* tile) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  Integers places = load(all.bytes[WINDOW]), first = tile_part<RATE, 0>(tile);
  if constexpr (all.BYTES <= 64) return _mm512_permutexvar_epi8(places, first);
  else {
    Integers lower = _mm512_permutex2var_epi8(first, places, tile_part<RATE, 1>(tile));
    if constexpr (all.BYTES <= 128) return lower;
    else if constexpr (all.BYTES <= 192)
      return _mm512_mask_permutexvar_epi8(lower, all.is_upper[WINDOW], places, tile_part<RATE, 2>(tile));
    else
      return _mm512_mask_mov_epi8(lower, all.is_upper[WINDOW],
                                  _mm512_permutex2var_epi8(tile_part<RATE, 2>(tile), places, tile_part<RATE, 3>(tile)));
  }
}

// The states of a step, out of the window that has them.
template <int RATE, int STEP>
static inline Integers state(Integers window) {
  constexpr const Windows<RATE>& all = WINDOWS<RATE>;
  Integers shifted = window;
  if constexpr (!all.is_uniform[STEP]) shifted = _mm512_srlv_epi32(window, load(all.shifts[STEP]));
  else if constexpr (all.shifts[STEP][0] != 0) shifted = _mm512_srli_epi32(window, all.shifts[STEP][0]);
  return _mm512_and_si512(shifted, _mm512_set1_epi32(0xFFFF));
}

// The same by a multishift.
template <int RATE, int STEP>
static inline Integers cut_state(Integers window) {
  constexpr __mmask64 LOW_HALVES = 0x3333333333333333;
  return _mm512_maskz_multishift_epi64_epi8(LOW_HALVES, load(WINDOWS<RATE>.bits[STEP]), window);
}

// Codes 2 PAIR and 2 PAIR + 1 of 16 columns, out of the window that has their states. Where shuffles are many, a multishift for
// one of the two, and shifts for the other, are faster than either for both: 1.09 times with one row of mul1 at 6 bits.
template <int RATE, int BOOK, int PAIR>
static inline Integers pair_of(Integers words) {
  constexpr bool MANY_SHUFFLES = BOOK != MUL1 || WINDOWS<RATE>.states == 2;
  Integers first = MANY_SHUFFLES ? cut_state<RATE, 2 * PAIR>(words) : state<RATE, 2 * PAIR>(words);
  Integers second = codes_of<RATE, BOOK>(state<RATE, 2 * PAIR + 1>(words));
  second = _mm512_slli_epi32(second, 16);
  if constexpr (BOOK == MUL1) return _mm512_dpbusd_epi32(second, multiply(first, MULTIPLIERS[MUL1]), _mm512_set1_epi8(1));
  constexpr __mmask32 UPPER_HALVES = 0xAAAAAAAA;
  first = codes_of<RATE, BOOK>(first);
  return _mm512_mask_blend_epi16(UPPER_HALVES, first, second);
}

template <int RATE, int BOOK, int... PAIR>
static inline void decode_pairs(const int16_t* tile, int16_t* codes, std::integer_sequence<int, PAIR...>) {
  constexpr int STATES = WINDOWS<RATE>.states;
  Integers words;
  ((words = 2 * PAIR % STATES == 0 ? window<RATE, 2 * PAIR / STATES>(tile) : words,
    _mm512_store_si512(codes + PAIR * CODES, pair_of<RATE, BOOK, PAIR>(words))),
   ...);
}

// The codes of a tile to [8, 16, 2]: pairs of rows, of which each is of 16 columns.
template <int RATE, int BOOK>
static inline void decode_pairs(const int16_t* tile, int16_t* codes) {
  decode_pairs<RATE, BOOK>(tile, codes, std::make_integer_sequence<int, PAIRS>());
}

static inline Integers in_all_lanes(int32_t dword) { return _mm512_set1_epi32(dword); }

// `sums = _mm512_dpwssd_epi32(sums, inputs, codes)`, around which GCC 12 copies all sums: 3 % of the time of 512 rows.
static inline void add_pairs(Integers& sums, Integers inputs, Integers codes) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(inputs), "v"(codes));
}
