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

// What `linear.h` and `dense.h` are built from, in plain C++ whose loops compilers turn into vectors.

// Which words of a stream a state stands in: `pairs[first] >> right`, where `pairs` are words with the ones after them.
template <int RATE>
struct StatePlaces {
  uint8_t first[TILE_SIZE] = {}, right[TILE_SIZE] = {};

  constexpr StatePlaces() {
    for (int place = 0; place < TILE_SIZE; ++place) {
      int end = RATE * (place / 8 * 8 + LANE_ORDER[place % 8] + 1) / 2, words = 8 * RATE;
      first[place] = uint8_t((end / 16 + words - 1) % words), right[place] = uint8_t(16 - end % 16);
    }
  }
};
template <int RATE>
constexpr StatePlaces<RATE> STATE_PLACES{};

static inline int32_t half_of(uint32_t bits) {
  int32_t magnitude = int32_t((bits & 0x3FF) ^ (MANTISSA_FLIPS | HIDDEN_BIT)) << ((bits >> 10 & 3) ^ 2);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <int RATE, int BOOK>
static void decode_tile(const int16_t* tile, int16_t* codes) {
  constexpr int WORDS = 8 * RATE;
  uint32_t pairs[WORDS], products[TILE_SIZE];
  for (int i = 0; i < WORDS; ++i)
    pairs[i] = uint32_t(uint16_t(tile[i ^ 1])) << 16 | uint16_t(tile[((i + 1) % WORDS) ^ 1]);
  for (int i = 0; i < TILE_SIZE; ++i)
    products[i] = (pairs[STATE_PLACES<RATE>.first[i]] >> STATE_PLACES<RATE>.right[i] & 0xFFFF) * MULTIPLIERS[BOOK];
  for (int i = 0; i < TILE_SIZE; ++i) {
    uint32_t bits = products[i] + (BOOK == THREE_INST ? THREE_INST_ADDEND : 0);
    if (BOOK == MUL1) {
      uint32_t sums = (bits & 0xFF00FF) + (bits >> 8 & 0xFF00FF);
      codes[i] = int16_t((sums & 0xFFFF) + (sums >> 16));
    } else {
      codes[i] = int16_t(half_of(bits & 0xFFFF) + half_of(bits >> 16));
    }
  }
}

EXL3_NOINLINE static void add_products(const int16_t* codes, const int16_t* inputs, int32_t* sums) {
  int32_t total[TILE_SIZE / 2] = {};
  for (int tile = 0; tile < BLOCK_TILES; ++tile, codes += TILE_SIZE, inputs += 32)
    for (int part = 0; part < TILE_SIZE; part += 32)
      for (int i = 0; i < 16; ++i)
        total[part / 2 + i] +=
            codes[part + 2 * i] * inputs[2 * i] + codes[part + 2 * i + 1] * inputs[2 * i + 1];
  std::memcpy(sums, total, sizeof total);
}

template <typename Value>
static inline void store_values(const int16_t* codes, CodeUnits units, Value* to) {
  for (int i = 0; i < TILE; ++i) from_float(from_half(to_half(float(codes[i]) * units.step + units.start)), to + i);
}
