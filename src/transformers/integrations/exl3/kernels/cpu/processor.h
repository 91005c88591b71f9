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

// Which of the instruction sets that something is compiled for this processor has. cpu.cpp includes this file.

#if defined(EXL3_ARM_DOT)
// Whether this machine has what macOS calls `name`, and Linux a bit of its first or second word of capabilities.
bool has_arm([[maybe_unused]] const char* name, [[maybe_unused]] bool is_second, [[maybe_unused]] unsigned long bit) {
#if defined(__APPLE__)
  int there = 0;
  size_t size = sizeof there;
  return !sysctlbyname(name, &there, &size, nullptr, 0) && there;
#elif defined(__linux__)
  return (getauxval(is_second ? AT_HWCAP2 : AT_HWCAP) & bit) != 0;
#else
  return false;
#endif
}
#endif

#if defined(EXL3_X86)
// Whether matrices of bfloat16 numbers are multiplied by one instruction here.
bool has_amx() {
  static const bool found = [] {  // asked once: virtual machines take microseconds to answer
    unsigned eax, ebx, ecx, edx = 0;
    constexpr unsigned AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24;  // of leaf 7, in edx
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx & AMX_BF16 && edx & AMX_TILE;
  }();
  return found;
}
#endif

#if defined(EXL3_AMX)
// Asks Linux for the registers of AMX, which it gives to processes that do.
bool may_use_amx() {
  constexpr long REQUEST = 0x1023, REGISTERS = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
  static const bool given = has_amx() && syscall(SYS_arch_prctl, REQUEST, REGISTERS) == 0;
  return given;
}
#endif

// Whether this machine has the instruction set that EXL3_CPU_ISA calls `name`.
bool has(const char* name) {
  auto is = [&](const char* other) { return !std::strcmp(name, other); };
#if defined(EXL3_X86)
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  unsigned eax = 0, ebx, ecx, edx;
  constexpr unsigned AVX_VNNI = 1 << 4;  // of leaf 7, part 1, in eax
#if defined(EXL3_AMX)
  if (is("amx")) return vnni && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") && may_use_amx();
#endif
  if (is("avx512vnni")) return vnni && __builtin_cpu_supports("avx512vbmi");
  if (is("avx512vlvnni")) return vnni;
  if (is("avx512")) return avx512;
  if (is("avxvnni")) return avx2 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & AVX_VNNI;
  if (is("avx2")) return avx2;
#elif defined(EXL3_ARM_DOT)
  constexpr unsigned long DOTPROD = 1 << 20, I8MM = 1 << 13;  // Linux's HWCAP_ASIMDDP and HWCAP2_I8MM
  bool dotprod = has_arm("hw.optional.arm.FEAT_DotProd", false, DOTPROD);
  if (is("i8mm")) return dotprod && has_arm("hw.optional.arm.FEAT_I8MM", true, I8MM);
  if (is("dotprod")) return dotprod;
#endif
  return is("base");
}

// Whether products of bfloat16 numbers are instructions.
bool has_bfloat16() {
#if defined(EXL3_X86)
  return __builtin_cpu_supports("avx512bf16") != 0;
#elif defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#else
  return false;
#endif
}
