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

// fp32 costs: each operation rounded, a vector's lanes are neighbouring nodes, and nothing is ever added across lanes.

#if EXL3_LANES > 1
typedef float Vector __attribute__((vector_size(4 * EXL3_LANES)));
typedef int32_t Indices __attribute__((vector_size(4 * EXL3_LANES)));
#else
typedef float Vector;
#endif

static inline Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

static inline void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

static inline Vector splat(float value) { return value - Vector{}; }

#if EXL3_LANES > 1
// Lane i gets the vector's lane (i >> D) + BACK.
template <int D, int BACK, int... I>
static inline Vector spread(Vector vector, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(vector, vector, ((I >> D) + BACK)...);
#else
  return __builtin_shuffle(vector, Indices{((I >> D) + BACK)...});
#endif
}
#endif

// The costs that nodes FIRST ... FIRST + LANES - 1 start from, where `from` is the one that node 0 does. May read up to
// LANES floats past them and up to 4 before.
template <int D, int FIRST>
static inline Vector start_costs(const float* from) {
#if EXL3_LANES > 1
  // AVX2 moves lanes within its halves in one operation, across them in two: load so that each half has what it needs.
  constexpr int BACK = EXL3_LANES == 8 ? 4 - (4 >> D) : 0;
  if constexpr ((1 << D) < EXL3_LANES)
    return spread<D, BACK>(load(from + (FIRST >> D) - BACK), std::make_integer_sequence<int, EXL3_LANES>());
#endif
  return splat(from[FIRST >> D]);
}

// The smaller of two costs. Floats that are not negative are ordered as their bits are, and processors compare integers on
// more units than they add floats on.
static inline Vector cheaper(Vector one, Vector other) {
#if EXL3_LANES > 4
  return (Vector)((Indices)one < (Indices)other ? (Indices)one : (Indices)other);
#else
  return one < other ? one : other;
#endif
}

// The costs of nodes I * EXL3_LANES ... of a tile by way of one choice.
template <int D, int... I>
static inline void extend(const float* from, const Vector* value, Vector weight, Vector* cost,
                          std::integer_sequence<int, I...>) {
  ((cost[I] = start_costs<D, I * EXL3_LANES>(from) + (value[I] - weight) * (value[I] - weight)), ...);
}

struct Fp32 {
  typedef float Value;
  typedef float Arranged;
  typedef float Cost;
  static constexpr int LANES = EXL3_LANES, WIDTH = 2, KEPT_BITS = 8, ARRANGED = NUM_STATES;
  static constexpr Cost UNREACHED = INFINITY;

  static Cost extended(Cost cost, Value value, Value weight) { return cost + (value - weight) * (value - weight); }

  static Cost renormalized(Cost cost, Cost) { return cost; }

  // `values`, in the order in which `step` reads them.
  template <int C>
  static void arrange(const Value* values, const Value*, Arranged* arranged) {
    constexpr int NODES = NUM_STATES >> C;
    for (int node = 0; node < NODES; node += WIDTH * LANES)
      for (int j = 0; j < 1 << C; ++j)
        for (int i = 0; i < WIDTH * LANES; ++i) *arranged++ = values[j * NODES + node + i];
  }

  // One step of TILES tiles: `old_costs` and `new_costs` hold a row a tile, STRIDE apart. fp32 needs no offsets.
  template <int D, int C, int TILES, int STRIDE>
  static void step(const Value* arranged, const Value* weights, const Cost* old_costs, const Cost*, Cost* new_costs, Cost*) {
    constexpr int NODES = NUM_STATES >> C, PART = 16 - D - C;
    constexpr auto VECTORS = std::make_integer_sequence<int, WIDTH>();
    Vector weight[TILES];
    for (int tile = 0; tile < TILES; ++tile) weight[tile] = splat(weights[tile]);
    for (int node = 0; node < NODES; node += WIDTH * LANES) {
      Vector best[TILES][WIDTH], cost[WIDTH];
      for (auto& bests : best)
        for (Vector& vector : bests) vector = splat(UNREACHED);
      const Cost* from = old_costs + (node >> D);
#pragma GCC unroll 1
      for (int j = 0; j < 1 << C; ++j) {
        Vector value[WIDTH];
        for (int i = 0; i < WIDTH; ++i) value[i] = load(arranged + i * LANES);
        for (int tile = 0; tile < TILES; ++tile) {
          extend<D>(from + tile * STRIDE, value, weight[tile], cost, VECTORS);
          for (int i = 0; i < WIDTH; ++i) best[tile][i] = cheaper(cost[i], best[tile][i]);
        }
        from += Row<C, D, Cost>::at(1 << PART);
        arranged += WIDTH * LANES;
      }
      for (int tile = 0; tile < TILES; ++tile)
        for (int i = 0; i < WIDTH; ++i)
          store(new_costs + tile * STRIDE + Row<D, C, Cost>::at(node + i * LANES), best[tile][i]);
    }
  }
};
