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
The tensors of experts, which lie anywhere in memory, as one kernel takes them: a table of their addresses on the device.

A table is made, and copied to the device, the first time that a set of tensors is met. It is found again by the addresses
that are in it, so that it cannot be out of date.
"""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


MAX_TABLES = 1024  # three for each layer of a model, and nothing piles up where tensors move at every step
_in_graphs = {}  # the tables that CUDA graphs read, of which these know no more than the address


def kinds(trellis, suh, svh, bias, codebooks) -> list[list[int]]:
    """
    The experts, by what they have to share for one kernel: codebook, sizes, dtypes, and strides of the trellis, whose address
    has to be one of a word. The other tensors are contiguous.
    """
    found = defaultdict(list)
    for expert, (codebook, codes) in enumerate(zip(codebooks, trellis)):
        others = (suh[expert], svh[expert], *bias[expert : expert + 1])
        key = (codebook, codes.shape, codes.stride(), codes.dtype, codes.data_ptr() % 4)
        found[key + tuple((tensor.numel(), tensor.dtype) for tensor in others)].append(expert)
    return list(found.values())


def table_of(members: list[int], lists: list[list[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """
    The addresses of the tensors of some experts.

    Args:
        members (`list[int]`): The numbers of these experts.
        lists (`list[list[torch.Tensor]]`): `trellis`, `suh`, `svh` and `bias` of all experts, or nothing for `bias`.
        device (`torch.device`): Where the tensors are.

    Returns:
        `torch.Tensor`: int64 `[4, experts]` on `device`, 0 for what is not there and for experts that are not `members`.

    Raises:
        RuntimeError: For new addresses while a CUDA graph is captured, when nothing can be copied from the host.
    """
    chosen, experts = set(members), range(len(lists[0]))
    addresses = tuple(
        tuple(tensors[expert].data_ptr() if tensors and expert in chosen else 0 for expert in experts)
        for tensors in lists
    )
    table = _table(addresses, device)
    if is_capturing(device):
        _in_graphs[addresses, device] = table
    elif device.type != "cpu":
        # The cache may drop the table before this stream is done with it.
        table.record_stream(torch.get_device_module(device).current_stream(device))
    return table


@lru_cache(maxsize=MAX_TABLES)
def _table(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    if is_capturing(device):
        raise RuntimeError(
            "EXL3 experts in a CUDA graph: these tensors have not been multiplied yet, and their addresses cannot be copied to "
            "the device while a graph is captured. Run the model once before, with its weights where they will stay (not "
            "offloaded, and not with the packed signs `su` and `sv` of old files)."
        )
    # In a thread of its own, where the allocator does not take the memory pool of a graph that this one prepares.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch.tensor, addresses, dtype=torch.int64, device=device).result()


def is_capturing(device: torch.device) -> bool:
    """Whether what runs on `device` now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
