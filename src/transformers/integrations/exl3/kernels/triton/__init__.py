# Copyright 2026 The HuggingFace Team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The Triton kernels. Their door is `gpu.py`; the files beside it import Triton, and only the door imports them, when it needs them: what it
calls is `calls.py`.

`codes` decodes a trellis in registers; `dequantize`, `linear` (with `hadamard`, the rotations) and `search` are kernels built on
it; `target` is what they need to know of a device.
"""
