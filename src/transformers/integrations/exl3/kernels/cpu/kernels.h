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

// Every kernel, compiled once for each instruction set: cpu.cpp includes this file inside a namespace of its name, after the
// operations that the kernels are built from, with EXL3_LANES floats in a vector.

#include "rotation.h"

#if EXL3_VNNI
#include "windows_avx512.h"

#include "rows_pairs.h"

#include "linear.h"
#elif EXL3_LANES == 8
#include "windows_avx2.h"

#include "rows_pairs.h"

#include "linear.h"
#elif EXL3_LANES < 8
#include "rows.h"

#include "linear.h"
#endif  // AVX-512 without VBMI takes the products of AVX2

#include "mix.h"

#include "dense.h"

#include "search.h"
