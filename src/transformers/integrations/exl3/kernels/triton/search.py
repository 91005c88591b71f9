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
The trellis search in Triton: `search.reference_kernel`, to the same states.

A program searches a few tiles at a time, which share the values that it reads. Each of its threads takes a run of nodes that
follow each other, and for each of them the least over all choices, in registers. The costs of all nodes after a step, a
*row*, pass through memory to the next step. The rows of all steps are kept instead of back-pointers, and the traceback chooses
again at each node that it comes to. There are only so many programs as there is scratch memory for; each takes tiles in turn.

Integer costs are the lowest digits of fp32 numbers from 2^23 on, which are whole and exact. A state takes three
instructions: a difference, a product to which the cost is added, and a minimum. The words that weights and values are
rounded to begin at 2^23, too, or at 2^15 and are 1/256 each: the square of a difference is then a cost of 8 bits with a
fraction, which is cut off where the cost so far is added, by an instruction of NVIDIA's that rounds towards zero. Elsewhere
that takes two more.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ... import format, search
from .target import Target


SCRATCH_BYTES = 1 << 30  # for the rows of all programs
THREADS = {2: 512, 4: 256, 8: 128}  # of a program, by the largest rate: high ones have few nodes
PROCESSOR_THREADS = 512  # of all programs of a processor: what 128 registers a thread leave room for
MAX_TILES = 4  # of a program. UNMEASURED, as all of these
MAX_OUTPUT_BITS = 4  # of a thread's nodes. With 4 tiles, 2^4 need 128 registers; 2^3 need 80 and 4 % more instructions

_STATE_BITS, _STATES = tl.constexpr(format.STATE_BITS), tl.constexpr(format.NUM_STATES)
_WHOLE = tl.constexpr(0x4B000000)  # the bits of 2^23, from which on fp32 numbers are whole
_BYTE_COST_WORDS = tl.constexpr(0x47000000)  # the bits of 2^15, from which on they are 2^-8 apart
_PTX_COST = tl.constexpr("fma.rz.f32 $0, $1, $1, $2;")
_AHEAD = tl.constexpr(4)  # choices whose costs and values are read at a time


@triton.jit
def _relaxed(best, cost, values, weight, LIMIT: tl.constexpr, PTX: tl.constexpr):
    """The lower of the costs `best` and of those of going on with `values` from where a row says that the cost is `cost`."""
    if LIMIT != 0:
        cost = (cost.to(tl.int32) | _WHOLE).to(tl.float32, bitcast=True)
    relaxed = ()
    for index in tl.static_range(len(values)):
        difference = values[index] - weight
        if LIMIT == 0:
            extended = difference * difference + cost
        elif PTX:
            extended = tl.inline_asm_elementwise(
                _PTX_COST, "=f,f,f", [difference, cost], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            extended = tl.floor(difference * difference) + cost
        relaxed = relaxed + (tl.minimum(best[index], extended),)
    return relaxed


@triton.jit
def _values(table, choice, part, OUTPUTS: tl.constexpr, PARTS: tl.constexpr, LIMIT: tl.constexpr):
    """The values of the states that lead to each of a thread's nodes by one choice."""
    FROM: tl.constexpr = _BYTE_COST_WORDS if LIMIT < 256 else _WHOLE
    values = ()
    if LIMIT == 0:
        for output in tl.static_range(OUTPUTS):
            values = values + (tl.load(table + (choice * OUTPUTS + output) * PARTS + part),)
    else:
        for pair in tl.static_range(OUTPUTS // 2):
            words = tl.load(table + (choice * (OUTPUTS // 2) + pair) * PARTS + part).to(tl.uint32, bitcast=True)
            low, high = (words & 0xFFFF) | FROM, (words >> 16) | FROM
            values = values + (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return values


@triton.jit
def _renormalized(cost, offset, LIMIT: tl.constexpr):
    """The cost of a node as it goes into a row."""
    if LIMIT == 0:
        renormalized = cost
    else:
        whole = cost.to(tl.int32, bitcast=True) - _WHOLE
        renormalized = tl.where(whole == LIMIT, whole, tl.maximum(whole - offset, 0))
    return renormalized


@triton.jit
def _joined(parts, BITS: tl.constexpr, THREADS: tl.constexpr):
    """The 2^BITS tensors `parts` `[THREADS]` as one, element by element: `[THREADS * 2^BITS]`."""
    for _ in tl.static_range(BITS):
        pairs = ()
        for index in tl.static_range(len(parts) // 2):
            pairs = pairs + (tl.join(parts[index], parts[index + len(parts) // 2]),)
        parts = pairs
    return tl.reshape(parts[0], (THREADS << BITS,))


@triton.jit
def _step(
    row,
    next_row,
    row_stride,
    weights,
    offsets,
    table,
    SHIFT: tl.constexpr,
    CHOICE_BITS: tl.constexpr,
    OUTPUT_BITS: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
    LIMIT: tl.constexpr,
    UNREACHED: tl.constexpr,
    PTX: tl.constexpr,
):
    """From the costs in `row` to those in `next_row`, of TILES tiles each. Returns the least of either, where whole."""
    OUTPUTS: tl.constexpr = 1 << OUTPUT_BITS
    PARTS: tl.constexpr = _STATES >> (CHOICE_BITS + OUTPUT_BITS)
    HEADS: tl.constexpr = _STATES >> (CHOICE_BITS + SHIFT)  # nodes of the row that have a choice in common
    AHEAD: tl.constexpr = min(_AHEAD, 1 << CHOICE_BITS)
    least = ()
    for _ in tl.static_range(TILES):
        least = least + (tl.full((THREADS,), LIMIT, tl.int32),)
    for begin in range(0, PARTS, THREADS):
        part = begin + tl.arange(0, THREADS)
        head = part >> (SHIFT - OUTPUT_BITS)
        best = ()
        for _ in tl.static_range(TILES):
            of_tile = ()
            for _ in tl.static_range(OUTPUTS):
                of_tile = of_tile + (tl.full((THREADS,), UNREACHED, tl.float32),)
            best = best + (of_tile,)
        for first in range(0, 1 << CHOICE_BITS, AHEAD):
            for ahead in tl.static_range(AHEAD):
                choice = first + ahead
                values = _values(table, choice, part, OUTPUTS, PARTS, LIMIT)
                better = ()
                for tile in tl.static_range(TILES):
                    cost = tl.load(row + tile * row_stride + choice * HEADS + head)
                    better = better + (_relaxed(best[tile], cost, values, weights[tile], LIMIT, PTX),)
                best = better
        lower = ()
        for tile in tl.static_range(TILES):
            low = least[tile]
            costs = ()
            for output in tl.static_range(OUTPUTS):
                cost = _renormalized(best[tile][output], offsets[tile], LIMIT)
                if LIMIT != 0:
                    low = tl.minimum(low, cost)
                costs = costs + (cost.to(next_row.dtype.element_ty),)
            lower = lower + (low,)
            nodes = begin * OUTPUTS + tl.arange(0, THREADS * OUTPUTS)
            tl.store(next_row + tile * row_stride + nodes, _joined(costs, OUTPUT_BITS, THREADS))
        least = lower
    tl.debug_barrier()
    offsets = ()
    for tile in tl.static_range(TILES):
        offsets = offsets + (0 if LIMIT == 0 else tl.min(least[tile], axis=0),)
    return offsets


@triton.jit
def _cheapest(row, row_stride, TILES: tl.constexpr, THREADS: tl.constexpr, NODES: tl.constexpr):
    """The first of the nodes of a row that cost least, for each of TILES tiles."""
    costs = row + tl.arange(0, TILES)[:, None] * row_stride
    node = tl.arange(0, THREADS)[None, :]
    least = tl.load(costs + node).to(tl.float32)
    cheapest = node + tl.zeros((TILES, THREADS), tl.int32)
    for begin in range(THREADS, NODES, THREADS):
        cost = tl.load(costs + begin + node).to(tl.float32)
        cheapest = tl.where(cost < least, begin + node, cheapest)
        least = tl.minimum(least, cost)
    return tl.min(tl.where(least == tl.min(least, axis=1)[:, None], cheapest, NODES), axis=1)


@triton.jit(do_not_specialize=["count", "length", "window", "kept"])
def _search(
    weights,
    values,
    even_table,
    odd_table,
    rows,
    states,
    count,
    length,
    window,
    kept,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    EVEN_OUTPUT_BITS: tl.constexpr,
    ODD_OUTPUT_BITS: tl.constexpr,
    TILES: tl.constexpr,
    THREADS: tl.constexpr,
    LIMIT: tl.constexpr,
    PTX: tl.constexpr,
):
    NODES: tl.constexpr = _STATES >> EVEN  # before the first step, and at most
    UNREACHED: tl.constexpr = LIMIT + 2.0**23 if LIMIT else float("inf")
    PERIOD: tl.constexpr = 1 if EVEN == ODD else 2
    row_stride = TILES * NODES
    rows += tl.program_id(0).to(tl.int64) * kept * row_stride
    of_tile = tl.arange(0, TILES) * NODES
    for first in range(tl.program_id(0) * TILES, count, tl.num_programs(0) * TILES):
        tiles = tl.minimum(first + tl.arange(0, TILES), count - 1).to(tl.int64)
        node = tl.full((TILES,), -1, tl.int32)  # where the path begins and ends, if that is known
        saturated = tl.zeros((TILES,), tl.int1)
        for search_index in range(2):
            is_last = search_index == 1  # of two: the first is for the node between the last and the first weight
            steps, start = tl.where(is_last, length, 2 * window), tl.where(is_last, 0, length - window)

            for begin in range(0, NODES, THREADS):
                nodes = begin + tl.arange(0, THREADS)[None, :]
                is_start = (node < 0)[:, None] | (node[:, None] == nodes)
                unreached: tl.constexpr = LIMIT if LIMIT else float("inf")
                tl.store(rows + of_tile[:, None] + nodes, tl.where(is_start, 0, unreached).to(rows.dtype.element_ty))
            tl.debug_barrier()

            offsets = ()
            for _ in tl.static_range(TILES):
                offsets = offsets + (0,)
            for step in range(0, steps, PERIOD):
                for odd in tl.static_range(PERIOD):
                    row = rows + (step + odd) * row_stride
                    place = start + step + odd
                    place = tl.where(place < length, place, place - length)
                    now = ()
                    for tile in tl.static_range(TILES):
                        now = now + (
                            tl.load(weights + tl.minimum(first + tile, count - 1).to(tl.int64) * length + place),
                        )
                    offsets = _step(
                        row,
                        row + row_stride,
                        NODES,
                        now,
                        offsets,
                        odd_table if odd else even_table,
                        ODD if odd else EVEN,
                        EVEN if odd else ODD,
                        ODD_OUTPUT_BITS if odd else EVEN_OUTPUT_BITS,
                        TILES,
                        THREADS,
                        LIMIT,
                        UNREACHED,
                        PTX,
                    )

            if not is_last:
                node = _cheapest(rows + steps * row_stride, NODES, TILES, THREADS, NODES)
            # Traceback: the first of the cheapest candidates for each node, as the steps had them.
            choices = tl.arange(0, 1 << ODD)[None, :]
            for step in range(steps - 1, tl.where(is_last, 0, window) - 1, -1):
                parity = step & 1
                shift, choice_bits = EVEN + parity * (ODD - EVEN), ODD - parity * (ODD - EVEN)
                place = start + step
                place = tl.where(place < length, place, place - length)
                is_choice = (choices < (1 << choice_bits)) & (node >= 0)[:, None]
                candidates = (choices << (_STATE_BITS - choice_bits)) | node[:, None]
                cost = tl.load(
                    rows + step * row_stride + of_tile[:, None] + (candidates >> shift), mask=is_choice, other=0
                )
                value = tl.load(values + candidates, mask=is_choice, other=0.0)
                weight = tl.load(weights + tiles * length + place)
                reached = _relaxed((UNREACHED,), cost, (value,), weight[:, None], LIMIT, PTX)[0]
                reached = tl.where(is_choice, reached, float("inf"))
                best = tl.min(reached, axis=1)
                if LIMIT:
                    saturated |= best == UNREACHED
                choice = tl.min(tl.where(reached == best[:, None], choices, 1 << ODD), axis=1)
                state = (choice << (_STATE_BITS - choice_bits)) | node
                marked = tl.where(saturated & (step == 0), -1, state)
                if is_last:
                    tl.store(states + tiles * length + step, marked)
                node = state >> shift
            tl.debug_barrier()


@dataclass(frozen=True)
class SearchOptions:
    """
    How the search is compiled: tiles of a program, its threads and, for even and odd weights, the bits of a thread's nodes.
    And how many programs a processor has registers for, and what else the compiler is told.
    """

    tiles: int
    threads: int
    output_bits: tuple[int, int]
    programs: int = 1
    extra: tuple[tuple[str, int], ...] = ()


def _added(bits):
    """The bits that even and odd weights add to the stream."""
    return int(bits), int(2 * bits) - int(bits)


@lru_cache
def choose_search(bits: float, kept_bytes: int, target: Target) -> SearchOptions:
    """How to search at a rate on `target`, where `kept_bytes` are needed for the rows of a tile."""
    even, odd = _added(bits)
    if target.backend == "interpreter":  # few operations on large tensors
        return SearchOptions(1, format.NUM_STATES >> odd + 1, (1, 1))
    tiles = max(1, min(MAX_TILES, SCRATCH_BYTES // (target.processors * kept_bytes)))
    tiles = 1 << tiles.bit_length() - 1
    threads = next(threads for largest, threads in THREADS.items() if bits <= largest)
    output_bits = tuple(
        min(MAX_OUTPUT_BITS, shift, (format.NUM_STATES >> choice_bits).bit_length() - threads.bit_length())
        for shift, choice_bits in ((even, odd), (odd, even))
    )
    # For Blackwell the compiler takes up to 254 registers a thread.
    programs = max(1, (PROCESSOR_THREADS // 2 if target.capability >= 100 else PROCESSOR_THREADS) // threads)
    # Left alone, NVIDIA's assembler sometimes takes a few too few and spills, or twice as many. Told so, it spills from Hopper
    # on where it needs all of them.
    is_limited = target.ptx and (target.capability < 90 or tiles << max(output_bits) < 64)
    extra = (("maxnreg", 128),) if is_limited else ()
    return SearchOptions(tiles, threads, output_bits, programs, extra)


def kernel(
    tiles: torch.Tensor, values: torch.Tensor, levels: torch.Tensor | None, bits: float, window: int, target: Target
) -> torch.Tensor:
    """
    `search.reference_kernel`, for rings of any even length of at least `2 * window`.

    Args:
        target (`Target`): The device that the tensors are on. The others are those of `search.reference_kernel`.
    """
    states = torch.empty(tiles.shape, dtype=torch.int32, device=tiles.device)
    if not states.numel():
        return states
    count, length = tiles.shape
    even, odd = _added(bits)
    limit = search.saturated_cost(bits) if values.dtype is torch.int16 else 0
    cost_dtype = torch.float32 if not limit else torch.uint8 if limit < 256 else torch.uint16
    kept = max(length, 2 * window) + 1
    kept_bytes = kept * (format.NUM_STATES >> even) * cost_dtype.itemsize
    options = choose_search(bits, kept_bytes, target)
    program_bytes = options.tiles * kept_bytes
    programs = min(
        triton.cdiv(count, options.tiles),
        max(1, SCRATCH_BYTES // program_bytes),
        target.processors * options.programs,
    )
    rows = torch.empty(programs * program_bytes // cost_dtype.itemsize, dtype=cost_dtype, device=tiles.device)
    tables = [_arranged(values, *both) for both in zip((odd, even), options.output_bits)]
    if limit:
        tiles, values = (_as_numbers(words, 2.0**15 if limit < 256 else 2.0**23) for words in (tiles, values))
    _search[(programs,)](
        tiles.contiguous(),
        values.contiguous(),
        *tables,
        rows,
        states,
        count,
        length,
        window,
        kept,
        EVEN=even,
        ODD=odd,
        EVEN_OUTPUT_BITS=options.output_bits[0],
        ODD_OUTPUT_BITS=options.output_bits[1],
        TILES=options.tiles,
        THREADS=options.threads,
        LIMIT=limit,
        PTX=target.ptx,
        num_warps=options.threads // target.warp,
        enable_fp_fusion=False,  # costs are rounded after each operation
        **dict(options.extra),
    )
    return states


def _as_numbers(words, first):
    """int16 `words` as fp32 numbers from `first` on, the smallest of which that is, each a step of such numbers further."""
    return (words.int() + 2**15) * (first * 2.0**-23) + first


def _arranged(values, choice_bits, output_bits):
    """
    The values of all states as `_step` reads them: fp32 `[choices, outputs, parts]`, or unsigned words of 16 bits, those of
    two outputs in an int32 `[choices, outputs / 2, parts]`.
    """
    if values.dtype is torch.float32:
        return values.view(1 << choice_bits, -1, 1 << output_bits).transpose(1, 2).contiguous()
    pairs = (values ^ -(2**15)).view(1 << choice_bits, -1, 1 << output_bits - 1, 2)
    return pairs.transpose(1, 2).contiguous().view(torch.int32)
