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
Quantizing a weight to EXL3 with data: the search of encoder.py, in which each strip of 16 inputs makes up for the errors of
the strips before it, as far as the inputs' second moments say that it can.

With `M` the weight `[in, out]`, `H` the mean of `x x^T` over inputs `x`, and `E` the error of the regular matrix that is searched
(`M = diag(suh) B C B diag(svh)`, where `B` is the rotation), the squared error of the outputs is `tr(E^T Hc E)` with
`Hc = B diag(suh) H diag(suh) B`, a column of `E` weighted by its `svh`. Block LDL decomposition (`Hc = L D L^T`, unit block lower) makes a
sum of one term a strip of it: `(E_r + sum over later s of L_sr^T E_s)`, weighted by `D_r`. Hence strips are searched from the last to the
first, each for its target plus the feedback of those done. This is what LDLQ and GPTQ do (arXiv 2307.13304, 2210.17323).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import encoder, format
from .format import hadamard
from .search import search_reference


# All figures: Gemma 3 270M, 3 bits. Those in dB: output error on unseen text, 14 layers.
# Of the mean of the diagonal, on the diagonal: as good as .025 and .1; .001 is 0.2 dB worse, 1 is 0.6 dB.
DAMPING = 0.05
# To the diagonal. The first is 0.1 dB better than none on text of another domain; the others are for moments of no matrix.
SHRINKAGES = (0.1, 0.5, 1.0)
# In `suh`, of the RMS of a weight's rows and of its inputs' energy: 0.1 dB better than the RMS alone.
IN_EXPONENT, INPUT_EXPONENT = 0.75, -0.125
FOLDED_DAMPING = 1e-7  # as DAMPING, once more when the scales are in: they may have taken the first away
# How much to make up for of what inputs have drifted from the float model's: KL divergence on text of the data's domain and of
# another is .630 and .137 at 0, .583 and .114 at .5, .594 and .139 at 1.
DRIFT = 0.5
STRIP_COLUMNS = 1024  # 64 tiles to a search keep the threads of a CPU busy
ACCELERATOR_STRIP_COLUMNS = 1 << 14


class Moments(NamedTuple):
    """
    Second moments of a layer's inputs, means over rows.

    Attributes:
        hessian (`torch.Tensor`): Of `x x^T`, `[in, in]`, floating.
        drift (`torch.Tensor`, *optional*): Of `x (f - x)^T`, where `f` is what `x` is in the model that is not quantized.
    """

    hessian: torch.Tensor
    drift: torch.Tensor | None = None


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """fp32 `x^T y` of `[rows, in]` and `[rows, out]`; of bf16, which is twice as fast, the sums are rounded to it."""
    if x.dtype != torch.bfloat16 or y.dtype != torch.bfloat16:
        x, y = x.float(), y.float()
    return (x.T @ y).float()


def quantize_weight(
    weight: torch.Tensor,
    moments: Moments,
    bits: float,
    codebook: str = "mul1",
    seed: int = 0,
    effort: str = "default",
    search: Callable = search_reference,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Quantize the weight of a linear layer so that its outputs err least. Bytes depend on the order in which matrix products add
    up: on the machine, and on the number of threads.

    Args:
        weight (`torch.Tensor`): `[out, in]`, as in `nn.Linear`, of any floating dtype and any size.
        moments (`Moments`): Of the layer's inputs.
        bits, codebook, seed, effort, search, progress: As of `encoder.quantize_weight`.

    Returns:
        `tuple(torch.Tensor)`: `trellis`, `suh` and `svh`, as of `encoder.quantize_weight`.

    Raises:
        ValueError: As `encoder.quantize_weight`, and for moments of another size or with values that are not finite.
    """
    bits = format.check_bits(bits)
    rms = encoder.input_rms(bits, codebook)
    encoder.check_weight(weight)
    _check(moments, weight.shape[1])
    for shrinkage in SHRINKAGES:
        hessian = _damped(moments.hessian.to(weight.device), shrinkage)
        target = _drifted(weight, hessian, moments)
        if target is None:
            continue
        suh, svh = (s.double() for s in encoder.scales(target, rms, seed, _scale_of(hessian)))
        factor = _factor(hessian, suh)
        del hessian
        if factor is not None:
            break
    hessian, into = _damped(moments.hessian.to(weight.device), shrinkage).float(), factor.shape[0]
    values = format.codebook_values(codebook, weight.device).float()
    trellis = encoder.new_trellis(into, svh.shape[0], bits, weight.device)
    columns = STRIP_COLUMNS if weight.device.type == "cpu" else ACCELERATOR_STRIP_COLUMNS
    for start, strip in encoder.strips(target, columns):
        part = slice(start, start + strip.shape[0])
        regular = encoder.regular(strip, suh, svh[part])

        def code(rows):
            tiles = format.matrix_to_tiles(rows.contiguous())
            states = search(tiles.flatten(0, 1), bits, codebook, effort).view(tiles.shape)
            return format.pack_states(states, bits), format.tiles_to_matrix(values[states])

        trellis[:, start // format.TILE : part.stop // format.TILE], coded = _search_with_feedback(
            regular, factor, code
        )
        decoded = hadamard(hadamard(coded).T.contiguous()) * suh.float()
        weighted = decoded[:, : hessian.shape[0]] @ hessian
        strip = strip[:, : hessian.shape[0]].float()
        svh[part] = encoder.divide(
            (weighted * strip).sum(1).double(), (weighted * decoded[:, : hessian.shape[0]]).sum(1).double()
        )
        if progress is not None:
            progress(max(min(part.stop, weight.shape[0]) - start, 0) * weight.shape[1])
    return trellis, encoder.to_fp16(suh), encoder.to_fp16(svh)


def _check(moments: Moments, in_features: int):
    for name, moment in moments._asdict().items():
        if moment is None:
            continue
        if moment.shape != (in_features, in_features) or not moment.is_floating_point():
            raise ValueError(f"`{name}` of {in_features} inputs is {moment.dtype} {[*moment.shape]}")
        if not moment.isfinite().all():
            raise ValueError(f"`{name}` of the inputs is not finite")


def _damped(hessian: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """float64: shrunk to its diagonal and damped; the unit matrix where all inputs are 0."""
    hessian = hessian.to(torch.float64, copy=True)
    diagonal = hessian.diagonal().clamp_min(0)
    mean = diagonal.mean()
    if mean == 0:
        return torch.eye(hessian.shape[0], dtype=torch.float64, device=hessian.device)
    hessian.mul_(1 - shrinkage).diagonal().copy_(diagonal + DAMPING * mean)
    return hessian


def _drifted(weight: torch.Tensor, hessian: torch.Tensor, moments: Moments) -> torch.Tensor | None:
    """
    The weight whose outputs for the inputs that there are come nearest to the float model's, by the part `DRIFT` of the way; None
    where the damped `hessian` is not positive definite.
    """
    if moments.drift is None:
        return weight
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    weight, lower = weight.detach().float(), lower.float()
    drift = moments.drift.to(weight.device, torch.float32) @ weight.T
    for triangle in (lower, lower.T):  # `cholesky_solve` would copy the factor
        drift = torch.linalg.solve_triangular(triangle, drift, upper=triangle is not lower)
    return weight + DRIFT * drift.T


def _scale_of(hessian: torch.Tensor) -> Callable:
    """What takes the energies of a weight's input channels to their scales, with padding."""
    of_inputs = hessian.diagonal() ** INPUT_EXPONENT

    def scale(energy):
        padded = torch.nn.functional.pad(of_inputs, (0, energy.shape[0] - of_inputs.shape[0]))
        return energy ** (IN_EXPONENT / 2) * padded

    return scale


def _factor(hessian: torch.Tensor, suh: torch.Tensor) -> torch.Tensor | None:
    """
    fp32 `L` `[in, in]` of the damped `hessian` with `suh` in it, `in` with padding; None where that is not positive definite.
    `hessian` is overwritten.
    """
    padding = suh.shape[0] - hessian.shape[0]
    folded = torch.nn.functional.pad(hessian, (0, padding, 0, padding)) if padding else hessian
    folded.mul_(suh).mul_(suh[:, None])
    diagonal = folded.diagonal()
    mean = diagonal.mean()
    if mean == 0:
        return torch.eye(suh.shape[0], device=suh.device)
    # Inputs without a scale: any positive number keeps the matrix invertible, and there is nothing of theirs to err.
    diagonal.copy_(torch.where(suh == 0, mean, diagonal + FOLDED_DAMPING * mean))
    # Strip by strip in place: of wide layers, such a matrix is the largest thing that there is.
    for matrix in (folded, folded.T):
        for rows in matrix.split(format.BLOCK):
            rows.copy_(hadamard(rows))
    lower, failed = torch.linalg.cholesky_ex(folded)
    if failed:
        return None
    for first in range(0, lower.shape[0], format.TILE):
        block = slice(first, first + format.TILE)
        lower[first:, block] = lower[first:, block] @ torch.linalg.inv(lower[block, block])
    return lower.float()


def _search_with_feedback(
    regular: torch.Tensor, factor: torch.Tensor, code: Callable
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        regular (`torch.Tensor`): fp32 `[in, columns]`.
        factor (`torch.Tensor`): fp32 `[in, in]`, unit block lower.
        code (`Callable`): Takes rows `[16, columns]` and returns their packed states `[1, columns/16, 16K]` and what they decode to.

    Returns:
        `tuple(torch.Tensor)`: Packed states `[in/16, columns/16, 16K]` and what they decode to, fp32 `[in, columns]`.
    """
    coded, error, packed = torch.empty_like(regular), torch.zeros_like(regular), []
    for last in range(regular.shape[0], 0, -format.BLOCK):
        first = last - format.BLOCK
        # The feedback of later blocks: one product for eight strips.
        target = regular[first:last] + factor[last:, first:last].T @ error[last:]
        for stop in range(last, first, -format.TILE):
            strip = slice(stop - format.TILE, stop)
            near = factor[stop:last, strip].T @ error[stop:last]
            states, coded[strip] = code(target[strip.start - first : stop - first] + near)
            packed.append(states)
            error[strip] = regular[strip] - coded[strip]
    return torch.cat(packed[::-1]), coded
