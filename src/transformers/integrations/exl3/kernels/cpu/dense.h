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

// The inner matrix and the weight that a trellis stands for, in full: `format.decode` and `ops.dequantize`, transposed.

// Rows of the result are written in pieces of whole cache lines: they are often a power of two apart, and fall on the same few
// places of the cache.
template <typename Value>
static void decode_column(const DecodeCall& call, int64_t column, Decoder decode) {
  const CodeUnits units = UNITS[call.trellis.codebook];
  const int16_t* tile = call.trellis.data + column * call.trellis.column_stride;
  Value* to = static_cast<Value*>(call.y.data) + column * TILE * call.y.stride;
  for (int64_t first = 0; first < call.trellis.in_tiles; first += BLOCK_TILES) {
    int count = int(std::min<int64_t>(BLOCK_TILES, call.trellis.in_tiles - first));
    alignas(64) int16_t codes[BLOCK_TILES * TILE_SIZE], transposed[BLOCK_TILES * TILE_SIZE];
    decode(tile + first * call.trellis.row_stride, call.trellis.row_stride, PREFETCHED * call.trellis.row_stride, count, codes);
    for (int i = 0; i < count; ++i) transpose_codes(codes + i * TILE_SIZE, transposed + i * TILE_SIZE);
    for (int row = 0; row < TILE; ++row)
      for (int i = 0; i < count; ++i)
        store_values(transposed + i * TILE_SIZE + row * TILE, units, to + row * call.y.stride + (first + i) * TILE);
  }
}

static void decode_all(const DecodeCall& call, int threads) {
  Decoder decode = decoder(call.trellis.twice_bits, call.trellis.codebook);
  for_each_index(call.trellis.out_tiles, threads, [&](int64_t column) {
    if (call.y.dtype == FLOAT32) decode_column<float>(call, column, decode);
    if (call.y.dtype == FLOAT16) decode_column<Half>(call, column, decode);
    if (call.y.dtype == BFLOAT16) decode_column<BFloat>(call, column, decode);
  });
}

// The butterflies between the rows of a block [128, 128].
static void rotate_columns(float* block) {
  for (int half = 1; half < BLOCK; half *= 2)
    for (int row = 0; row < BLOCK; ++row) {
      if (row & half) continue;
      float *low = block + row * BLOCK, *high = low + half * BLOCK;
      for (int i = 0; i < BLOCK; i += EXL3_LANES) {
        Real one = load_real(low + i), other = load_real(high + i);
        store_real(low + i, one + other);
        store_real(high + i, one - other);
      }
    }
  for (int i = 0; i < BLOCK * BLOCK; ++i) block[i] *= HADAMARD_SCALE;
}

static void dequantize_all(const DecodeCall& call, int threads) {
  Decoder decode = decoder(call.trellis.twice_bits, call.trellis.codebook);
  int64_t across = call.trellis.in_tiles / BLOCK_TILES, down = call.trellis.out_tiles / BLOCK_TILES;
  for_each_index(across * down, threads, [&](int64_t index) {
    int64_t in_block = index % across, out_block = index / across;
    alignas(64) float block[BLOCK * BLOCK];
    const Operand in_scale = Operand::factors(call.suh, in_block), out_scale = Operand::factors(call.svh, out_block);
    DecodeCall part = call;
    part.trellis.data += in_block * BLOCK_TILES * call.trellis.row_stride + out_block * BLOCK_TILES * call.trellis.column_stride;
    part.trellis.in_tiles = BLOCK_TILES;
    part.y = {block, BLOCK, FLOAT32};
    for (int column = 0; column < BLOCK_TILES; ++column) decode_column<float>(part, column, decode);
    rotate_columns(block);
    for (int row = 0; row < BLOCK; ++row) {
      float* data = block + row * BLOCK;
      rotate(data);
      scale_block(in_scale, data);
      for (int i = 0; i < BLOCK; ++i) data[i] *= out_scale.data[row];
      write_block(call.y, out_block * BLOCK + row, in_block, call.trellis.in_tiles * TILE, data);
    }
  });
}
