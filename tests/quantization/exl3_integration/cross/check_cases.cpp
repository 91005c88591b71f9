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

// Computes the cases that `write_cases.py` wrote, on the processor that this was compiled for, and compares every byte:
//
//     check_cases FILE ISA [ISA ...]
//
// The first instruction set is the one that the kernels must choose by themselves, the others must be there too.

#include "cpu.cpp"

#include <cstdio>
#include <string>

namespace {

struct Case {
  int64_t is_linear, twice_bits, codebook, rows, in_features, out_features, dtype, input_bits;
};

struct File {
  std::FILE* file;
  explicit File(const char* path) : file(std::fopen(path, "rb")) {}
  ~File() {
    if (file) std::fclose(file);
  }
  bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, file) == bytes; }
};

int size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

using Bytes = std::vector<unsigned char>;

// What the kernels make of a case: x, trellis, suh and svh in the order of the file.
bool compute(const Case& one, Bytes (&tensors)[4], Bytes& result) {
  auto rows = [&](int index, int64_t stride, int64_t dtype) { return Rows{tensors[index].data(), stride, int32_t(dtype)}; };
  auto codes = reinterpret_cast<const int16_t*>(tensors[1].data());
  int64_t words = 8 * one.twice_bits, across = one.in_features / TILE, down = one.out_features / TILE;
  Trellis trellis{codes, down * words, words, across, down, int32_t(one.twice_bits), int32_t(one.codebook)};
  if (!one.is_linear) {
    DecodeCall call{{result.data(), one.in_features, int32_t(one.dtype)}, {}, {}, trellis};
    return exl3_decode(&call, 2) == OK;
  }
  setenv("EXL3_CPU_INPUT_BITS", std::to_string(one.input_bits).c_str(), 1);
  Rows y{result.data(), one.out_features, int32_t(one.dtype)};
  LinearCall call{rows(0, one.in_features, one.dtype), y, rows(2, 0, FLOAT16), rows(3, 0, FLOAT16), {}, trellis,
                  one.rows, one.in_features, one.out_features, nullptr, 1};
  return exl3_linear(&call, 1, 2) == OK;
}

// The number of cases that differ, -1 where the file cannot be read.
int check(const char* path) {
  File file(path);
  Case one;
  int number = 0, wrong = 0;
  if (!file.file) return -1;
  for (; file.read(&one, sizeof one); ++number) {
    Bytes tensors[4] = {Bytes(one.is_linear * one.rows * one.in_features * size_of(one.dtype)),
                        Bytes(one.in_features * one.out_features / 16 * one.twice_bits), Bytes(one.is_linear * one.in_features * 2),
                        Bytes(one.is_linear * one.out_features * 2)};
    Bytes expected((one.is_linear ? one.rows : one.in_features) * one.out_features * size_of(one.dtype)), result(expected.size());
    for (Bytes& tensor : tensors)
      if (!file.read(tensor.data(), tensor.size())) return -1;
    if (!file.read(expected.data(), expected.size())) return -1;
    if (compute(one, tensors, result) && result == expected) continue;
    ++wrong;
    std::printf("case %d differs: linear %d, twice bits %d, codebook %d, rows %d, dtype %d, input bits %d\n", number,
                int(one.is_linear), int(one.twice_bits), int(one.codebook), int(one.rows), int(one.dtype), int(one.input_bits));
  }
  std::printf("%s: %d cases, %d differ\n", exl3_isa(), number, wrong);
  return number ? wrong : -1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) return 2;
  if (std::string(exl3_isa()) != arguments[2]) {
    std::printf("the kernels chose %s, not %s\n", exl3_isa(), arguments[2]);
    return 1;
  }
  int failed = 0;
  for (int i = 2; i < count; ++i) {
    setenv("EXL3_CPU_ISA", arguments[i], 1);
    if (!exl3_isa()) {
      std::printf("this machine has no %s\n", arguments[i]);
      return 1;
    }
    failed |= check(arguments[1]) != 0;
  }
  return failed;
}
