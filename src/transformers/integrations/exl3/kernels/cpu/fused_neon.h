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

// What `fused.h` is built from on aarch64. For each of the four codes of a dword:
//     ushr / ushl, and, mul    its state, times the multiplier,
//   and then, where EXL3_I8MM is 1,
//     usdot                    the sum of its bytes times the input's byte;
//   with dotprod alone, whose products are of signed bytes both, so that 128 times the input's bytes is added later:
//     eor, sdot                its bytes less 128 each, times the input's byte.

struct Operations {
  using Vector = uint32x4_t;
  using Sums = int32x4_t;
  using Piece = uint8x16_t;
  static constexpr int GROUPS = 1, OFFSET = EXL3_I8MM ? 0 : 4 * 128;
  static constexpr Inputs OF_8_BITS = Inputs::BYTES, OF_16_BITS = Inputs::TWO_BYTES;

  static inline Piece piece(const int16_t* from) { return vld1q_u8(reinterpret_cast<const uint8_t*>(from)); }

  // A dword, and three from somewhere else.
  static inline Piece piece_behind(const int16_t* dword, const int16_t* from) {
    uint32_t before;
    std::memcpy(&before, dword, sizeof before);
    return vextq_u8(vreinterpretq_u8_u32(vdupq_n_u32(before)), piece(from), 12);
  }

  static inline Vector join(Piece only, Piece) { return vreinterpretq_u32_u8(only); }
  static inline Vector shuffle(Vector bytes, const uint8_t* places) {
    return vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(bytes), vld1q_u8(places)));
  }
  static inline Vector either(Vector one, Vector other) { return vorrq_u32(one, other); }
  static inline Vector shift_right(Vector dwords, const uint32_t* by) {
    return vshlq_u32(dwords, vnegq_s32(vreinterpretq_s32_u32(vld1q_u32(by))));
  }
  template <int BY>
  static inline Vector shift_right(Vector dwords) { return vshrq_n_u32(dwords, BY); }
  static inline Vector low_words(Vector dwords) { return vandq_u32(dwords, vdupq_n_u32(0xFFFF)); }
  static inline Vector multiply(Vector dwords, uint32_t by) { return vmulq_u32(dwords, vdupq_n_u32(by)); }
  static inline Sums zeros() { return vdupq_n_s32(0); }

  static inline Sums add_products(Sums sums, Vector bytes, const int32_t* inputs) {
    int8x16_t input = vreinterpretq_s8_s32(vld1q_s32(inputs));
#if EXL3_I8MM
    return vusdotq_s32(sums, vreinterpretq_u8_u32(bytes), input);
#else
    return vdotq_s32(sums, vreinterpretq_s8_u32(veorq_u32(bytes, vdupq_n_u32(0x80808080))), input);
#endif
  }

  template <typename Four>
  static inline void fold(const Sums (&pairs)[4], Four (&columns)[2]) {
    int32x4_t two[2];
    for (int i = 0; i < 2; ++i) {
      int64x2_t one = vreinterpretq_s64_s32(pairs[2 * i]), other = vreinterpretq_s64_s32(pairs[2 * i + 1]);
      two[i] = vaddq_s32(vreinterpretq_s32_s64(vzip1q_s64(one, other)), vreinterpretq_s32_s64(vzip2q_s64(one, other)));
    }
    columns[0] = reinterpret_cast<Four>(vuzp1q_s32(two[0], two[1]));
    columns[1] = reinterpret_cast<Four>(vuzp2q_s32(two[0], two[1]));
  }
};

#include "fused.h"
