"""routed_experts: all experts of a layer in four launches behind the list of work, which torch operations make on the device.

A tile is pairs of (token, choice) of one expert, in the order of the pairs sorted by expert; its expert's tensors are found by a
table of addresses. Programs leave fp32 sums, which the next launch adds in order: nothing waits for the host, nothing is atomic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pyllmq.triton_kernels.codebook_decode import decode_tile
from pyllmq.triton_kernels.codebook_linear import FP32_DOT, add_product, outlier_product
from pyllmq.triton_kernels.configs import Tile
from pyllmq.triton_kernels.sparse_decode import add_columns, add_groups

ONE_TOKEN = Tile(rows=64, slots=32, tokens=1, warps=4, stages=2, programs=792)
MORE_TOKENS = Tile(rows=64, slots=32, tokens=16, warps=4, stages=2, programs=528)
"""Tiles of codebook_linear at wide columns, which fit every width. Never measured."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared")
MOST_SUM_BYTES = 256 << 20
"""Of fp32 sums between the Linears; more tokens are taken in waves."""

CODEBOOK, GROUPS, BITMAP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Kinds of weights; GROUPS are 2:4, of values or codes."""

FIELDS, WIDTH_FIELDS = tl.constexpr(38), tl.constexpr(4)
"""Of an expert in a table of codebooks: addresses of row_segment, row_scale, outlier_row_offsets, outlier_columns, outlier_values
and outlier_replaced, 0 where there is none; then for each width from 1 on those of codes, columns and codebook, and how many slots.

2:4: addresses of positions, scale and the same four; then of values or codes and codebook, and the bits of a code, 0 of values.
A bitmap: masks, scale, four times 0; then ranks, row_offsets and values."""


class Part(NamedTuple):
    """The experts of one kind in a projection: one launch."""

    table: torch.Tensor
    """int64 [experts, FIELDS], on the device; of other kinds' experts zeros."""
    kind: int
    widths: int
    """Bit b: some expert has columns of b bits, or codes; bit 0: 2:4 of values."""
    values: str
    """Dtype of values, as triton calls it; of codes "uint8"."""
    one_segment: bool
    consecutive: bool
    """Every expert has one width, so that slots are columns."""
    wide: bool
    """Outlier columns, or a bitmap's ranks, are int32, not uint16."""

    def slots(self, tokens: int) -> int:
        """Of a program's tile: columns, or groups of four. With fp32 tokens, 32 groups of 4-bit codes need 16 bytes of stack."""
        if self.kind == BITMAP.value:
            return 64
        return 16 if self.kind == GROUPS.value and self.widths > 1 and tokens > 1 else 32

    def steps(self, columns: int, tokens: int) -> int:
        """Tiles that columns are."""
        slots = triton.cdiv(columns, 4) if self.kind == GROUPS.value else columns
        return triton.cdiv(slots, self.slots(tokens))


class Projection(NamedTuple):
    """One Linear of all experts."""

    parts: tuple[Part, ...]
    bias: torch.Tensor | None
    """fp32 [experts, rows]."""
    experts: int
    rows: int
    columns: int


class Experts(NamedTuple):
    up: Projection
    down: Projection
    activation: int
    """Place in ACTIVATIONS."""
    gated: bool
    interleaved: bool
    limit: float
    alpha: float
    offset: float


class Work(NamedTuple):
    """The list of work by expert."""

    order: torch.Tensor
    """int32 [pairs]: place in the sorted order -> pair."""
    place: torch.Tensor
    """int32 [pairs]: its inverse."""
    tiles: torch.Tensor
    """int32 [3, tiles]: expert, first place, number of pairs, 0 behind the last tile."""


def work_of(index: torch.Tensor, experts: int, tile: int) -> Work:
    """index int64 [pairs]; those of no expert come last and are in no tile. Nothing is read back."""
    inside = (index >= 0) & (index < experts)
    key, order = torch.where(inside, index, experts).sort(stable=True)
    pairs, device = index.shape[0], index.device
    place = torch.empty_like(order).scatter_(0, order, torch.arange(pairs, device=device))
    begin = torch.searchsorted(key, torch.arange(experts + 1, device=device))
    count = begin.diff()
    ends = ((count + tile - 1) // tile).cumsum(0)
    number = torch.arange(min(pairs, experts) + pairs // tile, device=device)
    expert = torch.searchsorted(ends, number, right=True)
    behind = expert >= experts
    expert = expert.clamp_max(experts - 1)
    within = (number - (ends - (count + tile - 1) // tile)[expert]) * tile
    size = (count[expert] - within).clamp_max(tile).masked_fill(behind, 0)
    tiles = torch.stack([expert, begin[expert] + within, size])
    return Work(order.int(), place.int(), tiles.int())


@triton.jit
def _address(table, field, TYPE: tl.constexpr):
    return tl.load(table + field).to(tl.pointer_type(TYPE))


@triton.jit(do_not_specialize=["pairs", "choices", "tiles", "splits"])
def _multiply(
    x, table, tile_of, order, sums, pairs, choices, tiles, rows, columns, splits,
    KIND: tl.constexpr, WIDTHS: tl.constexpr, VALUES: tl.constexpr, ONE_SEGMENT: tl.constexpr, CONSECUTIVE: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, FP32_DOT: tl.constexpr,
):  # fmt: skip
    """sums[split] [pairs, rows] of a tile = x of its pairs (choices 0), or of their tokens, times the rows of its expert.

    Tiles of experts of other kinds are left to other launches.
    """
    tile, split = tl.program_id(0), tl.program_id(2)
    mine = table + tl.load(tile_of + tile).to(tl.int64) * FIELDS
    is_mine = tl.load(mine) != 0
    first, count = tl.load(tile_of + tiles + tile), tl.load(tile_of + 2 * tiles + tile) * is_mine.to(tl.int32)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = first + tl.arange(0, BLOCK_TOKENS)
    there = place < first + count
    token = place
    if choices > 0:
        token = tl.load(order + place, mask=there, other=0) // choices
    of_token = token.to(tl.int64) * columns
    if BLOCK_TOKENS == 1:
        total = tl.zeros([BLOCK_SLOTS, BLOCK_ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], tl.float32)
    if KIND == CODEBOOK:
        row_segment = _address(mine, 0, tl.int32)
        for bits in tl.static_range(1, 9):
            if (WIDTHS >> bits) & 1:
                group = mine + 6 + WIDTH_FIELDS * (bits - 1)
                slots = tl.load(group + 3).to(tl.int32) * (count > 0).to(tl.int32)
                codes, columns_of = _address(group, 0, tl.uint8), _address(group, 1, tl.int32)
                codebook = _address(group, 2, tl.float16)
                each = tl.cdiv(tl.cdiv(slots, splits), BLOCK_SLOTS) * BLOCK_SLOTS
                for first_slot in range(split * each, tl.minimum((split + 1) * each, slots), BLOCK_SLOTS):
                    weight = decode_tile(
                        codes, (slots * bits + 7) // 8, codebook, row_segment, rows, slots, row, first_slot, BLOCK_SLOTS, bits,
                        ONE_SEGMENT,
                    )  # fmt: skip
                    slot = first_slot + tl.arange(0, BLOCK_SLOTS)
                    column = slot if CONSECUTIVE else tl.load(columns_of + slot, mask=slot < slots, other=0)
                    inside = there[:, None] & (slot < slots)[None, :]
                    factor = tl.load(x + of_token[:, None] + column[None, :], mask=inside, other=0.0)
                    if BLOCK_TOKENS == 1:
                        total += tl.trans(factor.to(tl.float32)) * weight.to(tl.float32)
                    else:
                        total = add_product(total, factor, weight, FP32_DOT)
    elif KIND == GROUPS:
        groups = tl.cdiv(columns, 4)
        each = tl.cdiv(tl.cdiv(groups, splits), BLOCK_SLOTS) * BLOCK_SLOTS
        for bits in tl.static_range(0, 5):
            if (WIDTHS >> bits) & 1:
                end = tl.minimum((split + 1) * each, groups) * ((count > 0) & (tl.load(mine + 8) == bits)).to(tl.int32)
                for first_slot in range(split * each, end, BLOCK_SLOTS):
                    total = add_groups(
                        total, x, of_token, there, _address(mine, 6, VALUES), _address(mine, 7, tl.float16),
                        _address(mine, 0, tl.uint8), rows, columns, groups, first_slot, row,
                        bits, BLOCK_TOKENS, BLOCK_SLOTS, FP32_DOT,
                    )  # fmt: skip
    else:
        each = tl.cdiv(tl.cdiv(columns, splits), BLOCK_SLOTS) * BLOCK_SLOTS
        end = tl.minimum((split + 1) * each, columns) * (count > 0).to(tl.int32)
        for first_slot in range(split * each, end, BLOCK_SLOTS):
            total = add_columns(
                total, x, of_token, there, _address(mine, 8, VALUES), _address(mine, 0, tl.int32),
                _address(mine, 6, tl.int32 if WIDE else tl.uint16), _address(mine, 7, tl.int32), rows, columns, first_slot, row,
                BLOCK_TOKENS, BLOCK_SLOTS, FP32_DOT,
            )  # fmt: skip
    if BLOCK_TOKENS == 1:
        total = tl.sum(total, 0)[None, :]
    scale = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if tl.load(mine + 1) != 0:
        SCALE: tl.constexpr = tl.float16 if KIND == CODEBOOK else tl.float32
        scale = tl.load(_address(mine, 1, SCALE) + row, mask=row < rows, other=0.0).to(tl.float32)
    total *= scale[None, :]
    if KIND != BITMAP:  # noqa: SIM102 - of a kind, so that the other kinds' code is not there
        if (tl.load(mine + 2) != 0) & (split == 0) & (count > 0):
            total += outlier_product(
                x, of_token, there, _address(mine, 2, tl.int32), _address(mine, 3, tl.int32 if WIDE else tl.uint16),
                _address(mine, 4, tl.float16), _address(mine, 5, tl.float16), scale, row, rows, 16,
            )  # fmt: skip
    to = sums + (split.to(tl.int64) * pairs + place)[:, None] * rows + row[None, :]
    tl.store(to, total, mask=there[:, None] & (row < rows)[None, :])


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == 1:
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif ACTIVATION == 2:
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))  # (1 + tanh) / 2
    elif ACTIVATION == 3:
        return tl.where(x < 0, 0.0, x)
    else:
        return tl.where(x < 0, 0.0, x * x)


@triton.jit
def _summed(sums, bias, splits, pairs, place, rows, row, expert, inside, HAS_BIAS: tl.constexpr):
    """What the splits say of some rows of a pair, in order."""
    total = tl.zeros([row.shape[0]], tl.float32)
    stride = pairs.to(tl.int64) * rows
    for split in range(splits):
        total += tl.load(sums + split * stride + place * rows + row, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + expert * rows + row, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["pairs", "splits", "experts", "limit", "alpha", "offset"])
def _activate(
    sums, bias, index, order, out, pairs, splits, experts, units, rows, limit, alpha, offset,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [pairs, units] of the pairs that have an expert, sorted."""
    place = tl.program_id(0).to(tl.int64)
    expert = tl.load(index + tl.load(order + place))
    there = (expert >= 0) & (expert < experts)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (unit < units) & there
    first = unit * 2 if INTERLEAVED else unit
    gate = _summed(sums, bias, splits, pairs, place, rows, first, expert, inside, HAS_BIAS)
    if GATED:
        second = first + 1 if INTERLEAVED else units + unit
        up = _summed(sums, bias, splits, pairs, place, rows, second, expert, inside, HAS_BIAS)
        # A comparison with NaN is false: NaN stays.
        gate = alpha * tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        found = _activated(gate, ACTIVATION) / alpha * (up + offset)
    else:
        found = _activated(gate, ACTIVATION)
    tl.store(out + place * units + unit, found.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pairs", "splits", "experts", "choices"])
def _combine(
    sums, bias, index, place_of, weights, out, pairs, splits, experts, choices, hidden,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [tokens, hidden]: the weighted sum of a token's pairs, by rising choice; NaN for an index of no expert."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(choices):
        pair = token * choices + choice
        expert = tl.load(index + pair)
        inside = (column < hidden) & (expert >= 0) & (expert < experts)
        y = _summed(sums, bias, splits, pairs, tl.load(place_of + pair), hidden, column, expert, inside, HAS_BIAS)
        total += tl.where(inside, tl.load(weights + pair) * y, 0.0)
        total = tl.where((expert < 0) | (expert > experts), float("nan"), total)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)


def _splits(weights: Projection, tile: Tile, tiles: int) -> int:
    """So many that there are about as many programs as the tile asks for; none of them smaller than its slots."""
    cells = triton.cdiv(weights.rows, tile.rows) * tiles
    steps = max(part.steps(weights.columns, tile.tokens) for part in weights.parts)
    return max(1, min(triton.cdiv(tile.programs, cells), steps))


def _product(
    x: torch.Tensor, weights: Projection, work: Work, tile: Tile, choices: int, splits: int, pairs: int
) -> torch.Tensor:
    sums = torch.empty(splits, pairs, weights.rows, dtype=torch.float32, device=x.device)
    tiles = work.tiles.shape[1]
    for part in weights.parts:
        _multiply[(tiles, triton.cdiv(weights.rows, tile.rows), splits)](
            x, part.table, work.tiles, work.order, sums, pairs, choices, tiles, weights.rows, weights.columns, splits,
            KIND=part.kind, WIDTHS=part.widths, VALUES=getattr(tl, part.values), ONE_SEGMENT=part.one_segment,
            CONSECUTIVE=part.consecutive, WIDE=part.wide, BLOCK_TOKENS=tile.tokens, BLOCK_ROWS=tile.rows,
            BLOCK_SLOTS=part.slots(tile.tokens), FP32_DOT=FP32_DOT, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return sums


def _tile(tokens: int, experts: Experts) -> Tile:
    # Codes in 2:4 of a single row and more tokens: triton 3.6's compiler aborts.
    parts = (part for weights in (experts.up, experts.down) if weights.rows == 1 for part in weights.parts)
    token_by_token = tokens == 1 or any(part.kind == GROUPS.value and part.widths > 1 for part in parts)
    return ONE_TOKEN if token_by_token else MORE_TOKENS


def _wave(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts, out: torch.Tensor) -> None:
    up, down = experts.up, experts.down
    tokens, choices = index.shape
    count, pairs = up.experts, index.numel()
    tile = _tile(tokens, experts)
    index, work = index.reshape(-1), work_of(index.reshape(-1), count, tile.tokens)
    likely = max(min(pairs, count), triton.cdiv(pairs, tile.tokens))
    splits = _splits(up, tile, likely), _splits(down, tile, likely)
    sums = _product(x, up, work, tile, choices, splits[0], pairs)
    activated = torch.empty(pairs, down.columns, dtype=x.dtype, device=x.device)
    _activate[(pairs, triton.cdiv(down.columns, 256))](
        sums, sums if up.bias is None else up.bias, index, work.order, activated, pairs, splits[0], count, down.columns, up.rows,
        experts.limit, experts.alpha, experts.offset,
        ACTIVATION=experts.activation, GATED=experts.gated, INTERLEAVED=experts.interleaved, HAS_BIAS=up.bias is not None,
        BLOCK=256,
    )  # fmt: skip
    sums = _product(activated, down, work, tile, 0, splits[1], pairs)
    _combine[(tokens, triton.cdiv(down.rows, 256))](
        sums, sums if down.bias is None else down.bias, index, work.place, weights, out, pairs, splits[1], count, choices,
        down.rows, HAS_BIAS=down.bias is not None, BLOCK=256,
    )  # fmt: skip


def routed_experts(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Experts) -> torch.Tensor:
    """x [tokens, hidden], index int64 and weights fp32 [tokens, k], all contiguous -> [tokens, hidden]; an index outside of
    0..E gives its token NaN."""
    tokens, choices = index.shape
    if not index.numel():
        return torch.zeros_like(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    in_wave = max(1, MOST_SUM_BYTES // (4 * choices * max(experts.up.rows, experts.down.rows)))
    for begin in range(0, tokens, in_wave):
        part = slice(begin, begin + in_wave)
        _wave(x[part], index[part], weights[part], experts, out[part])
    return out
