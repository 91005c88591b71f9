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


// Many rows of bfloat16 numbers, with AMX, whose registers are matrices. A weight is decoded for 256 inputs and 32 columns at
// a time, as `windows_avx512.h` says, to pairs of neighbouring rows of 16 columns:
//     vpmulld, vpdpbusd            codes less their middle; of mcg and 3inst sums of halves as in `vectors_avx512.h`,
//     vcvtdq2ps, vcvtne2ps2bf16    two rows to bfloat16,
//     vpermw                       their numbers in turns,
// and multiplied by 32 rows of the input, whose sums stay in four registers:
//     tileloadd                    16 rows of 32 inputs, 32 inputs of 16 columns,
//     tdpbf16ps                    the products of two of each.

constexpr int DEPTH = 32;                      // inputs in a register
constexpr int STEPS = BLOCK / DEPTH;           // registers for the inputs of a block
constexpr int REGISTER = MATRIX_ROWS * DEPTH;  // numbers in one
constexpr int LINE_BYTES = 64;                 // of a row of a register
constexpr int PANEL = 2;                       // blocks for which sums stay in registers: 4 are 0.95, 8 0.87 times as fast

struct alignas(64) Layout {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  constexpr Layout() {
    for (int i = 0; i < 8; ++i) row_bytes[i] = LINE_BYTES, rows[i] = MATRIX_ROWS;
  }
};
constexpr Layout LAYOUT{};

template <int RATE, int BOOK, int STEP>
static inline __m512 centred_codes(Integers words) {
  Integers product = product_of<BOOK>(state<RATE, STEP>(words));
  if constexpr (BOOK != MUL1) return _mm512_cvtepi32_ps(sum_halves(product));
  return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_set1_epi32(-UNITS[BOOK].middle), product, _mm512_set1_epi8(1)));
}

struct Turns {
  alignas(64) uint16_t places[2 * TILE] = {};
  constexpr Turns() {
    for (int i = 0; i < 2 * TILE; ++i) places[i] = uint16_t(i % 2 * TILE + i / 2);
  }
};
constexpr Turns TURNS{};

template <int RATE, int BOOK, int... PAIR>
static inline void decode_pairs(const int16_t* tile, uint16_t* to, std::integer_sequence<int, PAIR...>) {
  constexpr int STATES = WINDOWS<RATE>.states;
  Integers words;
  auto store = [&](int row, __m512 first, __m512 second) {
    Integers both = Integers(_mm512_cvtne2ps_pbh(second, first));
    _mm512_store_si512(to + row * TILE, _mm512_permutexvar_epi16(load(TURNS.places), both));
  };
  ((words = 2 * PAIR % STATES == 0 ? window<RATE, 2 * PAIR / STATES>(tile) : words,
    store(row_of(PAIR / 2, PAIR % 2 * 2), centred_codes<RATE, BOOK, 2 * PAIR>(words),
          centred_codes<RATE, BOOK, 2 * PAIR + 1>(words))),
   ...);
}

// `count` tiles that are `stride` words apart to bfloat16 [count, 8, 16, 2]: pairs of rows, of which each is of 16 columns. `decoder`
// of `rotation.h` is compiled without AVX512-BF16, and could not take this inline.
template <int RATE, int BOOK>
static void decode_column(const int16_t* tile, int64_t stride, int64_t ahead, int64_t count, uint16_t* to) {
  for (; count > 0; --count, tile += stride, to += TILE_SIZE) {
    prefetch<16 * RATE>(tile + ahead);
    decode_pairs<RATE, BOOK>(tile, to, std::make_integer_sequence<int, TILE / 2>());
  }
}

using ColumnDecoder = void (*)(const int16_t*, int64_t, int64_t, int64_t, uint16_t*);

template <int... I>
static ColumnDecoder column_decoder(const Trellis& trellis, std::integer_sequence<int, I...>) {
  static constexpr ColumnDecoder DECODERS[][NUM_CODEBOOKS] = {
      {decode_column<RATES[I], THREE_INST>, decode_column<RATES[I], MCG>, decode_column<RATES[I], MUL1>}...};
  return DECODERS[rate_index(trellis.twice_bits)][trellis.codebook];
}

// The sums [16 GROUPS, 32] of some blocks, added to those that there are, except for the first.
template <int GROUPS>
EXL3_NOINLINE static void multiply_groups(const MatrixCall& call, int64_t group, int64_t block, int blocks,
                                          const uint16_t* weights, float* sums) {
  asm volatile("" ::: "memory");  // compilers do not know what these instructions read
  const long stride = long(call.stride * sizeof *sums);
  float* lower = sums + MATRIX_ROWS * call.stride;
  if (block == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + TILE, stride);
    if constexpr (GROUPS == 2) _tile_loadd(2, lower, stride);
    if constexpr (GROUPS == 2) _tile_loadd(3, lower + TILE, stride);
  }
  const uint16_t* inputs = call.inputs + block * call.block_stride + group * STEPS * REGISTER;
  const uint16_t* others = weights + blocks * STEPS * REGISTER;
  for (int i = 0; i < blocks; ++i, inputs += call.block_stride)
    for (int step = 0; step < STEPS; ++step, weights += REGISTER, others += REGISTER) {
      _tile_loadd(4, inputs + step * REGISTER, LINE_BYTES);
      _tile_loadd(6, weights, LINE_BYTES);
      _tile_loadd(7, others, LINE_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (GROUPS == 2) {
        _tile_loadd(5, inputs + (STEPS + step) * REGISTER, LINE_BYTES);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + TILE, stride);
  if constexpr (GROUPS == 2) _tile_stored(2, lower, stride);
  if constexpr (GROUPS == 2) _tile_stored(3, lower + TILE, stride);
  asm volatile("" ::: "memory");
}

static void multiply_matrices(const MatrixCall& call) {
  alignas(64) uint16_t weights[2 * PANEL * BLOCK * TILE];
  const Trellis& all = call.trellis;
  const ColumnDecoder decode = column_decoder(all, std::make_integer_sequence<int, NUM_RATES>());
  _tile_loadconfig(&LAYOUT);
  for (int64_t block = 0, blocks = all.in_tiles / BLOCK_TILES; block < blocks; block += PANEL) {
    const int count = int(std::min<int64_t>(PANEL, blocks - block)), tiles = count * BLOCK_TILES;
    for (int64_t column = 0; column < call.width; column += 2) {
      const int16_t* tile = all.data + column * all.column_stride + block * BLOCK_TILES * all.row_stride;
      const int64_t next = column + 2 < call.width ? 2 * all.column_stride : tiles * all.row_stride - column * all.column_stride;
      for (int i = 0; i < 2; ++i)
        decode(tile + i * all.column_stride, all.row_stride, next, tiles, weights + i * tiles * TILE_SIZE);
      for (int64_t group = 0; group < call.groups; group += 2) {
        float* sums = call.sums + group * MATRIX_ROWS * call.stride + column * TILE;
        if (group + 1 < call.groups) multiply_groups<2>(call, group, block, count, weights, sums);
        else multiply_groups<1>(call, group, block, count, weights, sums);
      }
    }
  }
  _tile_release();
}

// 128 numbers of a row to the four registers that its row is in. Returns the sum of what they are rounded to.
static float arrange_matrix_row(const float* block, uint16_t* to) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < BLOCK; i += DEPTH, to += REGISTER) {
    Integers both = Integers(_mm512_cvtne2ps_pbh(_mm512_load_ps(block + i + TILE), _mm512_load_ps(block + i)));
    _mm512_store_si512(to, both);
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000)))));
  }
  return _mm512_reduce_add_ps(sum);
}

// 12 rows take as long as by `rows_pairs.h`, 16 are 1.15 times as fast.
constexpr Matrices MATRICES{MATRIX_ROWS, arrange_matrix_row, multiply_matrices};
