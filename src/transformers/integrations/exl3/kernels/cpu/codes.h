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

// Tiles to the codes that they hold, on the vectors of an instruction set: `format.decode` up to what a code stands for.

template <int BOOK>
static inline Integers product_of(Integers states) {
  Integers product = multiply(states, MULTIPLIERS[BOOK]);
  return BOOK == THREE_INST ? add(product, THREE_INST_ADDEND) : product;
}

template <int RATE, int BOOK>
static inline Integers codes_of(Integers states) {
  Integers product = product_of<BOOK>(states);
  if constexpr (BOOK == MUL1) return sum_bytes(product);
  return sum_halves(product);
}

template <int RATE, int BOOK, int... VECTOR>
static inline void decode_vectors(const int16_t* tile, int16_t* codes, std::integer_sequence<int, VECTOR...>) {
  EvenAndOdd pairs;
  ((pairs = states<RATE, VECTOR, BOOK>(tile),
    store_codes(codes + VECTOR * CODES, codes_of<RATE, BOOK>(pairs.even), codes_of<RATE, BOOK>(pairs.odd))),
   ...);
}

template <int RATE, int BOOK>
static inline void decode_tile(const int16_t* tile, int16_t* codes) {
  decode_vectors<RATE, BOOK>(tile, codes, std::make_integer_sequence<int, TILE_SIZE / CODES>());
}
