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

// What the experts of each token computed, weighted and added up in fp32, in order.

static void mix(const MixCall& call, int threads) {
  constexpr int64_t WORTH_A_THREAD = 1 << 17;  // numbers: about 20 us
  int64_t blocks = (call.features + BLOCK - 1) / BLOCK, work = call.tokens * call.count * call.features;
  threads = int(std::clamp(work / WORTH_A_THREAD, int64_t(1), int64_t(std::max(threads, 1))));
  for_each_index(call.tokens * blocks, threads, [&](int64_t index) {
    int64_t token = index / blocks, block = index % blocks;
    alignas(64) float sum[BLOCK] = {}, row[BLOCK], weights[BLOCK];
    for (int64_t i = 0; i < call.count; ++i) {
      if (i % BLOCK == 0) read_block(call.weights, token, i / BLOCK, call.count, weights);
      read_block(call.x, token * call.count + i, block, call.features, row);
      for (int k = 0; k < BLOCK; ++k) sum[k] += row[k] * weights[i % BLOCK];
    }
    write_block(call.y, token, block, call.features, sum);
  });
}
