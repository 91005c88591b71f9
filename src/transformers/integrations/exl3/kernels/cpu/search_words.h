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

// Integer costs: 8-bit ones for rates of up to 4 bits, of which a vector holds four times as many nodes as of fp32, and
// 16-bit ones above. Values and weights are 16-bit fixed-point numbers. Sums saturate; a cost that has done so stays so.

#if defined(EXL3_X86)
#if EXL3_LANES == 16
#define EXL3_SIMD(name) _mm512_##name
using Integers = __m512i;
#elif EXL3_LANES == 8
#define EXL3_SIMD(name) _mm256_##name
using Integers = __m256i;
#else
#define EXL3_SIMD(name) _mm_##name
using Integers = __m128i;
#endif

static inline Integers load_integers(const void* from) {
  Integers integers;
  std::memcpy(&integers, from, sizeof integers);
  return integers;
}

struct Bytes {
  Integers lanes;
  static constexpr int LANES = sizeof(Integers), SATURATED = 255;

  static Bytes splat(uint8_t byte) { return {EXL3_SIMD(set1_epi8)(char(byte))}; }

  static Bytes sum(Bytes one, Bytes other) { return {EXL3_SIMD(adds_epu8)(one.lanes, other.lanes)}; }

  static Bytes cheaper(Bytes one, Bytes other) { return {EXL3_SIMD(min_epu8)(one.lanes, other.lanes)}; }

  // What the values at `arranged` cost. Packing takes 8 words of either vector in turn, hence the order of `place`.
  static Bytes metric(const int16_t* arranged, int16_t weight) {
    const Integers all = EXL3_SIMD(set1_epi16)(weight);
    Integers low = EXL3_SIMD(subs_epi16)(load_integers(arranged), all);
    Integers high = EXL3_SIMD(subs_epi16)(load_integers(arranged + LANES / 2), all);
    return {EXL3_SIMD(packus_epi16)(EXL3_SIMD(mulhi_epi16)(low, low), EXL3_SIMD(mulhi_epi16)(high, high))};
  }

  // The lane that the value at `arranged[i]` is for.
  static constexpr int place(int i) { return i % (LANES / 2) / 8 * 16 + i / (LANES / 2) * 8 + i % 8; }

  // `cost - offset`, and what is saturated stays so.
  static Bytes less_offset(Bytes cost, Bytes offset) {
    Integers less = EXL3_SIMD(subs_epu8)(cost.lanes, offset.lanes);
#if EXL3_LANES == 16
    return {_mm512_mask_mov_epi8(less, _mm512_cmpeq_epi8_mask(cost.lanes, splat(SATURATED).lanes), cost.lanes)};
#elif EXL3_LANES == 8
    return {_mm256_or_si256(less, _mm256_cmpeq_epi8(cost.lanes, splat(SATURATED).lanes))};
#else
    return {_mm_or_si128(less, _mm_cmpeq_epi8(cost.lanes, splat(SATURATED).lanes))};
#endif
  }

  // Lane i gets the byte `from[i >> D]`.
  template <int D, int... I>
  static Bytes spread(const uint8_t* from, std::integer_sequence<int, I...>) {
#if EXL3_LANES == 16 && EXL3_VNNI
    if constexpr (D == 1) {
      alignas(64) static constexpr uint8_t places[] = {(I >> D)...};
      __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return {_mm512_permutexvar_epi8(load_integers(places), _mm512_castsi256_si512(half))};
    }
#elif EXL3_LANES == 16
    if constexpr (D == 1) {
      alignas(64) static constexpr uint8_t places[] = {(I & 14)...};
      __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      return {_mm512_shuffle_epi8(_mm512_cvtepu8_epi16(half), load_integers(places))};
    }
#endif
    alignas(64) [[maybe_unused]] static constexpr uint8_t places[] = {(I >> D)...};
    __m128i source = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
#if EXL3_LANES == 16
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(source), load_integers(places))};
#elif EXL3_LANES == 8
    return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(source), load_integers(places))};
#else
    for (int i = 0; i < D; ++i) source = _mm_unpacklo_epi8(source, source);
    return {source};
#endif
  }
};

struct Words16 {
  Integers lanes;
  static constexpr int LANES = sizeof(Integers) / 2, SATURATED = MAX_DIFFERENCE * MAX_DIFFERENCE;

  static Words16 splat(uint16_t word) { return {EXL3_SIMD(set1_epi16)(int16_t(word))}; }

  static Words16 sum(Words16 one, Words16 other) { return {EXL3_SIMD(adds_epu16)(one.lanes, other.lanes)}; }

  static Words16 cheaper(Words16 one, Words16 other) {
#if EXL3_LANES > 4
    return {EXL3_SIMD(min_epu16)(one.lanes, other.lanes)};
#else
    return {_mm_sub_epi16(one.lanes, _mm_subs_epu16(one.lanes, other.lanes))};
#endif
  }

  static Words16 metric(const int16_t* arranged, int16_t weight) {
    Integers difference = EXL3_SIMD(subs_epi16)(load_integers(arranged), EXL3_SIMD(set1_epi16)(weight));
#if EXL3_LANES > 4
    difference = EXL3_SIMD(min_epu16)(EXL3_SIMD(abs_epi16)(difference), EXL3_SIMD(set1_epi16)(MAX_DIFFERENCE));
#else
    difference = _mm_max_epi16(difference, _mm_subs_epi16(_mm_setzero_si128(), difference));
    difference = _mm_min_epi16(difference, _mm_set1_epi16(MAX_DIFFERENCE));
#endif
    return {EXL3_SIMD(mullo_epi16)(difference, difference)};
  }

  static constexpr int place(int i) { return i; }

  static Words16 less_offset(Words16 cost, Words16 offset) {
    Integers less = EXL3_SIMD(subs_epu16)(cost.lanes, offset.lanes);
#if EXL3_LANES == 16
    return {_mm512_mask_mov_epi16(less, _mm512_cmpeq_epi16_mask(cost.lanes, splat(SATURATED).lanes), cost.lanes)};
#elif EXL3_LANES == 8
    return {_mm256_blendv_epi8(less, cost.lanes, _mm256_cmpeq_epi16(cost.lanes, splat(SATURATED).lanes))};
#else
    Integers saturated = _mm_cmpeq_epi16(cost.lanes, splat(SATURATED).lanes);
    return {_mm_or_si128(_mm_and_si128(saturated, cost.lanes), _mm_andnot_si128(saturated, less))};
#endif
  }

  template <int D, int... I>
  static Words16 spread(const uint16_t* from, std::integer_sequence<int, I...>) {
    static_assert(1 << D >= LANES, "from one node");
    return splat(*from);
  }
};
#undef EXL3_SIMD
#else
// 16 bytes in operations that GCC and Clang have for every machine, or one number after the other.
#if defined(EXL3_VECTORS)
typedef uint8_t Vector8 __attribute__((vector_size(16)));
typedef uint16_t Vector16 __attribute__((vector_size(16)));
typedef int16_t Signed16 __attribute__((vector_size(16)));

// The differences of 8 values from a weight, without sign, up to `largest`.
static inline Vector16 differences(const int16_t* values, int16_t weight, uint16_t largest) {
  Signed16 value, all = weight - Signed16{};
  std::memcpy(&value, values, sizeof value);
  Vector16 difference = value > all ? (Vector16)value - (Vector16)all : (Vector16)all - (Vector16)value;
  return difference < largest ? difference : largest - Vector16{};
}

static inline void compute_metric(const int16_t* arranged, int16_t weight, Vector16& squares) {
  Vector16 difference = differences(arranged, weight, MAX_DIFFERENCE);
  squares = difference * difference;
}

static inline void compute_metric(const int16_t* arranged, int16_t weight, Vector8& squares) {
  Vector16 half[2];
  for (int i = 0; i < 2; ++i) {
    // (16 a + b)^2 >> 16 in 16 bits; more than 4095 would be more than 255.
    Vector16 difference = differences(arranged + 8 * i, weight, 4095), a = difference >> 4, b = difference & 15;
    half[i] = (a * a + ((a * b + (b * b >> 5)) >> 3)) >> 8;
  }
  squares = (Vector8)(half[0] | half[1] << 8);
}

template <class Cost, class Costs>
struct Lanes {
  static constexpr int LANES = 16 / sizeof(Cost), SATURATED = sizeof(Cost) == 1 ? 255 : MAX_DIFFERENCE * MAX_DIFFERENCE;
  Costs lanes;

  static Lanes splat(Cost cost) { return {cost - Costs{}}; }

  static Lanes sum(Lanes one, Lanes other) {
    Costs wrapped = one.lanes + other.lanes;
    return {wrapped | (Costs)(wrapped < one.lanes)};
  }

  static Lanes cheaper(Lanes one, Lanes other) { return {one.lanes < other.lanes ? one.lanes : other.lanes}; }

  static Lanes metric(const int16_t* arranged, int16_t weight) {
    Lanes all;
    compute_metric(arranged, weight, all.lanes);
    return all;
  }

  // 16-bit halves make bytes of two vectors in turn.
  static constexpr int place(int i) { return sizeof(Cost) == 2 ? i : i % 8 * 2 + i / 8; }

  static Lanes less_offset(Lanes cost, Lanes offset) {
    Costs less = cost.lanes - cheaper(cost, offset).lanes;
    return {cost.lanes == splat(SATURATED).lanes ? cost.lanes : less};
  }

  template <int D, int... I>
  static Lanes spread(const Cost* from, std::integer_sequence<int, I...>) {
    if constexpr (1 << D >= LANES) return splat(*from);
    Costs source;
    std::memcpy(&source, from, sizeof source);
#if defined(__clang__)
    return {__builtin_shufflevector(source, source, (I >> D)...)};
#else
    return {__builtin_shuffle(source, Costs{Cost(I >> D)...})};
#endif
  }
};
#else
template <class Cost, class>
struct Lanes {
  static constexpr int LANES = 16 / sizeof(Cost), SATURATED = sizeof(Cost) == 1 ? 255 : MAX_DIFFERENCE * MAX_DIFFERENCE;
  Cost lanes[LANES];

  static Lanes splat(Cost cost) {
    Lanes all;
    for (Cost& lane : all.lanes) lane = cost;
    return all;
  }

  static Lanes sum(Lanes one, Lanes other) {
    for (int i = 0; i < LANES; ++i) {
      int total = one.lanes[i] + other.lanes[i];
      one.lanes[i] = Cost(total < Cost(-1) ? total : Cost(-1));
    }
    return one;
  }

  static Lanes cheaper(Lanes one, Lanes other) {
    for (int i = 0; i < LANES; ++i) one.lanes[i] = one.lanes[i] < other.lanes[i] ? one.lanes[i] : other.lanes[i];
    return one;
  }

  static Lanes metric(const int16_t* arranged, int16_t weight) {
    Lanes all;
    for (int i = 0; i < LANES; ++i) all.lanes[i] = squared_difference<Cost>(arranged[i], weight);
    return all;
  }

  static constexpr int place(int i) { return i; }

  static Lanes less_offset(Lanes cost, Lanes offset) {
    for (int i = 0; i < LANES; ++i)
      if (cost.lanes[i] != SATURATED) cost.lanes[i] -= cheaper(cost, offset).lanes[i];
    return cost;
  }

  template <int D, int... I>
  static Lanes spread(const Cost* from, std::integer_sequence<int, I...>) {
    return {{from[I >> D]...}};
  }
};
typedef void Vector8;
typedef void Vector16;
#endif
using Bytes = Lanes<uint8_t, Vector8>;
using Words16 = Lanes<uint16_t, Vector16>;
#endif

// What values cost by their words.
template <class Vectors>
struct Computed {
  typedef int16_t Arranged;
  static constexpr int HEAD = 0;
  int16_t weight;

  Computed() = default;
  Computed(const Arranged*, int16_t weight) : weight(weight) {}
  Vectors at(const Arranged* arranged) const { return Vectors::metric(arranged, weight); }

  template <class Place>
  static void arrange(const int16_t* values, const int16_t*, Arranged* arranged, const Place& state) {
    for (int i = 0; i < NUM_STATES; ++i) arranged[i] = values[state(i, Vectors::place(i % Vectors::LANES))];
  }
};

#if EXL3_LANES == 16 && EXL3_VNNI
// What values of few levels cost, looked up by the numbers of these. The levels stand before the numbers.
struct LookedUp {
  typedef uint8_t Arranged;
  static constexpr int HEAD = NUM_LEVELS * sizeof(int16_t);
  Integers low, high;

  LookedUp() = default;
  LookedUp(const Arranged* arranged, int16_t weight) {
    const int16_t* levels = reinterpret_cast<const int16_t*>(arranged);
    low = Bytes::metric(levels, weight).lanes;
    high = Bytes::metric(levels + Bytes::LANES, weight).lanes;
  }
  Bytes at(const Arranged* arranged) const {
    return {_mm512_permutex2var_epi8(low, load_integers(arranged), high)};
  }

  template <class Place>
  static void arrange(const int16_t* values, const int16_t* levels, Arranged* arranged, const Place& state) {
    int16_t* head = reinterpret_cast<int16_t*>(arranged);
    for (int i = 0; i < NUM_LEVELS; ++i)
      head[i] = levels[i / Bytes::LANES * Bytes::LANES + Bytes::place(i % Bytes::LANES)];
    for (int i = 0; i < NUM_STATES; ++i)
      arranged[HEAD + i] =
          uint8_t(std::lower_bound(levels, levels + NUM_LEVELS, values[state(i, i % Bytes::LANES)]) - levels);
  }
};
#endif

template <class Vectors, class Number, class Metrics = Computed<Vectors>>
struct IntegerCosts {
  typedef int16_t Value;
  typedef typename Metrics::Arranged Arranged;
  typedef Number Cost;
  static constexpr int LANES = Vectors::LANES, KEPT_BITS = 4;
  static constexpr Cost UNREACHED = Vectors::SATURATED;

  static Cost extended(Cost cost, Value value, Value weight) {
    int total = cost + squared_difference<Cost>(value, weight);
    return Cost(total < UNREACHED ? total : UNREACHED);
  }

  static Cost renormalized(Cost cost, Cost offset) {
    return Cost(cost == UNREACHED ? cost : cost < offset ? 0 : cost - offset);
  }

  static constexpr int ARRANGED = Metrics::HEAD + NUM_STATES;

  // `values`, in the order in which `step` reads them.
  template <int C>
  static void arrange(const Value* values, const Value* levels, Arranged* arranged) {
    constexpr int NODES = NUM_STATES >> C;
    Metrics::arrange(values, levels, arranged, [](int i, int lane) {
      int block = i / LANES;
      return block % (1 << C) * NODES + block / (1 << C) * LANES + lane;
    });
  }

  // One step of TILES tiles: `old_costs` and `new_costs` hold a row a tile, STRIDE apart, and the offsets are their least.
  template <int D, int C, int TILES, int STRIDE>
  static void step(const Arranged* arranged, const Value* weights, const Cost* old_costs, const Cost* old_offsets,
                   Cost* new_costs, Cost* new_offsets) {
    constexpr int NODES = NUM_STATES >> C, PART = 16 - D - C;
    constexpr auto LANE_NUMBERS = std::make_integer_sequence<int, LANES>();
    Metrics metrics[TILES];
    for (int tile = 0; tile < TILES; ++tile) metrics[tile] = Metrics(arranged, weights[tile]);
    arranged += Metrics::HEAD;
    Vectors least[TILES];
    for (Vectors& vector : least) vector = Vectors::splat(UNREACHED);
    for (int node = 0; node < NODES; node += LANES) {
      Vectors best[TILES];
      for (Vectors& vector : best) vector = Vectors::splat(UNREACHED);
      const Cost* from = old_costs + (node >> D);
#pragma GCC unroll 4
      for (int j = 0; j < 1 << C; ++j) {
        for (int tile = 0; tile < TILES; ++tile) {
          Vectors start = Vectors::template spread<D>(from + tile * STRIDE, LANE_NUMBERS);
          best[tile] = Vectors::cheaper(best[tile], Vectors::sum(start, metrics[tile].at(arranged)));
        }
        from += Row<C, D, Cost>::at(1 << PART);
        arranged += LANES;
      }
      for (int tile = 0; tile < TILES; ++tile) {
        Vectors cost = Vectors::less_offset(best[tile], Vectors::splat(old_offsets[tile]));
        least[tile] = Vectors::cheaper(least[tile], cost);
        std::memcpy(new_costs + tile * STRIDE + Row<D, C, Cost>::at(node), &cost, sizeof cost);
      }
    }
    for (int tile = 0; tile < TILES; ++tile) {
      Cost lanes[LANES];
      std::memcpy(lanes, &least[tile], sizeof lanes);
      new_offsets[tile] = *std::min_element(lanes, lanes + LANES);
    }
  }
};
using U8 = IntegerCosts<Bytes, uint8_t>;
using U16 = IntegerCosts<Words16, uint16_t>;
#if EXL3_LANES == 16 && EXL3_VNNI
using Coarse = IntegerCosts<Bytes, uint8_t, LookedUp>;
#else
using Coarse = U8;  // no instruction looks up so many bytes: computing what they cost gives the same
#endif
