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

// The blockwise rotation: `hadamard` of format.py in the same fp32 operations, and rows that are scaled on both sides of
// it. Before it the choice of a decoder, which everything else needs.

using Decoder = void (*)(const int16_t* tile, int64_t stride, int64_t ahead, int count, int16_t* codes);

constexpr int PREFETCHED = 40;  // tiles ahead: about 300 ns, what memory takes

// The order of a tile's codes in memory that `decode_tile` gives them, which is that of its stream but for `LANE_ORDER`.
struct StreamOrder {
  template <int RATE, int BOOK>
  static inline void decode(const int16_t* tile, int16_t* codes) { decode_tile<RATE, BOOK>(tile, codes); }
};

// `count` tiles that are `stride` words apart to their codes [count, 256]. What is `ahead` words on is fetched.
template <class Order, int RATE, int BOOK>
static void decode_tiles(const int16_t* tile, int64_t stride, int64_t ahead, int count, int16_t* codes) {
  for (int i = 0; i < count; ++i) {
    prefetch<32 * RATE / 2>(tile + i * stride + ahead);
    Order::template decode<RATE, BOOK>(tile + i * stride, codes + i * TILE_SIZE);
  }
}

template <class Order, int BOOK, int... I>
static Decoder decoder(int rate, std::integer_sequence<int, I...>) {
  static constexpr Decoder DECODERS[] = {decode_tiles<Order, RATES[I], BOOK>...};
  return DECODERS[rate];
}

template <class Order = StreamOrder>
static Decoder decoder(int twice_bits, int codebook) {
  constexpr auto ALL = std::make_integer_sequence<int, NUM_RATES>();
  int rate = rate_index(twice_bits);
  if (codebook == MUL1) return decoder<Order, MUL1>(rate, ALL);
  return codebook == MCG ? decoder<Order, MCG>(rate, ALL) : decoder<Order, THREE_INST>(rate, ALL);
}

#if EXL3_LANES > 1
typedef float Real __attribute__((vector_size(4 * EXL3_LANES)));
typedef int32_t Places __attribute__((vector_size(4 * EXL3_LANES)));
#else
typedef float Real;
#endif
constexpr int REALS = BLOCK / EXL3_LANES;  // vectors in a block

static inline Real load_real(const float* from) {
  Real vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

static inline void store_real(float* to, Real vector) { std::memcpy(to, &vector, sizeof vector); }

#if EXL3_LANES > 1
// Butterflies between lanes HALF apart: the lower one gets the sum, the upper one the difference.
template <int HALF, int... I>
static inline Real butterfly(Real vector, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  Real other = __builtin_shufflevector(vector, vector, (I ^ HALF)...);
#else
  Real other = __builtin_shuffle(vector, Places{(I ^ HALF)...});
#endif
  return other + (Real)((Places)vector ^ Places{(I & HALF ? INT32_MIN : 0)...});
}
#endif

template <int HALF>
static inline void stage(Real (&block)[REALS]) {
  if constexpr (HALF >= EXL3_LANES) {
    constexpr int APART = HALF / EXL3_LANES;
    for (int i = 0; i < REALS; ++i) {
      if (i & APART) continue;
      Real low = block[i], high = block[i + APART];
      block[i] = low + high;
      block[i + APART] = low - high;
    }
  } else {
#if EXL3_LANES > 1
    for (Real& vector : block) vector = butterfly<HALF>(vector, std::make_integer_sequence<int, EXL3_LANES>());
#endif
  }
}

static inline void rotate(float* data) {
  Real block[REALS];
  for (int i = 0; i < REALS; ++i) block[i] = load_real(data + i * EXL3_LANES);
  stage<1>(block);
  stage<2>(block);
  stage<4>(block);
  stage<8>(block);
  stage<16>(block);
  stage<32>(block);
  stage<64>(block);
  for (int i = 0; i < REALS; ++i) store_real(data + i * EXL3_LANES, block[i] * HADAMARD_SCALE);
}

template <typename Value>
static inline void read(const void* data, int64_t offset, int count, float* to) {
  const Value* from = static_cast<const Value*>(data) + offset;
  for (int i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

template <typename Value>
static inline void write(void* data, int64_t offset, int count, const float* from) {
  Value* to = static_cast<Value*>(data) + offset;
  for (int i = 0; i < count; ++i) from_float(from[i], to + i);
}

// How many of `features` are in a block.
static inline int left_of(int64_t features, int64_t block) {
  int64_t left = features - block * BLOCK;
  return int(left < BLOCK ? left : BLOCK);
}

// A block of a row that has `features`, zeros beyond them.
static inline void read_block(const Rows& rows, int64_t row, int64_t block, int64_t features, float* to) {
  int64_t offset = row * rows.stride + block * BLOCK;
  int count = left_of(features, block);
  if (rows.dtype == FLOAT32) read<float>(rows.data, offset, count, to);
  if (rows.dtype == FLOAT16) read<Half>(rows.data, offset, count, to);
  if (rows.dtype == BFLOAT16) read<BFloat>(rows.data, offset, count, to);
  for (int i = count; i < BLOCK; ++i) to[i] = 0;
}

static inline void write_block(const Rows& rows, int64_t row, int64_t block, int64_t features, const float* from) {
  int64_t offset = row * rows.stride + block * BLOCK;
  int count = left_of(features, block);
  if (rows.dtype == FLOAT32) write<float>(rows.data, offset, count, from);
  if (rows.dtype == FLOAT16) write<Half>(rows.data, offset, count, from);
  if (rows.dtype == BFLOAT16) write<BFloat>(rows.data, offset, count, from);
}

// What a block is multiplied by, or what is added to it, of all rows alike. Where there is nothing, numbers that change none.
struct Operand {
  alignas(64) float data[BLOCK];

  static Operand factors(const Rows& scales, int64_t block) { return {scales, block, (block + 1) * BLOCK, 1.f}; }
  static Operand addends(const Rows& bias, int64_t block, int64_t features) { return {bias, block, features, -0.f}; }

 private:
  Operand(const Rows& from, int64_t block, int64_t features, float neutral) {
    if (from.data)
      read_block(from, 0, block, features, data);
    else
      std::fill_n(data, BLOCK, neutral);
  }
};

static inline void scale_block(const Operand& factors, float* data) {
  for (int i = 0; i < BLOCK; ++i) data[i] *= factors.data[i];
}

// The end of a product: rotate a block, scale it, add the bias, and write what is not padding.
static inline void finish_block(const Operand& factors, const Operand& addends, const Rows& y, int64_t row, int64_t block,
                                int64_t features, float* data) {
  rotate(data);
  for (int i = 0; i < BLOCK; ++i) data[i] = data[i] * factors.data[i] + addends.data[i];
  write_block(y, row, block, features, data);
}

static void rotate_rows(const RotateCall& call, int threads) {
  int64_t blocks = (call.in_features + BLOCK - 1) / BLOCK;
  for_each_index(call.rows * blocks, threads, [&](int64_t index) {
    int64_t row = index / blocks, block = index % blocks;
    alignas(64) float data[BLOCK];
    read_block(call.x, row, block, call.in_features, data);
    scale_block(Operand::factors(call.before, block), data);
    finish_block(Operand::factors(call.after, block), Operand::addends(call.bias, block, call.out_features), call.y, row, block,
                 call.out_features, data);
  });
}
