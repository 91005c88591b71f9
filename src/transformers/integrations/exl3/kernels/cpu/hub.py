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
"""The compiled CPU kernels as a kernel of the hub's, which the `kernels` package downloads and verifies."""

import os
from pathlib import Path

from .....utils import logging
from .....utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available


logger = logging.get_logger(__name__)

REPOSITORY = "kernels-community/exl3-cpu"


def library(abi_version: int) -> Path:
    """
    The library of the hub's kernel for this machine, downloaded if need be.

    `LOCAL_KERNELS="kernels-community/exl3-cpu=<folder>"` takes it from a folder, and `USE_HUB_KERNELS=0` does without, as for
    all kernels.

    Args:
        abi_version (`int`): The version of the kernel to ask for, which is the number of its ABI.

    Returns:
        `Path`: The file.

    Raises:
        FileNotFoundError: If there is none to be had; the message says why.
    """
    if not is_kernels_available():
        raise FileNotFoundError(
            f"`pip install 'kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}'` is needed for that"
        )
    from kernels import get_kernel

    from .... import hub_kernels

    if not hub_kernels._kernels_enabled:
        raise FileNotFoundError("USE_HUB_KERNELS forbids kernels of the hub's")
    try:
        # Named, since the package would look for a kernel of the GPU that torch is built for.
        kernel = get_kernel(
            REPOSITORY,
            version=abi_version,
            backend="cpu",
            user_agent={"framework": "transformers", "repo_id": REPOSITORY},
            trust_remote_code=hub_kernels.ALLOW_ALL_KERNELS,
        )
    except Exception as error:  # of the network, the hub, the package or the kernel: the message has it
        is_wanted = REPOSITORY in os.environ.get("LOCAL_KERNELS", "")
        (logger.warning if is_wanted else logger.info)(f"The EXL3 kernels of {REPOSITORY} cannot be loaded: {error}")
        raise FileNotFoundError(f"{REPOSITORY} cannot be loaded: {error}") from error
    return Path(kernel.library)
