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

// A block of the input times decoded codes, row by row, on what vectors_base.h has. rows_pairs.h does the same for many rows.

using RowsOrder = StreamOrder;        // of the codes
constexpr int GROUP = 1;              // rows of the input that are kept together
constexpr int SHARING = 48;           // groups that share the decoding
constexpr int COLUMNS = 1;            // of tiles, that they take at a time
constexpr int ROW_INPUTS = 32;        // inputs of a tile in the order of codes, twice: for a column and the one 8 on
constexpr ManyRows MANY_ROWS = NEVER;

constexpr int feature_of(int place) {
  int lane = place % ROW_INPUTS / LANE_CODES;
  return place / ROW_INPUTS * TILE + row_of(lane, LANE_ORDER[place % LANE_CODES]);
}

// The 128 inputs of row `row` of `rows` of a group, as `add_rows` reads them.
static void arrange_row(const int16_t* whole, int, int, int16_t* to) {
  for (int i = 0; i < BLOCK_TILES * ROW_INPUTS; ++i) to[i] = whole[feature_of(i)];
}

// `sums` += `scales` times the sums of inputs times codes less their middle, which are whole numbers below 2**31.
static void add_rows(const RowsCall& call, int) {
  alignas(64) int32_t lanes[LANES_OF_TILE][4];
  add_products(call.codes, call.inputs, lanes[0]);
  uint32_t less = uint32_t(call.middle) * uint32_t(*call.totals);
  for (int i = 0; i < TILE / 2; ++i) {
    uint32_t four[4];  // the sum of all is in range, those of its parts may wrap around
    for (int k = 0; k < 4; ++k) {
      const int32_t(*some)[4] = lanes + 4 * i;
      four[k] = uint32_t(some[0][k]) + uint32_t(some[1][k]) + uint32_t(some[2][k]) + uint32_t(some[3][k]);
    }
    call.sums[i] += float(int32_t(four[0] + four[2] - less)) * *call.scales;
    call.sums[i + 8] += float(int32_t(four[1] + four[3] - less)) * *call.scales;
  }
}
