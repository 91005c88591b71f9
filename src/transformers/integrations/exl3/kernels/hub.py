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
"""Kernels of the hub's, which the `kernels` package downloads and verifies."""

import os
from types import ModuleType

from ....utils import logging
from ....utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available


logger = logging.get_logger(__name__)


def load(repository: str, version: int, backend: str | None = None) -> ModuleType:
    """
    A kernel for this machine, downloaded if need be.

    `LOCAL_KERNELS="<repository>=<folder>"` takes it from a folder, and `USE_HUB_KERNELS=0` does without, as for all kernels.

    Args:
        repository (`str`): Where it is on the hub.
        version (`int`): Which version to ask for.
        backend (`str`, *optional*): What it has to be built for, by default the accelerator that torch is built for.

    Returns:
        `ModuleType`: The kernel.

    Raises:
        FileNotFoundError: If there is none to be had; the message says why.
    """
    if not is_kernels_available():
        raise FileNotFoundError(
            f"`pip install 'kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}'` is needed for {repository}"
        )
    from kernels import get_kernel

    from ... import hub_kernels

    if not hub_kernels._kernels_enabled:
        raise FileNotFoundError(f"USE_HUB_KERNELS forbids {repository}")
    try:
        return get_kernel(
            repository,
            version=version,
            backend=backend,
            user_agent={"framework": "transformers", "repo_id": repository},
            trust_remote_code=hub_kernels.ALLOW_ALL_KERNELS,
        )
    except Exception as error:  # of the network, the hub, the package or the kernel: the message has it
        is_wanted = repository in os.environ.get("LOCAL_KERNELS", "")
        (logger.warning if is_wanted else logger.info)(f"The EXL3 kernels of {repository} cannot be loaded: {error}")
        raise FileNotFoundError(f"{repository} cannot be loaded: {error}") from error
