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
EXL3, the trellis-coded weight format of exllamav3 (a variant of QTIP, arXiv 2406.11235).

The files from the ground up. A file imports from the lines above its own, never from below or beside; a test holds this.

| files                                          | what                                                                   |
|------------------------------------------------|------------------------------------------------------------------------|
| format, stored                                 | the format as an executable specification; safetensors files           |
| search                                         | the search of the trellis as its definition                            |
| encoder, kernels                               | a matrix to EXL3; the compiled and the Triton kernels, a door each     |
| feedback                                       | a matrix to EXL3 with data                                             |
| ops, encoding                                  | the operators, and the choice of what computes them and what encodes   |
| grouped                                        | those of experts                                                       |
| weight                                         | the weight of a layer as others see it                                 |
| modules, progress                              | what stands in a model; the bar while it is quantized                  |
| experts, embeddings                            | the same of mixtures and of tables                                     |
| data_parallel                                  | replicas that are trained together                                     |
| architecture, checkpoint, allocation           | what a model is like, what files hold, rates                           |
| naming, stacks                                 | what upstream's renamings do not lead back to; experts in files        |
| restoring, selection                           | what files lack; which layers stay as they are                         |
| building                                       | modules of a checkpoint's tensors                                      |
| planning, placement                            | what becomes what: of a float model, of a checkpoint's tensors         |
| scratch                                        | a folder for files on their way, which one has at a time               |
| loading, saving, parallel                      | a checkpoint's tensors on their way, writing, several processes        |
| finished, text                                 | where quantized layers go; the tokens that data are                    |
| quantizing                                     | a float model's tensors on their way                                   |
| sensitivity                                    | what errors of each layer count: where bits are spent with data        |
| calibration                                    | a float model with data: quantized while it reads                      |
| conversion                                     | what a conversion has of its own while it is not finished              |
| convert                                        | the command, float files to EXL3 files: not in a first pull request    |

`quantizers/quantizer_exl3.py` is policy: it asks these in the order of upstream's loading.
"""

from . import data_parallel, saving  # let `DistributedDataParallel` and `save_pretrained` know quantized models
from .experts import separate_experts
from .loading import replace_with_exl3_modules
from .modules import Exl3Linear


__all__ = ["Exl3Linear", "replace_with_exl3_modules", "separate_experts"]
