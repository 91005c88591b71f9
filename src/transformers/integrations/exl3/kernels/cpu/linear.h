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

// The product of few rows and a quantized weight: tiles are decoded in the cache, and all rows share the decoding.
//
// fp32 rows are multiplied with the exact fp16 values. Rows of fewer bits are made whole numbers of 16 bits, block by block
// of 128 features with a scale of its own, and multiplied with codes, which values are before they are rounded to fp16.
// Both errors are about 2e-4 of the result, a tenth of what rounding it to bf16 adds.
//
// One or two rows and a mul1 weight ("fused"): sums are whole numbers over a block of each column, for inputs of 8 bits or of
// two bytes. Instruction sets that have a `Fused` add them up with it, others as follows, to the same bytes.

constexpr int ROWS = 16;  // that share the decoding
constexpr int PATTERN = LANES_OF_TILE;  // inputs of a tile in the order of codes, twice: for a column and the one 8 on

struct Linear {
  const LinearCall& call;
  const int64_t blocks, columns, chunks;  // of the input, of tiles, of ROWS rows
  const int64_t width;                    // columns of tiles that a thread takes at a time
  const bool exact, fused;
  const int parts;          // bytes of an input, where it is fused
  const Fused* const with;  // what that is done with, null for nothing
  const int inputs;         // dwords of a tile's inputs for it
  const Decoder decode;
  const CodeUnits units;
  Buffer<float> sums;             // [rows, out]: the product before it is rotated
  Buffer<float> values;           // [rows, in_tiles, PATTERN]: exact inputs
  Buffer<int32_t> arranged;       // [rows, in_tiles, inputs]: whole inputs for `with`,
  Buffer<int32_t> byte_totals;    // [rows, blocks, parts]: and the sums of their bytes
  Buffer<int16_t> whole;          // [rows, in_tiles, PATTERN]: other whole inputs,
  Buffer<float> scales;           // [rows, blocks]: their scales,
  Buffer<float> totals;           // [rows, blocks]: and the sums of what they stand for
  Buffer<std::atomic<int>> left;  // [chunks, blocks of the output]: columns of tiles that are still to come

  Linear(const LinearCall& call, int64_t width, const Fused* fused_with)
      : call(call),
        blocks(call.trellis.in_tiles / BLOCK_TILES),
        columns(call.trellis.out_tiles),
        chunks((call.rows + ROWS - 1) / ROWS),
        width(width),
        exact(call.x.dtype == FLOAT32),
        fused(is_fused(call)),
        parts(has_byte_inputs(call.trellis.twice_bits) ? 1 : 2),
        with(fused ? fused_with : nullptr),
        inputs(with ? with->sizes[parts - 1] : 0),
        decode(decoder(call.trellis.twice_bits, call.trellis.codebook)),
        units(UNITS[call.trellis.codebook]),
        sums(call.rows * columns * TILE),
        values(exact ? call.rows * call.trellis.in_tiles * PATTERN : 0),
        arranged(call.rows * call.trellis.in_tiles * inputs),
        byte_totals(with ? call.rows * blocks * parts : 0),
        whole(exact || with ? 0 : call.rows * call.trellis.in_tiles * PATTERN),
        scales(exact ? 0 : call.rows * blocks),
        totals(exact ? 0 : call.rows * blocks),
        left(chunks * columns / BLOCK_TILES) {
    for (int64_t i = 0; i < chunks * columns / BLOCK_TILES; ++i) new (left.data + i) std::atomic<int>(BLOCK_TILES);
  }

  int64_t preparations() const { return call.rows * blocks; }
  int64_t products() const { return chunks * columns / width; }

  static bool is_fused(const LinearCall& call) {
    return call.rows <= FUSED_ROWS && call.trellis.codebook == MUL1 && call.x.dtype != FLOAT32;
  }
  static bool has_byte_inputs(int twice_bits) {
    int wanted = input_bits_wanted();
    return wanted ? wanted == 8 : twice_bits <= BYTE_INPUTS_TWICE_BITS;
  }

  static constexpr int feature_of(int place) {
    int lane = place % PATTERN / LANE_CODES;
    return place / PATTERN * TILE + row_of(lane, LANE_ORDER[place % LANE_CODES]);
  }

  // One block of one row of the input.
  void prepare(int64_t index) const {
    int64_t row = index / blocks, block = index % blocks;
    alignas(64) float data[BLOCK];
    read_block(call.x, row, block, call.in_features, data);
    scale_block(call.suh, block, data);
    rotate(data);
    int64_t place = (row * blocks + block) * BLOCK_TILES * PATTERN;
    if (exact) {
      for (int i = 0; i < BLOCK_TILES * PATTERN; ++i) values.data[place + i] = data[feature_of(i)];
      return;
    }
    int32_t bits = 0;  // of the largest magnitude: they are ordered as numbers are, and what is not finite is larger
    for (float value : data) bits = std::max(bits, bit_cast<int32_t>(value) & INT32_MAX);
    bool finite = bits < 0x7F800000;
    float scale = bit_cast<float>(bits) / float(!fused ? units.largest_input : parts == 1 ? LARGEST_BYTE : LARGEST_TWO_BYTES);
    // Smaller scales have too few bits: such a block is as good as zero. What is not finite goes on through the scale.
    float factor = finite && scale >= FLT_MIN ? 1 / scale : 0;
    constexpr float WHOLE = 0x1.8p23f;  // numbers of its magnitude are whole
    int16_t rounded[BLOCK];
    int32_t total = 0;
    for (int i = 0; i < BLOCK; ++i) {
      int32_t number = bit_cast<int32_t>(data[i] * factor + WHOLE) - bit_cast<int32_t>(WHOLE);
      rounded[i] = int16_t(finite ? number : 0);
      total += rounded[i];
    }
    if (with)
      arrange(rounded, index);
    else
      for (int i = 0; i < BLOCK_TILES * PATTERN; ++i) whole.data[place + i] = rounded[feature_of(i)];
    scales.data[index] = finite ? scale : NAN;
    totals.data[index] = float(total) * scales.data[index];
  }

  void arrange(const int16_t* rounded, int64_t index) const {
    with->arrange(rounded, parts, arranged.data + index * BLOCK_TILES * inputs);
    for (int part = 0; part < parts; ++part) {
      int32_t total = 0;
      for (int i = 0; i < BLOCK; ++i) total += byte_of(rounded[i], part, parts);
      byte_totals.data[index * parts + part] = total;
    }
  }

  // Some columns of tiles for one chunk of rows; what completes a block of the output finishes it.
  void multiply(int64_t index) const {
    int64_t column = index * width % columns, chunk = index * width / columns, first = chunk * ROWS;
    int rows = int(call.rows - first < ROWS ? call.rows - first : ROWS);
    if (fused) {
      multiply_fused(column, rows);
    } else {
      alignas(64) int16_t codes[BLOCK_TILES * TILE_SIZE];
      for (int64_t i = column; i < column + width; ++i)
        exact ? multiply_values(i, first, rows, codes) : multiply_codes(i, first, rows, codes);
    }
    int64_t block = column / BLOCK_TILES;
    if (width < BLOCK_TILES && left.data[chunk * (columns / BLOCK_TILES) + block].fetch_sub(int(width)) > width) return;
    for (int64_t row = first; row < first + rows; ++row)
      finish_block(call.svh, call.bias, call.y, row, block, call.out_features,
                   sums.data + row * columns * TILE + block * BLOCK);
  }

  void decode_block(int64_t column, int64_t block, int16_t* codes) const {
    const int16_t* tile = call.trellis.data + column * call.trellis.column_stride + block * BLOCK_TILES * call.trellis.row_stride;
    decode(tile, call.trellis.row_stride, BLOCK_TILES, codes);
  }

  void multiply_fused(int64_t column, int rows) const {
    FusedProduct product = with ? with->product(call.trellis.twice_bits, rows, parts) : nullptr;
    for (int64_t i = column; i < column + width; i += product ? FUSED_COLUMNS : 1) {
      if (!product) {
        multiply_whole(i, rows);
        continue;
      }
      FusedCall some{call.trellis.data + i * call.trellis.column_stride, call.trellis.row_stride, call.trellis.column_stride, blocks,
                     arranged.data, byte_totals.data, scales.data, {}};
      for (int row = 0; row < rows; ++row) some.sums[row] = sums.data + (row * columns + i) * TILE;
      product(some);
    }
    for (int row = 0; row < rows; ++row) {
      float total = 0, *sum = sums.data + (row * columns + column) * TILE;
      for (int64_t block = 0; block < blocks; ++block) total += totals.data[row * blocks + block];
      for (int64_t i = 0; i < width * TILE; ++i) sum[i] = sum[i] * units.step + total * units.start;
    }
  }

  void multiply_whole(int64_t column, int rows) const {
    alignas(64) int16_t codes[BLOCK_TILES * TILE_SIZE];
    alignas(64) int32_t lanes[LANES_OF_TILE][4];
    for (int row = 0; row < rows; ++row) std::fill_n(sums.data + (row * columns + column) * TILE, TILE, 0.f);
    for (int64_t block = 0; block < blocks; ++block) {
      decode_block(column, block, codes);
      for (int row = 0; row < rows; ++row) {
        int64_t index = row * blocks + block;
        float* sum = sums.data + (row * columns + column) * TILE;
        add_products(codes, whole.data + index * BLOCK_TILES * PATTERN, 0, lanes[0]);
        for (int i = 0; i < TILE; ++i) {
          int64_t exact = 0;
          for (int lane = i % 8 * 4; lane < i % 8 * 4 + 4; ++lane) exact += int64_t(lanes[lane][i / 8]) + lanes[lane][i / 8 + 2];
          sum[i] += float(exact) * scales.data[index];
        }
      }
    }
  }

  void multiply_codes(int64_t column, int64_t first, int rows, int16_t* codes) const {
    alignas(64) float lanes[ROWS][LANES_OF_TILE][4];
    std::memset(lanes, 0, rows * sizeof *lanes);
    float total[ROWS] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      decode_block(column, block, codes);
      for (int row = 0; row < rows; ++row) {
        int64_t index = (first + row) * blocks + block;
        add_products(codes, whole.data + index * BLOCK_TILES * PATTERN, scales.data[index], lanes[row][0]);
        total[row] += totals.data[index];
      }
    }
    for (int row = 0; row < rows; ++row) {
      float* sum = sums.data + ((first + row) * columns + column) * TILE;
      for (int i = 0; i < TILE / 2; ++i) {
        float added[4];
        for (int k = 0; k < 4; ++k) {
          const float(*four)[4] = lanes[row] + 4 * i;
          added[k] = (four[0][k] + four[1][k]) + (four[2][k] + four[3][k]);
        }
        sum[i] = (added[0] + added[2]) * units.step + total[row] * units.start;
        sum[i + 8] = (added[1] + added[3]) * units.step + total[row] * units.start;
      }
    }
  }

  void multiply_values(int64_t column, int64_t first, int rows, int16_t* codes) const {
    alignas(64) float lanes[ROWS][TILE_SIZE], decoded[BLOCK_TILES * TILE_SIZE];
    std::memset(lanes, 0, rows * sizeof *lanes);
    for (int64_t block = 0; block < blocks; ++block) {
      decode_block(column, block, codes);
      for (int i = 0; i < BLOCK_TILES * TILE_SIZE; i += TILE) store_values(codes + i, units, decoded + i);
      for (int row = 0; row < rows; ++row)
        add_exact_products(decoded, values.data + ((first + row) * blocks + block) * BLOCK_TILES * PATTERN, lanes[row]);
    }
    for (int row = 0; row < rows; ++row) {
      float* sum = sums.data + ((first + row) * columns + column) * TILE;
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

// All of several products at once: `count(product)` indices of each for `work(product, index)`.
template <typename Count, typename Work>
static void for_each_part(const std::vector<std::unique_ptr<Linear>>& products, int threads, const Count& count,
                          const Work& work) {
  std::vector<int64_t> ends;
  for (const auto& product : products) ends.push_back((ends.empty() ? 0 : ends.back()) + count(*product));
  if (ends.empty()) return;
  for_each_index(ends.back(), threads, [&](int64_t index) {
    size_t which = 0;
    while (index >= ends[which]) ++which;
    work(*products[which], which ? index - ends[which - 1] : index);
  });
}

static void multiply(const LinearCall* calls, int64_t count, int threads, const Fused* fused) {
  constexpr int64_t FEW = 256;  // blocks that one thread prepares before another would have been woken
  // Weights, times rows, that are worth one more thread: on two quiet cores of Zen 4, 512x1024 takes 27 us on one thread and 26
  // on two, 1024x1024 50 and 40. With another process on one of the cores, two threads take three to five times as long.
  constexpr int64_t WORTH_A_THREAD = 1 << 19;
  int64_t in_blocks = 0, out_blocks = 0, work = 0;
  for (int64_t i = 0; i < count; ++i) {
    in_blocks += calls[i].rows * calls[i].trellis.in_tiles / BLOCK_TILES;
    work += calls[i].trellis.in_tiles * calls[i].trellis.out_tiles * TILE_SIZE * calls[i].rows;
    out_blocks += (calls[i].rows + ROWS - 1) / ROWS * calls[i].trellis.out_tiles / BLOCK_TILES;
  }
  threads = int(std::clamp(work / WORTH_A_THREAD, int64_t(1), int64_t(std::max(threads, 1))));
  // Whole blocks of the output need no counting; single columns share few blocks out evenly.
  bool is_small = out_blocks < 8 * threads;
  std::vector<std::unique_ptr<Linear>> products;
  for (int64_t i = 0; i < count; ++i)
    products.emplace_back(
        new Linear(calls[i], !is_small ? BLOCK_TILES : Linear::is_fused(calls[i]) ? FUSED_COLUMNS : 1, fused));
  for_each_part(products, in_blocks < FEW ? 1 : threads, [](const Linear& product) { return product.preparations(); },
                [](const Linear& product, int64_t index) { product.prepare(index); });
  for_each_part(products, threads, [](const Linear& product) { return product.products(); },
                [](const Linear& product, int64_t index) { product.multiply(index); });
}
