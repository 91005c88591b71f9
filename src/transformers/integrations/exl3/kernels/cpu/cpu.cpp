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

// The compiled CPU kernels of EXL3: plain C functions, for any Python and any torch. `cpu.py` loads and checks them.

#include "common.h"

#if defined(_MSC_VER)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define EXL3_VECTORS 1
#endif

#if defined(EXL3_VECTORS) && defined(__x86_64__)
#define EXL3_X86 1
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own headers of AVX-512 give both
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

#if defined(EXL3_VECTORS) && defined(__aarch64__) && !defined(__AARCH64EB__)
#define EXL3_ARM 1
#include <arm_neon.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__GLIBCXX__)
// Every vector refers to this, which libstdc++ has only since GCC 11: with it here, the library runs on older systems, too.
namespace std {
void __throw_bad_array_new_length() { throw bad_alloc(); }
}  // namespace std
#endif

namespace {

constexpr int ABI_VERSION = 8;  // `calls.ABI_VERSION`: raised with every change of a signature below

constexpr int LINE = 64;          // bytes of a cache line and of the longest vector
constexpr int MAX_DIFFERENCE = 255;  // of numbers whose square is a 16-bit cost
constexpr int NUM_LEVELS = 128;      // `search.LEVELS`: as many bytes as an instruction looks up
constexpr int MAX_KEPT = 8;       // steps from a kept row of costs to the next, at most
constexpr int MAX_CONE_BITS = 8;  // bits of a node that are open in the traceback of these steps, at most

using FloatBuffer = Buffer<float>;

// Runs `task(job, scratch, index)` for every index below `count`, in any order, on up to `threads` threads that have
// `scratch_size` floats each.
void parallel(void (*task)(const void*, float*, int64_t), const void* job, int64_t count, size_t scratch_size,
              int threads) {
  if (threads > count) threads = int(count);
  // Kept from call to call, some MB for each thread: the system would have to give thousands of pages anew each time.
  thread_local std::vector<FloatBuffer> scratch;
  thread_local size_t kept_size = 0;
  if (scratch_size > kept_size) {
    scratch.clear();
    kept_size = scratch_size;
  }
  while (int(scratch.size()) < threads) {
    scratch.emplace_back(kept_size);
    std::memset(scratch.back().data, 0, kept_size * sizeof(float));
  }
  FloatBuffer* buffers = scratch.data();  // in other threads, `scratch` is another one
  std::atomic<int64_t> next{0};
  for_each_index(threads, threads, [&](int64_t thread) {
    for (int64_t index; (index = next.fetch_add(1)) < count;) task(job, buffers[thread].data, index);
  });
}

struct SearchJob {
  const void* tiles;  // [count, 256], in stream order, fp32 or, if `are_words`, int16
  bool are_words;
  int64_t count;
  const void* values;  // [65536], of the type of `tiles`
  const void* levels;  // [NUM_LEVELS], in order, the only numbers among `values` for 8-bit costs, or null
  int window;          // weights on either side of the boundary that its state is searched among
  int32_t* states;     // [count, 256]
  const void* arranged[2];
};

// The square of the difference of two 16-bit fixed-point numbers as an 8-bit cost, in units of 2**16, or a 16-bit one.
template <class Cost>
inline Cost squared_difference(int16_t value, int16_t weight) {
  int difference = value - weight, largest = sizeof(Cost) == 1 ? 32767 : MAX_DIFFERENCE;
  difference = difference < 0 ? -difference : difference;
  difference = difference < largest ? difference : largest;
  int square = sizeof(Cost) == 1 ? difference * difference >> 16 : difference * difference;
  return Cost(sizeof(Cost) == 2 || square < 255 ? square : 255);
}

// Compiles what follows, up to EXL3_END_TARGET, for the instructions that a string names.
#define EXL3_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define EXL3_TARGET(names) EXL3_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define EXL3_END_TARGET _Pragma("clang attribute pop")
#else
#define EXL3_TARGET(names) _Pragma("GCC push_options") EXL3_PRAGMA(GCC target(names))
#define EXL3_END_TARGET _Pragma("GCC pop_options")
#endif

namespace base {
#if defined(EXL3_VECTORS)
#define EXL3_LANES 4
#else
#define EXL3_LANES 1
#endif
#define EXL3_VNNI 0
#include "vectors_base.h"
#include "kernels.h"
#undef EXL3_LANES
#undef EXL3_VNNI
}  // namespace base

#if defined(EXL3_X86)
#define EXL3_DOT_NONE 0
#define EXL3_DOT_VEX 1
#define EXL3_DOT_EVEX 2

EXL3_TARGET("avx2,f16c")
namespace avx2 {
#define EXL3_LANES 8
#define EXL3_VNNI 0
#include "vectors_avx2.h"
#include "codes.h"
#include "kernels.h"
#undef EXL3_LANES
#undef EXL3_VNNI
}  // namespace avx2
namespace fused_avx2 {
using namespace avx2;
#define EXL3_DOT EXL3_DOT_NONE
#include "fused_pairs.h"
#undef EXL3_DOT
}  // namespace fused_avx2
EXL3_END_TARGET

#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define EXL3_AVX_VNNI 1
EXL3_TARGET("avx2,f16c,avxvnni")
namespace fused_avxvnni {
using namespace avx2;
#define EXL3_DOT EXL3_DOT_VEX
#include "fused_pairs.h"
#undef EXL3_DOT
}  // namespace fused_avxvnni
EXL3_END_TARGET
#endif

EXL3_TARGET("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define EXL3_LANES 16
#define EXL3_VNNI 0
#include "vectors_avx512.h"
#include "codes.h"
#include "kernels.h"
#undef EXL3_LANES
#undef EXL3_VNNI
}  // namespace avx512
EXL3_END_TARGET

EXL3_TARGET("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace fused_avx512vlvnni {
using namespace avx2;
#define EXL3_DOT EXL3_DOT_EVEX
#include "fused_pairs.h"
#undef EXL3_DOT
}  // namespace fused_avx512vlvnni
EXL3_END_TARGET

EXL3_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
namespace avx512vnni {
#define EXL3_LANES 16
#define EXL3_VNNI 1
#include "vectors_avx512.h"
#include "codes.h"
#include "kernels.h"
#include "fused_avx512.h"
#undef EXL3_LANES
#undef EXL3_VNNI
}  // namespace avx512vnni
EXL3_END_TARGET

#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define EXL3_AMX 1
EXL3_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,amx-tile,amx-bf16")
namespace amx {
using namespace avx512vnni;
#include "matrix_amx.h"
}  // namespace amx
EXL3_END_TARGET
#endif
#endif

#if defined(EXL3_ARM) && (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10)
#define EXL3_ARM_DOT 1
EXL3_TARGET("arch=armv8.2-a+dotprod")
namespace fused_dotprod {
#define EXL3_I8MM 0
#include "fused_neon.h"
#undef EXL3_I8MM
}  // namespace fused_dotprod
EXL3_END_TARGET

EXL3_TARGET("arch=armv8.2-a+dotprod+i8mm")
namespace fused_i8mm {
#define EXL3_I8MM 1
#include "fused_neon.h"
#undef EXL3_I8MM
}  // namespace fused_i8mm
EXL3_END_TARGET
#endif

#include "processor.h"

// One instruction set's kernels.
struct Isa {
  const char* name;
  void (*search)(const SearchJob&, int twice_bits, int threads);
  void (*multiply)(const LinearCall*, int64_t count, int threads, const Fused*, const Matrices*);
  void (*mix)(const MixCall&, int threads);
  void (*rotate)(const RotateCall&, int threads);
  void (*decode)(const DecodeCall&, int threads);
  void (*dequantize)(const DecodeCall&, int threads);
  ManyRows many_rows;        // `MANY_ROWS`
  const Fused* fused;        // null for none
  const Matrices* matrices;  // the same
};

#define EXL3_ISA(name, kernels, products, fused, matrices) \
  {name, kernels::search, products::multiply, kernels::mix, kernels::rotate_rows, kernels::decode_all, kernels::dequantize_all, \
   products::MANY_ROWS, fused, matrices}

// The best that this machine has, or the one that EXL3_CPU_ISA names; null where that is none of this machine's.
const Isa* isa() {
  static const Isa isas[] = {
#if defined(EXL3_X86)
#if defined(EXL3_AMX)
      EXL3_ISA("amx", avx512vnni, avx512vnni, &avx512vnni::FUSED, &amx::MATRICES),
#endif
      EXL3_ISA("avx512vnni", avx512vnni, avx512vnni, &avx512vnni::FUSED, nullptr),
      EXL3_ISA("avx512vlvnni", avx512, avx2, &fused_avx512vlvnni::FUSED, nullptr),
      EXL3_ISA("avx512", avx512, avx2, &fused_avx2::FUSED, nullptr),
#if defined(EXL3_AVX_VNNI)
      EXL3_ISA("avxvnni", avx2, avx2, &fused_avxvnni::FUSED, nullptr),
#endif
      EXL3_ISA("avx2", avx2, avx2, &fused_avx2::FUSED, nullptr),
#elif defined(EXL3_ARM_DOT)
      EXL3_ISA("i8mm", base, base, &fused_i8mm::FUSED, nullptr),
      EXL3_ISA("dotprod", base, base, &fused_dotprod::FUSED, nullptr),
#endif
      EXL3_ISA("base", base, base, nullptr, nullptr),
  };
  const char* wanted = std::getenv("EXL3_CPU_ISA");
  for (const Isa& candidate : isas)
    if ((!wanted || !*wanted || !std::strcmp(wanted, candidate.name)) && has(candidate.name)) return &candidate;
  return nullptr;
}

// `work` with the instruction set in use, and what came of it.
template <typename Work>
int32_t run(int32_t twice_bits, const Work& work) {
  if (!isa()) return NO_SUCH_ISA;
  if (rate_index(twice_bits) < 0) return NO_SUCH_RATE;
  try {
    if constexpr (std::is_same<decltype(work(*isa())), int32_t>::value) return work(*isa());
    work(*isa());
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
  return OK;
}

}  // namespace

EXPORT int32_t exl3_abi_version() { return ABI_VERSION; }

// The name of the instruction set in use, null where EXL3_CPU_ISA names one that this machine lacks.
EXPORT const char* exl3_isa() { return isa() ? isa()->name : nullptr; }

// Whether products of bfloat16 numbers are instructions of this machine.
EXPORT int32_t exl3_multiplies_bfloat16() { return has_bfloat16(); }

// Whether `exl3_linear` is faster here than to decode a weight and to multiply by it, for any number of rows of 16 bits: with AMX
// of our own always, otherwise where torch lacks what `ManyRows` names.
EXPORT int32_t exl3_multiplies_many_rows() {
  const Isa* used = isa();
  if (!used) return 0;
#if defined(EXL3_X86)
  if (used->many_rows == WITHOUT_AMX) return used->matrices || !has_amx();
#endif
  return used->many_rows == WITHOUT_BFLOAT16 && !has_bfloat16();
}

// The parallel regions of the OpenMP library that torch computes on, null for none.
EXPORT void exl3_use_openmp(void* region) { parallel_region = reinterpret_cast<ParallelRegion>(region); }

// `search.reference_kernel`: `tiles` [count, 256] and `values` [65536] are int16 if `are_words`, otherwise fp32; `states`
// [count, 256], of which the first is -1 in tiles whose costs saturated. `levels` [128] or null: all that `values` has. `window`
// is 128 at most.
EXPORT int32_t exl3_search(const void* tiles, int64_t count, int32_t twice_bits, const void* values, int32_t are_words,
                           const int16_t* levels, int32_t window, int32_t* states, int32_t threads) {
  SearchJob job{tiles, are_words != 0, count, values, levels, window, states, {}};
  return run(twice_bits, [&](const Isa& isa) { isa.search(job, twice_bits, threads); });
}

// `ops.linear` for each of `count` calls, which share the threads.
EXPORT int32_t exl3_linear(const LinearCall* calls, int64_t count, int32_t threads) {
  for (int64_t i = 0; i < count; ++i)
    if (rate_index(calls[i].trellis.twice_bits) < 0) return NO_SUCH_RATE;
  if (input_bits_wanted() < 0) return NO_SUCH_INPUT_BITS;
  return run(RATES[0], [&](const Isa& isa) { isa.multiply(calls, count, threads, isa.fused, isa.matrices); });
}

// `ops.grouped_linear` for each of `count` calls, which share the threads: for their groups of at most `most` rows.
EXPORT int32_t exl3_grouped_linear(const GroupedCall* calls, int64_t count, int32_t threads) {
  auto advance = [](Rows& rows, int64_t elements) {
    if (rows.data) rows.data = static_cast<char*>(rows.data) + elements * (rows.dtype == FLOAT32 ? 4 : 2);
  };
  return run(RATES[0], [&](const Isa&) -> int32_t {
    std::vector<LinearCall> products;
    for (const GroupedCall* call = calls; call < calls + count; ++call) {
      const LinearCall& first = call->first;
      for (int64_t row = 0; first.places && row < first.rows; ++row)
        if (first.places[row] < 0 || first.places[row] >= first.rows) return NO_SUCH_ROWS;
      for (int64_t group = 0; group < call->groups; ++group) {
        const int64_t* range = call->ranges + group * call->group_stride;
        int64_t begin = range[0], end = range[call->end_stride];
        if (begin < 0 || end < begin || end > first.rows) return NO_SUCH_ROWS;
        if (begin == end || end - begin > call->most) continue;
        LinearCall one = first;
        one.rows = end - begin;
        if (one.places) {
          one.places += begin;
        } else {
          advance(one.x, begin * one.x.stride);
          advance(one.y, begin * one.y.stride);
        }
        advance(one.suh, group * call->suh);
        advance(one.svh, group * call->svh);
        advance(one.bias, group * call->bias);
        one.trellis.data += group * call->trellis;
        products.push_back(one);
      }
    }
    return exl3_linear(products.data(), int64_t(products.size()), threads);
  });
}

// A counting sort of the rows of a mixture by their experts, `numbers` [count] of which are below 0 or not below `experts` for none:
// to `order` [count] the rows of each expert, in order, from `ranges` [experts, 2] first to last, and then those of none. Returns
// how many are of an expert.
EXPORT int64_t exl3_route(const int64_t* numbers, int64_t count, int64_t experts, int64_t* order, int64_t* ranges) {
  auto is_one = [&](int64_t number) { return number >= 0 && number < experts; };
  std::fill_n(ranges, 2 * experts, 0);
  for (int64_t row = 0; row < count; ++row)
    if (is_one(numbers[row])) ++ranges[2 * numbers[row] + 1];
  int64_t routed = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    int64_t rows = ranges[2 * expert + 1];
    ranges[2 * expert] = ranges[2 * expert + 1] = routed;
    routed += rows;
  }
  for (int64_t row = 0, others = routed; row < count; ++row)
    order[is_one(numbers[row]) ? ranges[2 * numbers[row] + 1]++ : others++] = row;
  return routed;
}

// Weighted sums of rows.
EXPORT int32_t exl3_mix(const MixCall* call, int32_t threads) {
  return run(RATES[0], [&](const Isa& isa) { isa.mix(*call, threads); });
}

// `hadamard` of rows that are scaled before and after.
EXPORT int32_t exl3_rotate(const RotateCall* call, int32_t threads) {
  return run(RATES[0], [&](const Isa& isa) { isa.rotate(*call, threads); });
}

// `format.decode`, transposed.
EXPORT int32_t exl3_decode(const DecodeCall* call, int32_t threads) {
  return run(call->trellis.twice_bits, [&](const Isa& isa) { isa.decode(*call, threads); });
}

// `ops.dequantize`.
EXPORT int32_t exl3_dequantize(const DecodeCall* call, int32_t threads) {
  return run(call->trellis.twice_bits, [&](const Isa& isa) { isa.dequantize(*call, threads); });
}
