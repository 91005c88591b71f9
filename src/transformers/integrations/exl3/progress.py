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
"""What a user sees of quantizing a model: a progress bar, or at once an error where it would take days."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from ...utils import logging
from . import encoding, format
from .search import search_reference


# More weights than these are not quantized by the reference search, which takes minutes for as many on a few CPU cores.
REFERENCE_WEIGHTS = 1 << 18


class Progress:
    """
    The progress bar of a model that is quantized. It appears with the first weight, and is on the screen only while a
    parameter is quantized, so that no message between two of them is written on its line.

    Args:
        weights (`int`): How many there are to quantize.
        bits (`float`): About how many bits per weight, one of `format.BITS`.
        codebook (`str`): One of `format.CODEBOOKS`.
        effort (`str`): One of `search.EFFORTS`.
    """

    def __init__(self, weights: int, bits: float, codebook: str, effort: str):
        self.weights, self.bits, self.codebook, self.effort = weights, bits, codebook, effort
        self._bar, self._skipped = None, 0

    def check(self, device: torch.device):
        """Raise `RuntimeError` where weights on `device` would take too long: where no kernel searches the trellis."""
        if self.weights <= REFERENCE_WEIGHTS or encoding.search_on(device) is not search_reference:
            return
        seconds = self.weights * _seconds_per_weight(device, self.bits, self.codebook, self.effort)
        raise RuntimeError(
            f"Quantizing {self.weights:,} weights to EXL3 on {device} would take about {_duration(seconds)}: there is no kernel "
            "for the trellis search, only the torch reference. Install transformers from source on a machine with a C++ compiler, "
            'or quantize on a GPU with Triton (`device_map="cuda"`).'
        )

    @contextmanager
    def shown(self, device: torch.device) -> Iterator[Callable[[int], None]]:
        """
        Show the bar while a parameter on `device` is quantized; see `check`.

        Yields:
            `Callable`: To be called with the number of weights whenever some are done.
        """
        self.check(device)
        if self._bar is None:
            # Below upstream's own bar, which counts the parameters.
            self._bar = logging.tqdm(
                total=self.weights,
                initial=self._skipped,
                desc="Quantizing to EXL3",
                unit=" weights",
                unit_scale=True,
                position=1,
                mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; logs are not to be filled
            )
        self._bar.refresh()
        try:
            yield self._bar.update
        except BaseException:
            self._bar.leave = False
            self._bar.close()
            raise
        self._bar.clear()
        if self._bar.n == self.weights:
            self._bar.close()

    def skip(self, weights: int):
        """Count `weights` that were quantized before: they are done, and tell nothing of the speed."""
        self._skipped += weights
        if self._bar is not None:
            for counter in ("n", "initial", "last_print_n"):
                setattr(self._bar, counter, getattr(self._bar, counter) + weights)

    def close(self):
        if self._bar is not None:
            self._bar.total = self._bar.n  # modules that the checkpoint lacks stay plain
            self._bar.close()


@lru_cache
def _seconds_per_weight(device, bits, codebook, effort) -> float:
    """What the reference search takes for a weight on this machine."""
    with torch.device(device):  # where the model is planned, that is meta
        tile = torch.randn(1, format.TILE_SIZE)
        start = time.perf_counter()
        search_reference(tile, bits, codebook, effort).cpu()
    return (time.perf_counter() - start) / format.TILE_SIZE


def _duration(seconds: float) -> str:
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} seconds"
