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

// The product of rows and a quantized weight: tiles are decoded in the cache, and many rows share the decoding.
//
// fp32 rows are multiplied with the exact fp16 values. Rows of fewer bits are made whole numbers of 16 bits, block by block of
// 128 features with a scale of its own, and multiplied with codes, which values are before they are rounded to fp16. The sums
// of a block are exact. Both errors are about 5e-4 of the result or less, a quarter of what rounding it to bf16 adds.
//
// For one or two rows and a mul1 weight, inputs have 8 bits or 16. Instruction sets that have a `Fused` multiply one or two rows
// while they decode, the same bytes as otherwise. One that has `Matrices` multiplies many rows of bfloat16 as they are after their
// rotation, rounded to bfloat16 again, with codes that are rounded like that.

constexpr int EXACT_SHARING = 16;              // fp32 rows that share the decoding
constexpr int MOST_ROWS = GROUP * SHARING;     // that do
constexpr int PATTERN = LANES_OF_TILE;         // exact inputs of a tile in the order of codes, twice: for a column and the one 8 on

struct Linear {
  const LinearCall& call;
  const bool exact, of_bytes;      // whether the rows are fp32, and inputs made of bytes
  const Matrices* const matrices;  // what multiplies the rows as matrices of bfloat16 numbers, null for nothing
  const int64_t blocks, columns;   // of the input, of tiles
  const int64_t groups, chunks;    // of rows that are multiplied together, of groups that share the decoding
  const int64_t width;             // columns of tiles that a thread takes at a time, at most
  const bool is_byte;              // whether those have 8 bits
  const Fused* const with;         // what multiplies while it decodes, null for nothing,
  const Inputs kind;               // inputs that it takes,
  const int inputs;                // and their dwords for a tile
  const Decoder decode;
  const CodeUnits units;
  Buffer<float> sums;              // [rows, out]: the product before it is rotated, where threads share blocks of the output
  Buffer<float> values;            // [rows, in_tiles, PATTERN]: exact inputs
  Buffer<int32_t> arranged;        // [rows, in_tiles, inputs]: whole inputs for `with`
  Buffer<int16_t> whole;           // [blocks, rows, 8, ROW_INPUTS], in the order of `arrange_row`: other whole inputs,
  Buffer<float> scales;            // [blocks, rows]: their scales,
  Buffer<int32_t> totals;          // [blocks, rows]: and sums
  Buffer<uint16_t> rounded;        // [blocks, groups, 4, 16, 32]: inputs for `matrices`
  Buffer<float> shares;            // [blocks, rows]: what the inputs of a block that are not exact add up to
  Buffer<std::atomic<int>> left;   // [chunks, blocks of the output]: columns of tiles that are still to come

  Linear(const LinearCall& call, int64_t width, const Fused* fused_with, const Matrices* multiplied_by)
      : call(call),
        exact(call.x.dtype == FLOAT32),
        of_bytes(is_few(call) && call.trellis.codebook == MUL1),
        matrices(are_many(call, multiplied_by) ? multiplied_by : nullptr),
        blocks(call.trellis.in_tiles / BLOCK_TILES),
        columns(call.trellis.out_tiles),
        groups(groups_of(call, matrices)),
        chunks(chunks_of(call, matrices)),
        width(width),
        is_byte(of_bytes && has_byte_inputs(call.trellis.twice_bits)),
        with(is_few(call) ? fused_with : nullptr),
        kind(with ? with->inputs(call.trellis.codebook, int(call.rows), is_byte) : Inputs::NONE),
        inputs(kind == Inputs::NONE ? 0 : dwords_of(kind) * with->copies),
        decode(exact ? decoder<StreamOrder>(call.trellis.twice_bits, call.trellis.codebook)
                     : decoder<RowsOrder>(call.trellis.twice_bits, call.trellis.codebook)),
        units(UNITS[call.trellis.codebook]),
        sums(width < BLOCK_TILES ? (matrices ? groups * MATRIX_ROWS : call.rows) * columns * TILE : 0),
        values(exact ? call.rows * call.trellis.in_tiles * PATTERN : 0),
        arranged(call.rows * call.trellis.in_tiles * inputs),
        whole(exact || matrices || inputs ? 0 : call.rows * call.trellis.in_tiles * ROW_INPUTS),
        scales(exact || matrices ? 0 : call.rows * blocks),
        totals(exact || matrices ? 0 : call.rows * blocks),
        rounded(matrices ? groups * MATRIX_ROWS * blocks * BLOCK : 0),
        shares(exact ? 0 : call.rows * blocks),
        left(chunks * columns / BLOCK_TILES) {
    for (int64_t i = 0; i < chunks * columns / BLOCK_TILES; ++i) new (left.data + i) std::atomic<int>(BLOCK_TILES);
  }

  int64_t preparations() const { return groups * blocks; }
  int64_t unit() const { return std::min<int64_t>(width, BLOCK_TILES); }  // columns that stay together
  int64_t parts() const { return (columns + width - 1) / width; }          // of a chunk
  int64_t products() const { return chunks * parts(); }
  // Floats that a thread writes its sums to.
  int64_t scratch() const { return width < BLOCK_TILES ? 0 : (matrices ? MATRIX_SHARING * MATRIX_ROWS : MOST_ROWS) * width * TILE; }

  static bool is_few(const LinearCall& call) { return call.rows <= FUSED_ROWS && call.x.dtype != FLOAT32; }
  static bool has_byte_inputs(int twice_bits) {
    int wanted = input_bits_wanted();
    return wanted ? wanted == 8 : twice_bits <= BYTE_INPUTS_TWICE_BITS;
  }
  static bool are_many(const LinearCall& call, const Matrices* matrices) {
    return matrices && call.x.dtype == BFLOAT16 && call.rows >= matrices->least;
  }
  static int64_t groups_of(const LinearCall& call, const Matrices* matrices) {
    int64_t most = matrices ? MATRIX_ROWS : call.x.dtype == FLOAT32 ? 1 : GROUP;
    return (call.rows + most - 1) / most;
  }
  static int64_t chunks_of(const LinearCall& call, const Matrices* matrices) {
    int64_t most = matrices ? MATRIX_SHARING : call.x.dtype == FLOAT32 ? EXACT_SHARING : SHARING;
    return (groups_of(call, matrices) + most - 1) / most;
  }

  // Groups are of nearly the same number of rows, except of matrices, and chunks of groups.
  int64_t first_row(int64_t group) const {
    return matrices ? std::min(group * MATRIX_ROWS, call.rows) : group * call.rows / groups;
  }
  int rows_of(int64_t group) const { return int(first_row(group + 1) - first_row(group)); }
  int64_t first_group(int64_t chunk) const { return chunk * groups / chunks; }

  static constexpr int exact_feature_of(int place) {
    int lane = place % PATTERN / LANE_CODES;
    return place / PATTERN * TILE + row_of(lane, LANE_ORDER[place % LANE_CODES]);
  }

  int16_t* whole_of(int64_t group, int64_t block) const {
    return whole.data + (block * call.rows + first_row(group)) * BLOCK_TILES * ROW_INPUTS;
  }

  // One block of a group's rows of the input.
  void prepare(int64_t index) const {
    int64_t group = index / blocks, block = index % blocks;
    const Operand factors = Operand::factors(call.suh, block);
    for (int i = 0; i < rows_of(group); ++i) prepare_row(group, i, block, factors);
    for (int i = rows_of(group); matrices && i < MATRIX_ROWS; ++i) matrices->arrange(NO_INPUTS, rounded_of(group, i, block));
  }

  alignas(64) static constexpr float NO_INPUTS[BLOCK] = {};
  uint16_t* rounded_of(int64_t group, int number, int64_t block) const {
    return rounded.data + (block * groups + group) * MATRIX_ROWS * BLOCK + number * (BLOCK / 4);
  }

  void prepare_row(int64_t group, int number, int64_t block, const Operand& factors) const {
    int64_t row = first_row(group) + number, index = block * call.rows + row;
    alignas(64) float data[BLOCK];
    read_block(call.x, call.place_of(row) / call.sharing, block, call.in_features, data);
    scale_block(factors, data);
    rotate(data);
    if (exact) {
      float* to = values.data + (row * blocks + block) * BLOCK_TILES * PATTERN;
      for (int i = 0; i < BLOCK_TILES * PATTERN; ++i) to[i] = data[exact_feature_of(i)];
      return;
    }
    if (matrices) {
      shares.data[index] = matrices->arrange(data, rounded_of(group, number, block));
      return;
    }
    int32_t bits = 0;  // of the largest magnitude: they are ordered as numbers are, and what is not finite is larger
    for (float value : data) bits = std::max(bits, bit_cast<int32_t>(value) & INT32_MAX);
    bool finite = bits < 0x7F800000;
    float scale = scale_of(data, bit_cast<float>(bits));
    // Smaller scales have too few bits: such a block is as good as zero. What is not finite goes on through the scale.
    float factor = finite && scale >= FLT_MIN ? 1 / scale : 0;
    constexpr float WHOLE = 0x1.8p23f;  // numbers of its magnitude are whole
    int16_t numbers[BLOCK];
    int32_t total = 0;
    for (int i = 0; i < BLOCK; ++i) {
      int32_t number = bit_cast<int32_t>(data[i] * factor + WHOLE) - bit_cast<int32_t>(WHOLE);
      numbers[i] = int16_t(finite ? number : 0);
      total += numbers[i];
    }
    if (inputs)
      with->arrange(numbers, kind, arranged.data + (row * blocks + block) * BLOCK_TILES * inputs);
    else
      arrange_row(numbers, number, rows_of(group), whole_of(group, block));
    scales.data[index] = finite ? scale : NAN;
    totals.data[index] = total;
    shares.data[index] = float(total) * scales.data[index];
  }

  float scale_of(const float* data, float largest) const {
    if (of_bytes) return largest / float(is_byte ? LARGEST_BYTE : LARGEST_TWO_BYTES);
    float scale = largest / float(units.largest_input);
    if (largest_inputs(units) >= BLOCK * units.largest_input) return scale;
    double total = 0;
    for (int i = 0; i < BLOCK; ++i) total += std::fabs(data[i]);
    return std::max(scale, float(total / largest_inputs(units)));
  }

  // The sums of some columns of tiles and some rows: `sum` [rows, 16 width].
  struct Part {
    int64_t column, width, first_group, last_group, first, rows;
    float* sum;
    int64_t stride;  // from one row of sums to the next
    float* at(int64_t row, int64_t column) const { return sum + row * stride + column * TILE; }
  };

  // Some columns of tiles for one chunk of rows; what completes a block of the output finishes it.
  void multiply(int64_t index, float* own) const {
    int64_t chunk = index / parts(), number = index % parts(), units = columns / unit();
    int64_t column = number * units / parts() * unit(), end = (number + 1) * units / parts() * unit();
    int64_t begin_group = first_group(chunk), end_group = first_group(chunk + 1);
    int64_t first = first_row(begin_group), rows = first_row(end_group) - first, block = column / BLOCK_TILES;
    bool shared = width < BLOCK_TILES;
    float* sum = shared ? sums.data + (first * columns + column) * TILE : own;
    Part part{column, end - column, begin_group, end_group, first, rows, sum, (shared ? columns : width) * TILE};
    if (exact) {
      for (int64_t i = 0; i < part.width; ++i) multiply_values(part, i);
    } else {
      matrices ? multiply_matrices(part) : inputs ? multiply_fused(part) : multiply_whole(part);
      finish_units(part);
    }
    if (shared && left.data[chunk * (columns / BLOCK_TILES) + block].fetch_sub(int(width)) > width) return;
    do {
      const Operand factors = Operand::factors(call.svh, block), addends = Operand::addends(call.bias, block, call.out_features);
      for (int64_t i = 0; i < rows; ++i)
        finish_block(factors, addends, call.y, call.place_of(first + i), block, call.out_features,
                     part.at(i, block * BLOCK_TILES - column));
    } while (++block * BLOCK_TILES < end);
  }

  void decode_block(int64_t column, int64_t block, int16_t* codes) const {
    const Trellis& all = call.trellis;
    int64_t tile = block * BLOCK_TILES;
    int64_t ahead = to_fetch(tile, all.in_tiles, PREFETCHED, exact ? 1 : COLUMNS, all.row_stride, all.column_stride);
    decode(all.data + column * all.column_stride + tile * all.row_stride, all.row_stride, ahead, BLOCK_TILES, codes);
  }

  void multiply_fused(const Part& part) const {
    FusedProduct product = with->product(call.trellis.codebook, call.trellis.twice_bits, int(part.rows), kind);
    for (int64_t i = 0; i < part.width; i += FUSED_COLUMNS) {
      FusedCall some{call.trellis.data + (part.column + i) * call.trellis.column_stride, call.trellis.row_stride,
                     call.trellis.column_stride, blocks, arranged.data, totals.data, scales.data, {}};
      for (int64_t row = 0; row < part.rows; ++row) some.sums[row] = part.at(row, i);
      product(some);
    }
  }

  void multiply_whole(const Part& part) const {
    alignas(64) int16_t codes[COLUMNS * BLOCK_TILES * TILE_SIZE];
    for (int64_t row = 0; row < part.rows; ++row) std::fill_n(part.at(row, 0), part.width * TILE, 0.f);
    for (int64_t column = 0; column < part.width; column += COLUMNS)
      for (int64_t block = 0; block < blocks; ++block) {
        for (int i = 0; i < COLUMNS; ++i) decode_block(part.column + column + i, block, codes + i * BLOCK_TILES * TILE_SIZE);
        for (int64_t group = part.first_group; group < part.last_group; ++group) {
          int64_t row = first_row(group), index = block * call.rows + row;
          RowsCall some{codes, whole_of(group, block), scales.data + index, totals.data + index, units.middle,
                        part.at(row - part.first, column), part.stride};
          add_rows(some, rows_of(group));
        }
      }
  }

  void multiply_matrices(const Part& part) const {
    Trellis some = call.trellis;
    some.data += part.column * some.column_stride;
    matrices->multiply({some, part.width, rounded_of(part.first_group, 0, 0), groups * MATRIX_ROWS * BLOCK,
                        part.last_group - part.first_group, part.sum, part.stride});
  }

  // Sums of codes less their middle to sums of values.
  void finish_units(const Part& part) const {
    for (int64_t row = 0; row < part.rows; ++row) {
      float total = 0, *sum = part.at(row, 0);
      for (int64_t index = part.first + row; index < blocks * call.rows; index += call.rows)
        total += shares.data[index];
      total *= units.start + float(units.middle) * units.step;
      for (int64_t i = 0; i < part.width * TILE; ++i) sum[i] = sum[i] * units.step + total;
    }
  }

  void multiply_values(const Part& part, int64_t column) const {
    alignas(64) int16_t codes[BLOCK_TILES * TILE_SIZE];
    alignas(64) float lanes[EXACT_SHARING][TILE_SIZE], decoded[BLOCK_TILES * TILE_SIZE];
    std::memset(lanes, 0, part.rows * sizeof *lanes);
    for (int64_t block = 0; block < blocks; ++block) {
      decode_block(part.column + column, block, codes);
      for (int i = 0; i < BLOCK_TILES * TILE_SIZE; i += TILE) store_values(codes + i, units, decoded + i);
      for (int64_t row = 0; row < part.rows; ++row)
        add_exact_products(decoded, values.data + ((part.first + row) * blocks + block) * BLOCK_TILES * PATTERN, lanes[row]);
    }
    for (int64_t row = 0; row < part.rows; ++row) {
      float* sum = part.at(row, column);
      for (int i = 0; i < TILE / 2; ++i) {
        float added[LANE_CODES];
        for (int k = 0; k < LANE_CODES; ++k) {
          const float* four = lanes[row] + 4 * i * LANE_CODES + k;
          added[k] = (four[0] + four[LANE_CODES]) + (four[2 * LANE_CODES] + four[3 * LANE_CODES]);
        }
        sum[i] = (added[0] + added[1]) + (added[4] + added[5]);
        sum[i + 8] = (added[2] + added[3]) + (added[6] + added[7]);
      }
    }
  }

  // `sums` [256] += the products of values [tiles][256] and inputs [tiles][PATTERN], lane by lane.
  EXL3_NOINLINE static void add_exact_products(const float* decoded, const float* input, float* sums) {
    constexpr int VECTORS = PATTERN / EXL3_LANES;
    for (int part = 0; part < TILE_SIZE; part += PATTERN) {
      Real total[VECTORS];
      for (int i = 0; i < VECTORS; ++i) total[i] = load_real(sums + part + i * EXL3_LANES);
      for (int tile = 0; tile < BLOCK_TILES; ++tile)
        for (int i = 0; i < VECTORS; ++i)
          total[i] += load_real(decoded + tile * TILE_SIZE + part + i * EXL3_LANES) *
                      load_real(input + tile * PATTERN + i * EXL3_LANES);
      for (int i = 0; i < VECTORS; ++i) store_real(sums + part + i * EXL3_LANES, total[i]);
    }
  }
};

// All of several products at once: `count(product)` indices of each for `work(product, index, scratch)`, by
// `run(indices, work(index, scratch))`.
template <typename Count, typename Work, typename Run>
static void for_each_part(const std::vector<std::unique_ptr<Linear>>& products, const Count& count, const Work& work,
                          const Run& run) {
  std::vector<int64_t> ends;
  for (const auto& product : products) ends.push_back((ends.empty() ? 0 : ends.back()) + count(*product));
  if (ends.empty()) return;
  run(ends.back(), [&](int64_t index, float* scratch) {
    size_t which = 0;
    while (index >= ends[which]) ++which;
    work(*products[which], which ? index - ends[which - 1] : index, scratch);
  });
}

static void multiply(const LinearCall* calls, int64_t count, int threads, const Fused* fused, const Matrices* matrices) {
  constexpr int64_t FEW = 256;  // blocks that one thread prepares before another would have been woken
  // Weights, times rows, that are worth one more thread: on two quiet cores of Zen 4, 512x1024 takes 27 us on one thread and 26
  // on two, 1024x1024 50 and 40. With another process on one of the cores, two threads take three to five times as long.
  constexpr int64_t WORTH_A_THREAD = 1 << 19;
  int64_t in_blocks = 0, out_blocks = 0, work = 0;
  for (int64_t i = 0; i < count; ++i) {
    in_blocks += calls[i].rows * calls[i].trellis.in_tiles / BLOCK_TILES;
    work += calls[i].trellis.in_tiles * calls[i].trellis.out_tiles * TILE_SIZE * calls[i].rows;
    const Matrices* own = Linear::are_many(calls[i], matrices) ? matrices : nullptr;
    out_blocks += Linear::chunks_of(calls[i], own) * calls[i].trellis.out_tiles / BLOCK_TILES;
  }
  threads = int(std::clamp(work / WORTH_A_THREAD, int64_t(1), int64_t(std::max(threads, 1))));
  // Whole blocks of the output need no counting; single columns share few blocks out evenly. Matrices are best multiplied by two
  // blocks at once, and by one rather than by single columns.
  auto width_of = [&](const LinearCall& call) -> int64_t {
    bool are_many = Linear::are_many(call, matrices);
    if (are_many && out_blocks >= 16 * threads) return 2 * BLOCK_TILES;
    if (out_blocks >= (are_many ? 4 : 8) * threads) return BLOCK_TILES;
    return Linear::is_few(call) ? FUSED_COLUMNS : COLUMNS;
  };
  std::vector<std::unique_ptr<Linear>> products;
  int64_t scratch = 0;
  for (int64_t i = 0; i < count; ++i) {
    products.emplace_back(new Linear(calls[i], width_of(calls[i]), fused, matrices));
    scratch = std::max(scratch, products.back()->scratch());
  }
  for_each_part(
      products, [](const Linear& product) { return product.preparations(); },
      [](const Linear& product, int64_t index, float*) { product.prepare(index); },
      [&](int64_t indices, const auto& work) {
        for_each_index(indices, in_blocks < FEW ? 1 : threads, [&](int64_t index) { work(index, nullptr); });
      });
  for_each_part(
      products, [](const Linear& product) { return product.products(); },
      [](const Linear& product, int64_t index, float* own) { product.multiply(index, own); },
      [&](int64_t indices, const auto& work) {
        constexpr int64_t ON_THE_STACK = MOST_ROWS * BLOCK;
        if (scratch <= ON_THE_STACK)
          return for_each_index(indices, threads, [&](int64_t index) {
            alignas(64) float own[ON_THE_STACK];
            work(index, own);
          });
        using Job = std::remove_reference_t<decltype(work)>;
        parallel([](const void* job, float* own, int64_t index) { (*static_cast<Job*>(job))(index, own); }, &work, indices,
                 size_t(scratch), threads);
      });
}
