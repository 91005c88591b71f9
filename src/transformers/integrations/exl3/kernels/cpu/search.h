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

// The trellis search, compiled once for every instruction set. cpu.cpp includes this file inside a namespace of the
// instruction set's name, with EXL3_LANES floats in a vector. It does what `search.reference_kernel` defines.
//
// A step reads the costs of the nodes before it and writes those after it. A state's top C bits are the choice to make,
// its other bits the node after the step, and it comes from node `state >> D`:
//
//     cost'[node] = min over j of cost[state >> D] + (value[state] - weight)^2,  state = j << (16 - C) | node
//
// No back-pointers are written. Every few steps a row of costs is kept, and the traceback computes again, from the last
// kept row on, only the few nodes that lead to the node it stands on. What a cost is and how a step is computed stands in
// search_fp32.h and search_words.h.

// Where the cost of a node stands in a row: the parts of the row that a step reads side by side are kept apart by a
// cache line, since at a power of two they would all fall on the same lines of the cache.
template <int D, int C, class Cost>
struct Row {
  static constexpr int NODES = NUM_STATES >> C, PART = 16 - D - C;
  static constexpr int GAP = PART >= 6 ? LINE / sizeof(Cost) : 0;
  static constexpr int at(int node) { return node + (node >> PART) * GAP; }
};

// Costs in the longest row of a rate, with what a vector load may read beyond and what keeps tiles apart in the cache.
template <int D, int C, class Cost>
constexpr int ROW_STRIDE = Row<D, C, Cost>::at((NUM_STATES >> (D < C ? D : C)) - 1) + 1 + 2 * LINE / sizeof(Cost);

#include "search_fp32.h"
#include "search_words.h"

// The search at one rate: weights add EVEN and ODD bits of the stream in turn. TILES tiles share the values they read.
template <class Costs, int EVEN, int ODD, int TILES>
struct Search {
  typedef typename Costs::Value Value;
  typedef typename Costs::Cost Cost;
  typedef typename Costs::Arranged Arranged;
  static constexpr int STRIDE = std::max(ROW_STRIDE<EVEN, ODD, Cost>, ROW_STRIDE<ODD, EVEN, Cost>);
  static constexpr int KEEP = std::max(Costs::KEPT_BITS * 2 / (EVEN + ODD), 1);
  static constexpr int ROWS = (TILE_SIZE + KEEP - 1) / KEEP + 1;  // kept ones; two more take turns in between
  static constexpr size_t SCRATCH = (size_t(ROWS + 2) * TILES * STRIDE * sizeof(Cost) + LINE) / sizeof(float);
  static constexpr int START_NODES = NUM_STATES >> EVEN;

  const Value* values;
  const Arranged* arranged[2];  // for even and odd weights
  int window;
  Cost* scratch;
  Cost offsets[TILE_SIZE + 1][TILES];  // the least of a row, which the step from it subtracts from what it writes

  static constexpr int added(int t) { return t & 1 ? ODD : EVEN; }

  static constexpr int at(int t, int node) {
    return t & 1 ? Row<EVEN, ODD, Cost>::at(node) : Row<ODD, EVEN, Cost>::at(node);
  }

  // The costs before step `t`, counted from the start of the pass.
  Cost* row(int t) const {
    int index = t % KEEP == 0 ? t / KEEP : ROWS + (t & 1);
    return scratch + LINE / sizeof(Cost) + size_t(index) * TILES * STRIDE;
  }

  void forward(const Value* weights, int steps) {
    for (int tile = 0; tile < TILES; ++tile) offsets[0][tile] = 0;
    for (int t = 0; t < steps; ++t) {
      const Value* weight = weights + t * TILES;
      if (t & 1)
        Costs::template step<ODD, EVEN, TILES, STRIDE>(arranged[1], weight, row(t), offsets[t], row(t + 1), offsets[t + 1]);
      else
        Costs::template step<EVEN, ODD, TILES, STRIDE>(arranged[0], weight, row(t), offsets[t], row(t + 1), offsets[t + 1]);
    }
  }

  // From `node` after step `last - 1` back to the node before step `first`, a kept one. Writes the states between.
  // `saturated` is set where the traceback cannot be told.
  int back(const Value* weights, int tile, int first, int last, int node, int32_t* states, bool& saturated) const {
    Cost costs[1 << MAX_CONE_BITS], bests[MAX_KEPT][1 << MAX_CONE_BITS];
    uint8_t choices[MAX_KEPT][1 << MAX_CONE_BITS];
    // The nodes before step t that lead to `node` differ in their top `open[t - first]` bits.
    int open[MAX_KEPT + 1];
    open[last - first] = 0;
    for (int t = last - 1; t >= first; --t) open[t - first] = open[t + 1 - first] + added(t + 1);
    int shift = 0;
    for (int t = first; t < last; ++t) shift += added(t);
    int width = 16 - added(first) - open[0];
    for (int p = 0; p < 1 << open[0]; ++p)
      costs[p] = row(first)[tile * STRIDE + at(first, (p << width) | (node >> shift))];
    for (int t = first; t < last; ++t) {
      shift -= added(t);
      int bits = open[t + 1 - first], choice_bits = added(t + 1);
      Value weight = weights[t * TILES + tile];
      for (int p = 0; p < 1 << bits; ++p) {
        int after = (p << (16 - choice_bits - bits)) | (node >> shift);
        Cost best = Costs::UNREACHED;
        int choice = 0;
        for (int j = 0; j < 1 << choice_bits; ++j) {
          Cost cost = Costs::extended(costs[(j << bits) | p], values[(j << (16 - choice_bits)) | after], weight);
          if (cost < best) best = cost, choice = j;
        }
        choices[t - first][p] = uint8_t(choice);
        bests[t - first][p] = best;
        // Not read again: the entries of this p's other candidates come later or are done with.
        costs[p] = Costs::renormalized(best, offsets[t][tile]);
      }
    }
    for (int t = last - 1, p = 0; t >= first; --t) {
      int bits = open[t + 1 - first], choice = choices[t - first][p];
      saturated |= bests[t - first][p] == Costs::UNREACHED;
      states[t] = (choice << (16 - added(t + 1))) | node;
      node = states[t] >> added(t);
      p |= choice << bits;
    }
    return node;
  }

  int back_to(int stop, const Value* weights, int tile, int steps, int node, int32_t* states, bool& saturated) const {
    for (int last = steps; last > stop;) {
      int first = (last - 1) / KEEP * KEEP;
      node = back(weights, tile, first, last, node, states, saturated);
      last = first;
    }
    return node;
  }

  // The first of the cheapest nodes of a row before an even step.
  static int cheapest_node(const Cost* costs) {
    constexpr int PART = std::min(1 << Row<ODD, EVEN, Cost>::PART, START_NODES);
    Cost least = costs[0];
    int first = 0;
    for (int node = 0; node < START_NODES; node += PART) {
      const Cost* part = costs + at(0, node);
      Cost cheapest = part[0];
      for (int i = 1; i < PART; ++i) cheapest = cheapest < part[i] ? cheapest : part[i];
      if (cheapest < least) least = cheapest, first = node;
    }
    while (costs[at(0, first)] != least) ++first;
    return first;
  }

  // `tiles` holds TILES tiles, `states` gets theirs, and -1 for the first of a tile whose costs saturated.
  void run(const Value* tiles, int32_t* states) {
    Value weights[TILE_SIZE * TILES];
    int32_t path[TILE_SIZE];
    int boundary[TILES];
    bool saturated[TILES] = {};
    for (int t = 0; t < 2 * window; ++t)
      for (int tile = 0; tile < TILES; ++tile)
        weights[t * TILES + tile] = tiles[tile * TILE_SIZE + (TILE_SIZE - window + t) % TILE_SIZE];
    std::fill_n(row(0), size_t(TILES) * STRIDE, Cost(0));
    forward(weights, 2 * window);
    for (int tile = 0; tile < TILES; ++tile) {
      int cheapest = cheapest_node(row(2 * window) + tile * STRIDE);
      back_to(window, weights, tile, 2 * window, cheapest, path, saturated[tile]);
      boundary[tile] = path[window] >> EVEN;
    }
    for (int t = 0; t < TILE_SIZE; ++t)
      for (int tile = 0; tile < TILES; ++tile) weights[t * TILES + tile] = tiles[tile * TILE_SIZE + t];
    std::fill_n(row(0), size_t(TILES) * STRIDE, Costs::UNREACHED);
    for (int tile = 0; tile < TILES; ++tile) row(0)[tile * STRIDE + at(0, boundary[tile])] = 0;
    forward(weights, TILE_SIZE);
    for (int tile = 0; tile < TILES; ++tile) {
      int32_t* own = states + tile * TILE_SIZE;
      back_to(0, weights, tile, TILE_SIZE, boundary[tile], own, saturated[tile]);
      if (saturated[tile]) own[0] = -1;
    }
  }

  // A task of `parallel`: the search of tiles `group * TILES` on.
  static void run_group(const void* job, float* scratch, int64_t group) {
    const SearchJob& all = *static_cast<const SearchJob*>(job);
    Search search{static_cast<const Value*>(all.values),
                  {static_cast<const Arranged*>(all.arranged[0]), static_cast<const Arranged*>(all.arranged[1])},
                  all.window,
                  reinterpret_cast<Cost*>(scratch),
                  {}};
    int64_t first = group * TILES, left = all.count - first;
    const Value* source = static_cast<const Value*>(all.tiles) + first * TILE_SIZE;
    if (left >= TILES) return search.run(source, all.states + first * TILE_SIZE);
    Value tiles[TILES * TILE_SIZE] = {};
    int32_t states[TILES * TILE_SIZE];
    std::memcpy(tiles, source, left * TILE_SIZE * sizeof *tiles);
    search.run(tiles, states);
    std::memcpy(all.states + first * TILE_SIZE, states, left * TILE_SIZE * sizeof *states);
  }

  static void run_all(SearchJob job, int threads) {
    const Value *values = static_cast<const Value*>(job.values), *levels = static_cast<const Value*>(job.levels);
    Buffer<Arranged> even(Costs::ARRANGED), odd(EVEN == ODD ? 0 : Costs::ARRANGED);
    Costs::template arrange<ODD>(values, levels, even.data);
    if (EVEN != ODD) Costs::template arrange<EVEN>(values, levels, odd.data);
    job.arranged[0] = even.data;
    job.arranged[1] = EVEN == ODD ? even.data : odd.data;
    parallel(run_group, &job, (job.count + TILES - 1) / TILES, SCRATCH, threads);
  }
};

// `search(job, twice_bits, threads)` searches at the rate `twice_bits / 2`.
static void search(const SearchJob& job, int twice_bits, int threads) {
  if (job.levels) switch (twice_bits) {
    case 2: return Search<Coarse, 1, 1, 4>::run_all(job, threads);
    case 3: return Search<Coarse, 1, 2, 2>::run_all(job, threads);
    case 4: return Search<Coarse, 2, 2, 4>::run_all(job, threads);
    case 5: return Search<Coarse, 2, 3, 2>::run_all(job, threads);
    case 6: return Search<Coarse, 3, 3, 4>::run_all(job, threads);
    case 7: return Search<Coarse, 3, 4, 4>::run_all(job, threads);
    case 8: return Search<Coarse, 4, 4, 4>::run_all(job, threads);
  }
  if (job.are_words) switch (twice_bits) {
    case 2: return Search<U8, 1, 1, 2>::run_all(job, threads);
    case 3: return Search<U8, 1, 2, 2>::run_all(job, threads);
    case 4: return Search<U8, 2, 2, 2>::run_all(job, threads);
    case 5: return Search<U8, 2, 3, 2>::run_all(job, threads);
    case 6: return Search<U8, 3, 3, 4>::run_all(job, threads);
    case 7: return Search<U8, 3, 4, 4>::run_all(job, threads);
    case 8: return Search<U8, 4, 4, 4>::run_all(job, threads);
    case 10: return Search<U16, 5, 5, 4>::run_all(job, threads);
    case 12: return Search<U16, 6, 6, 4>::run_all(job, threads);
    case 14: return Search<U16, 7, 7, 4>::run_all(job, threads);
    case 16: return Search<U16, 8, 8, 4>::run_all(job, threads);
  }
  switch (twice_bits) {
    // Tiles searched together: as measured on Zen 3, where they share values and costs in cache.
    case 2: return Search<Fp32, 1, 1, 2>::run_all(job, threads);
    case 3: return Search<Fp32, 1, 2, 2>::run_all(job, threads);
    case 4: return Search<Fp32, 2, 2, 3>::run_all(job, threads);
    case 5: return Search<Fp32, 2, 3, 3>::run_all(job, threads);
    case 6: return Search<Fp32, 3, 3, 3>::run_all(job, threads);
    case 7: return Search<Fp32, 3, 4, 3>::run_all(job, threads);
    case 8: return Search<Fp32, 4, 4, 3>::run_all(job, threads);
    case 10: return Search<Fp32, 5, 5, 3>::run_all(job, threads);
    case 12: return Search<Fp32, 6, 6, 3>::run_all(job, threads);
    case 14: return Search<Fp32, 7, 7, 3>::run_all(job, threads);
    case 16: return Search<Fp32, 8, 8, 3>::run_all(job, threads);
  }
}
