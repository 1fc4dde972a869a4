"""From a record to forms: which attention modules, MLP modules and blocks are one of the sentences that the native steps know.

A part of a sentence is found by trying what it can be and comparing with the recorded values, which are fp32 and random, so that
nothing agrees by chance. What values cannot show (a clamp that random numbers do not reach, a factor that depends on the
position) the recorded operations do: only those that a sentence needs are allowed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..operations import ACTIVATIONS
from .record import PROMPT, Call, Record, is_linear
from .steps import HALVES, INTERLEAVED, LAYER, RMS, AttentionForm, MlpForm, Norm, Output, Rotary, Rows

_VIEWS = {
    *("view", "_unsafe_view", "transpose", "expand", "unsqueeze", "t", "slice", "alias", "detach", "clone", "_to_copy"),
    *("split", "split_with_sizes", "reshape", "permute", "select", "squeeze", "unbind", "randn", "empty"),
}
_ARITHMETIC = {"add", "mul"}
_BETWEEN_LINEARS = {
    "attention": _VIEWS | _ARITHMETIC | {"sub", "neg", "cat", "stack", "div"},
    "mlp": _VIEWS | _ARITHMETIC | {"silu", "gelu", "relu", "tanh", "pow", "square", "sigmoid", "erf"},
    "block": _VIEWS | _ARITHMETIC,
}
_BETWEEN_LINEARS["encoder"] = set().union(*_BETWEEN_LINEARS.values())
_ATTENTION_OPTIONS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "sliding_window", "softcap",
                      "s_aux", "is_causal"}  # fmt: skip


class NotFittingError(Exception):
    """The message says where the module leaves the grammar."""


class NoBlockError(NotFittingError):
    """It is more or less than one attention and one MLP."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """Where a module's forward gets what a step needs, by the names of its arguments."""

    order: tuple[str, ...]
    x: str
    without_effect: frozenset[str]
    """Tensors that the module is given and does not use."""
    flags: dict[str, Any]
    """What else it was given when it was recorded; a call with other values is another call."""
    mask: str | None = None
    positions: str | None = None
    cache: str | None = None
    cache_layer: int = 0

    @property
    def known(self) -> frozenset[str]:
        used = (self.x, self.mask, self.positions, self.cache)
        return self.without_effect | {n for n in used if n is not None}


@dataclass(frozen=True, eq=False)
class Fitting:
    """A module that can be called as one or two steps; `wraps` says how its result comes back: "y", "(y, None)" or "(y,)"."""

    name: str
    module: nn.Module
    arguments: Arguments
    attention: AttentionForm | None
    mlp: MlpForm | None
    wraps: str
    asks: nn.Module | None
    """The module that asks for attention."""
    example: dict[str, Any]
    """Arguments of the recorded call."""
    parallel: bool = False
    """Of a block: does the MLP start from x, as attention does, and not from x + attention?"""


@torch.no_grad()
def fit(record: Record) -> tuple[list[Fitting], dict[str, str]]:
    """(what fits; name -> reason of every attention and MLP module that does not). Of nested modules the outermost is given."""
    found: dict[Call, Fitting] = {}
    reasons: dict[str, str] = {}

    def attempt(call: Call, parse: Callable[..., Fitting], *rest: Any) -> None:
        try:
            found[call] = parse(record, call, *rest)
        except NotFittingError as error:
            reasons[call.name] = str(error)

    modules = [call for call in record.calls if call.module is not None and not is_linear(call.module)]
    for note in (call for call in record.calls if call.module is None):
        around = [c for c in modules if c.start < note.start < c.stop]
        if around and note.name == "attention" and _sees_itself(note):
            whys: dict[str, str] = {}
            for call in reversed(around):
                try:
                    found[call] = _encoder_block(record, call, note)
                    break
                except NoBlockError:
                    continue
                except NotFittingError as error:
                    whys[call.name] = str(error)
            else:
                name, why = next(
                    iter(whys.items()), (around[-1].name, "it is in no block of one attention and one MLP")
                )
                reasons[name] = why
        elif around and note.name == "attention":
            attempt(around[-1], _attention, note)
        elif around:
            reasons.setdefault(around[-1].name, "its attention is not transformers' attention interface")
    for call in sorted(modules, key=lambda c: c.stop - c.start):
        inside = record.inside(call)
        linears = [c for c in inside if c.module is not None and is_linear(c.module)]
        if len(linears) in (2, 3) and not any(c.module is None or c in found for c in inside):
            attempt(call, _mlp, linears)
    for call in modules:
        parts = [c for c in record.inside(call) if c in found]
        if [found[c].mlp is None for c in parts] == [True, False]:
            attempt(call, _block, *parts, found)
    repeated = {call.name for call in found if sum(c.name == call.name for c in modules) > 1}
    reasons |= dict.fromkeys(repeated, "it is called more than once for a token")
    within = {c for call in found for c in record.inside(call)}
    fitting = [
        f
        for c, f in sorted(found.items(), key=lambda item: item[0].start)
        if c not in within and f.name not in repeated
    ]
    covered = [f.name for f in fitting]
    return fitting, {n: why for n, why in reasons.items() if not any(f"{n}.".startswith(f"{c}.") for c in covered)}


# ---- attention ------------------------------------------------------------------------------------------------------


def _attention(record: Record, call: Call, marker: Call) -> Fitting:
    inside = record.inside(call)
    before = [c for c in inside if c.module is not None and is_linear(c.module) and c.stop < marker.start]
    behind = [c for c in inside if c.module is not None and is_linear(c.module) and c.start > marker.start]
    updates = [c for c in inside if c.module is None and c.name == "cache"]
    if len(updates) != 1:
        raise NotFittingError("it keeps no keys and values, or several" if before else "it has no Linear of its own")
    if len(behind) != 1:
        raise NotFittingError("its attention does not go straight into one Linear")
    update, out = updates[0], behind[0]
    if marker.arguments["key"].shape[2] != PROMPT + marker.arguments["query"].shape[2]:
        raise NotFittingError("its attention sees other keys than those of the cache")
    form, positions, norms = _attention_form(
        record, call, marker, before, out, (update.arguments["key"], update.arguments["value"])
    )
    multiplier = factor_of(call.y, out.y)
    if multiplier is None or not record.comes_from(call.y, [out.y], call.start):
        raise NotFittingError("something follows its last Linear")
    form = replace(form, output=replace(form.output, multiplier=multiplier))
    _expect(record.operations_of(call, [*before, out, *norms]), "attention")
    arguments = _arguments(call, before[0].x, marker.arguments["attention_mask"], positions, update)
    return Fitting(call.name, _module(call), arguments, form, None, _wraps(call), _module(call), call.arguments)


def _attention_form(
    record: Record, call: Call, marker: Call, before: list[Call], out: Call, keys_values: tuple[Tensor, Tensor]
) -> tuple[AttentionForm, str | None, list[Call]]:
    """(the form; the name of the argument that has the rotary positions; the norms of q and k) of Linears `before` and behind the
    attention, whose keys and values of this call are given."""
    if not before or any(not is_same(c.x, before[0].x) for c in before):
        raise NotFittingError("its Linears do not share one input")
    if not is_same(out.x, marker.output.flatten(2)):
        raise NotFittingError("its attention does not go straight into one Linear")
    x = before[0].x
    query, options = marker.arguments["query"], marker.arguments
    given = [id(v) for v in call.arguments.values()]
    strange = {n for n, v in options.items() if n not in _ATTENTION_OPTIONS and v is not None and id(v) not in given}
    if strange:
        raise NotFittingError(f"its attention is given {', '.join(sorted(strange))}")
    q, k, v = (t.transpose(1, 2) for t in (query, *keys_values))
    heads, kv_heads, size, value_size = q.shape[2], k.shape[2], k.shape[3], v.shape[3]
    outputs = [c.y for c in before]
    positions, tables = _position_tables(call)
    norm_calls = [c for c in record.inside(call) if _may_be_norm(c) and c.stop < marker.start]
    norms = {c: norm for c in norm_calls if (norm := norm_of(c)) is not None}

    v_rows = next(
        (r for r in _rows(outputs, kv_heads, value_size) if is_same(r.of(outputs, kv_heads, value_size), v)), None
    )
    if v_rows is None:
        raise NotFittingError("its values are not rows of a Linear")
    found_k = _heads(outputs, k, norms, tables, _rotaries(tables, size), (False, True))
    if found_k is None or abs(found_k.factor - 1) > _CLOSE:
        raise NotFittingError("its keys are not rows of a Linear, with or without a norm and rotary positions")
    found_q = _heads(outputs, q, norms, tables, [found_k.rotary], (found_k.after,) if found_k.norm else (False, True))
    if found_q is None or (found_q.norm is not None and found_k.norm is not None and found_q.spans != found_k.spans):
        raise NotFittingError("its queries are not rows of a Linear, with or without a norm and rotary positions")
    rotated = found_k.rotary.size > 0
    sources = [x, *outputs, *(tables if rotated and tables else ())]
    if not all(record.comes_from(t, sources, call.start) for t in (q, k, v)):
        raise NotFittingError("its queries, keys or values depend on more than x and rotary positions")
    used = [c for c in (found_q.norm, found_k.norm) if c is not None]
    scale = options.get("scaling")
    sinks = options.get("s_aux")
    form = AttentionForm(
        tuple(_module(c) for c in before),
        found_q.rows,
        found_k.rows,
        v_rows,
        heads,
        kv_heads,
        size,
        value_size,
        float((size**-0.5 if scale is None else scale) * found_q.factor),
        Output(_module(out)),
        q_norm=norms[found_q.norm] if found_q.norm else Norm(),
        k_norm=norms[found_k.norm] if found_k.norm else Norm(),
        norms_span_heads=found_q.spans or found_k.spans,
        norms_after_rotary=found_q.after or found_k.after,
        rotary=found_k.rotary,
        soft_cap=float(options.get("softcap") or 0),
        sinks=None if sinks is None else sinks.float().flatten(),
    )
    return form, positions if rotated else None, used


def _rows(outputs: list[Tensor], count: int, size: int) -> Iterator[Rows]:
    """Where `count` heads can lie: behind one another from the start of a Linear's output, behind the heads of one or two
    others, or each beside its key and value."""
    for linear in sorted(
        range(len(outputs)), key=lambda i: outputs[i].shape[-1] != count * size
    ):  # the likely ones first
        rows = outputs[linear].shape[-1]
        for first in range(0, rows - count * size + 1, size):
            yield Rows(linear, first, size)
        if rows == 3 * count * size:
            yield from (Rows(linear, i * size, 3 * size) for i in range(3))


@dataclass(frozen=True, eq=False)
class _Heads:
    rows: Rows
    rotary: Rotary
    norm: Call | None
    spans: bool
    after: bool
    factor: float


def _heads(
    outputs: list[Tensor],
    wanted: Tensor,
    norms: dict[Call, Norm],
    tables: tuple[Tensor, Tensor] | None,
    rotaries: list[Rotary],
    orders: tuple[bool, ...],
) -> _Heads | None:
    """How `wanted` [batch, tokens, heads, size] is made of the Linears' outputs."""
    count, size = wanted.shape[2:]
    fitting = {
        c: n for c, n in norms.items() if c.x.numel() == wanted.numel() and c.x.shape[-1] in (size, count * size)
    }
    for rows, rotary, after in product(_rows(outputs, count, size), rotaries, orders):
        raw = rows.of(outputs, count, size)
        if after:
            raw = rotary(raw, *(tables or (None, None)))
        for call in (*fitting, *([] if after else [None])):
            spans = call is not None and count > 1 and call.x.shape[-1] == count * size
            heads = raw
            if call is not None:
                # Values first: a norm of other heads than these would cost all the comparisons below.
                if not any(_close(x, raw) for x in _tokens_first(call.x, raw.shape)):
                    continue
                heads = norms[call](raw.flatten(2)).view_as(raw) if spans else norms[call](raw)
            if not after:
                heads = rotary(heads, *(tables or (None, None)))
            factor = factor_of(wanted, heads)
            if factor is not None:
                return _Heads(rows, rotary, call, spans, after, factor)
    return None


def _tokens_first(x: Tensor, shape: torch.Size) -> list[Tensor]:
    """x, heads before or behind the tokens or all in one dimension, as `shape` [batch, tokens, heads, size]."""
    return [t.reshape(shape) for t in ([x, x.transpose(1, 2)] if x.dim() == 4 else [x])]


def _rotaries(tables: tuple[Tensor, Tensor] | None, head_size: int) -> list[Rotary]:
    if tables is None:
        return [Rotary()]
    width = tables[0].shape[-1]
    pairs = [(width, 1), (width, 2), (2 * width, 1)]
    sizes = [(size, step) for size, step in pairs if size <= head_size and size % 2 == 0]
    return [*(Rotary(style, size, step) for size, step in sizes for style in (HALVES, INTERLEAVED)), Rotary()]


def _position_tables(call: Call) -> tuple[str | None, tuple[Tensor, Tensor] | None]:
    """(name of the argument, (cosines, sines)) [batch or 1, tokens, width], if the module is given any."""
    for name, value in call.arguments.items():
        if isinstance(value, tuple | list) and len(value) == 2:
            a, b = value
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dim() == 3:
                return name, (a, b)
    return None, None


# ---- MLP ------------------------------------------------------------------------------------------------------------


def _mlp(record: Record, call: Call, linears: list[Call]) -> Fitting:
    *before, out = linears
    form = _mlp_form(record, call, before, out)
    multiplier = factor_of(call.y, out.y)
    if multiplier is None or not record.comes_from(call.y, [out.y], call.start):
        raise NotFittingError("something follows its last Linear")
    form = replace(form, output=replace(form.output, multiplier=multiplier))
    _expect(record.operations_of(call, linears), "mlp")
    arguments = _arguments(call, before[0].x)
    return Fitting(call.name, _module(call), arguments, None, form, _wraps(call), None, call.arguments)


def _mlp_form(record: Record, call: Call, before: list[Call], out: Call) -> MlpForm:
    if any(not is_same(c.x, before[0].x) for c in before):
        raise NotFittingError("its Linears do not share one input")
    outputs, wanted = [c.y for c in before], out.x
    if wanted.dim() != 3:
        raise NotFittingError(f"its activations are {list(wanted.shape)}, not [batch, tokens, features]")
    units = wanted.shape[-1]
    for (gate, up), activation in product(_gates(outputs, units), ACTIVATIONS):
        made = ACTIVATIONS[activation](gate.of(outputs, units, 1))
        made = made if up is None else made * up.of(outputs, units, 1)
        if _close(made.flatten(2), wanted):
            break
    else:
        raise NotFittingError("between its Linears stands no activation that is known")
    if not record.comes_from(wanted, outputs, call.start):
        raise NotFittingError("its activations depend on more than x")
    return MlpForm(tuple(_module(c) for c in before), units, gate, up, activation, Output(_module(out)))


def _gates(outputs: list[Tensor], units: int) -> list[tuple[Rows, Rows | None]]:
    widths = [output.shape[-1] for output in outputs]
    if widths == [units]:
        return [(Rows(0, 0, 1), None)]
    if widths == [units, units]:
        pairs = [(Rows(0, 0, 1), Rows(1, 0, 1))]
    elif widths == [2 * units]:
        pairs = [(Rows(0, 0, 1), Rows(0, units, 1)), (Rows(0, 0, 2), Rows(0, 1, 2))]
    else:
        return []
    return [either for pair in pairs for either in (pair, pair[::-1])]


# ---- a whole block --------------------------------------------------------------------------------------------------


def _block(record: Record, call: Call, attention: Call, mlp: Call, found: dict[Call, Fitting]) -> Fitting:
    """h = x + attention(x), then h + mlp(h) or h + mlp(x), with norms before or behind each."""
    inside = record.inside(call)
    parts = [attention, mlp, *record.inside(attention), *record.inside(mlp)]
    norms = [c for c in inside if c not in parts and _may_be_norm(c)]
    x = call.x
    first = _residual(x, attention, norms)
    in_mlp = next((c for c in norms if is_same(c.y, mlp.x)), None)
    h = mlp.x if in_mlp is None else in_mlp.x
    second = _residual(h, mlp, norms)
    parallel = is_same(h, x)
    fitted = {c: n for c in (*first, *second) if c is not None and (n := norm_of(c)) is not None}
    if any(c is not None and c not in fitted for c in (*first, *second)):
        raise NotFittingError("one of its norms is neither the mean square's nor the variance's")
    (before, behind), (before_mlp, behind_mlp) = first, second
    part = (behind or attention).y
    factor = 1.0 if parallel else factor_of(h, part, x)
    factor_mlp = factor_of(call.y, (behind_mlp or mlp).y, x + part if parallel else h)
    if factor is None or factor_mlp is None or not record.comes_from(call.y, [x, attention.y, mlp.y], call.start):
        raise NotFittingError("attention and MLP are not added to x, one after the other or beside each other")
    _expect(record.operations_of(call, [attention, mlp, *fitted]), "block")
    a, m = found[attention].attention, found[mlp].mlp
    assert a is not None and m is not None
    if (behind and a.output.multiplier != 1) or (behind_mlp and m.output.multiplier != 1):
        raise NotFittingError("a factor stands between a module and its norm")
    a = replace(a, norm=fitted.get(before, Norm()), output=_output(a.output, fitted.get(behind), factor))  # type: ignore[arg-type]
    m = replace(m, norm=fitted.get(before_mlp, Norm()), output=_output(m.output, fitted.get(behind_mlp), factor_mlp))  # type: ignore[arg-type]
    arguments = _renamed(found[attention].arguments, attention, call, x)
    return Fitting(
        call.name, _module(call), arguments, a, m, _wraps(call), _module(attention), call.arguments, parallel
    )


def _sees_itself(marker: Call) -> bool:
    """Is it attention of all tokens to all tokens of the call, as in an encoder?"""
    options = marker.arguments
    causal = options.get("is_causal")
    causal = getattr(options["module"], "is_causal", True) if causal is None else causal
    return not causal and options["key"].shape[2] == options["query"].shape[2]


def _encoder_block(record: Record, call: Call, marker: Call) -> Fitting:
    """Without a cache: h = x + attention(x), y = h + mlp(h), with a norm before each part or behind each sum."""
    inside = record.inside(call)
    linears = [c for c in inside if c.module is not None and is_linear(c.module)]
    before, behind = [c for c in linears if c.stop < marker.start], [c for c in linears if c.start > marker.start]
    if len(behind) not in (3, 4) or not before:
        raise NoBlockError
    (out, *to_units, down), x, x_mlp = behind, call.x, behind[1].x
    options = marker.arguments
    attention, positions, norms = _attention_form(record, call, marker, before, out, (options["key"], options["value"]))
    mlp = _mlp_form(record, call, to_units, down)
    others = [c for c in inside if _may_be_norm(c) and c not in norms]
    norm = {c: n for c in others if (n := norm_of(c)) is not None}

    def one(wanted: Callable[[Call], bool]) -> Call | None:
        return next((c for c in norm if wanted(c)), None)

    into_mlp = one(lambda c: is_same(c.y, x_mlp))
    last = one(lambda c: is_same(c.y, call.y))
    first = None if is_same(before[0].x, x) else one(lambda c: is_same(c.y, before[0].x) and is_same(c.x, x))
    h = x_mlp if into_mlp is None else into_mlp.x
    factor = factor_of(h, out.y, x)
    if factor is None or (first is None and not is_same(before[0].x, x)):
        raise NotFittingError("attention is not added to x")
    behind_sums = last is not None and into_mlp is not None and first is None
    start, end = (x_mlp, last.x) if behind_sums and last else (h, call.y)
    factor_mlp = factor_of(end, down.y, start)
    if factor_mlp is None or not record.comes_from(call.y, [x, out.y, down.y], call.start):
        raise NotFittingError("its MLP is not added to what attention made")
    used = [c for c in (first, into_mlp, last if behind_sums else None) if c is not None]
    _expect(record.operations_of(call, [*linears, *norms, *used]), "encoder")

    def output(linear: Call, behind: Call | None, factor: float) -> Output:
        after = norm[behind] if behind_sums and behind is not None else Norm()
        return Output(_module(linear), after, factor, norm_last=behind_sums)

    attention = replace(
        attention,
        norm=norm[first] if first is not None else Norm(),
        output=output(out, into_mlp, factor),
        causal=False,
    )
    mlp = replace(
        mlp,
        norm=norm[into_mlp] if into_mlp is not None and not behind_sums else Norm(),
        output=output(down, last, factor_mlp),
    )
    arguments = _arguments(call, x, options["attention_mask"], positions)
    if (options["attention_mask"] is None) != (arguments.mask is None):
        raise NotFittingError("it is not given the mask that it uses")
    asks = [c for c in record.calls if c.module is not None and c.start < marker.start < c.stop][-1]
    return Fitting(call.name, _module(call), arguments, attention, mlp, _wraps(call), _module(asks), call.arguments)


def _residual(x: Tensor, part: Call, norms: list[Call]) -> tuple[Call | None, Call | None]:
    """(norm before, norm behind) of a part of a block that starts from x."""
    before = None
    if not is_same(part.x, x):
        before = next((c for c in norms if is_same(c.y, part.x) and is_same(c.x, x)), None)
        if before is None:
            raise NotFittingError("attention or MLP do not start from x or a norm of x")
    return before, next((c for c in norms if is_same(c.x, part.y)), None)


def _output(output: Output, norm: Norm | None, factor: float | None) -> Output:
    assert factor is not None
    return replace(output, norm=norm or Norm(), multiplier=output.multiplier * factor)


# ---- norms ----------------------------------------------------------------------------------------------------------


def _may_be_norm(call: Call) -> bool:
    module = call.module
    if module is None or is_linear(module) or next(module.children(), None) is not None:
        return False
    return isinstance(call.output, Tensor) and call.output.shape == call.x.shape and not is_same(call.output, call.x)


def norm_of(call: Call) -> Norm | None:
    """The norm that a module is, from what it makes of random numbers: large ones show weight and bias, small ones eps."""
    try:
        module = copy.deepcopy(call.module).float()  # type: ignore[union-attr]
        x = torch.randn(call.x.shape)
        large, negative, small, plain = (module(s * x).float() for s in (1e3, -1e3, 1e-3, 1.0))
    except Exception:  # it takes more than x, or is no norm at all
        return None
    bias, odd = (large + negative) / 2, (large - negative) / 2
    for kind in (RMS, LAYER):
        centred = x - x.mean(-1, keepdim=True) if kind == LAYER else x
        variance = centred.square().mean(-1, keepdim=True)
        unit = centred / variance.sqrt()
        for dims in _constant_dims(x.dim()):
            weight = (odd * unit).sum(dims, keepdim=True) / unit.square().sum(dims, keepdim=True)
            if not _close(weight * unit, odd):
                continue
            scaled = weight * 1e-3 * centred
            slope = ((small - bias) * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True)
            eps = float(f"{max((slope**-2 - 1e-6 * variance).median().item(), 0):.5g}")
            flat = [t.mean(dims).squeeze() for t in (weight.expand_as(x), bias)]
            norm = Norm(kind, eps, flat[0], flat[1] if flat[1].abs().max() > 1e-6 else None)
            if _close(weight * centred / (variance + eps).sqrt() + bias, plain):
                return norm
    return None


def _constant_dims(dims: int) -> list[tuple[int, ...]]:
    """Along which dimensions a weight is the same: all but the last, or heads have weights of their own."""
    return [tuple(range(dims - 1)), *([(0, 1), (0, 2)] if dims == 4 else [])]


# ---- values ---------------------------------------------------------------------------------------------------------

_CLOSE = 1e-5


def is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.numel() == b.numel() and torch.equal(a.reshape(b.shape), b))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= _CLOSE * b.norm())


def factor_of(wanted: Tensor, made: Tensor, start: Tensor | None = None) -> float | None:
    """f with wanted = start + f made."""
    if wanted.shape != made.shape:
        return None
    part = wanted if start is None else wanted - start
    noise = 3e-7 * wanted.norm() / made.norm() if start is not None else 1e-6
    f = ((part * made).sum() / made.square().sum()).item()
    rounded = (float(f"{f:.{digits}g}") for digits in range(1, 5))
    f = next((r for r in rounded if abs(r - f) <= noise), f)
    return f if f and (part - f * made).norm() <= (_CLOSE * abs(f) + noise) * made.norm() else None


def _expect(operations: set[str], part: str) -> None:
    strange = {o for o in operations if o.rstrip("_") not in _BETWEEN_LINEARS[part] and o not in _BETWEEN_LINEARS[part]}
    if strange:
        raise NotFittingError(f"it uses {', '.join(sorted(strange))}")


def _module(call: Call) -> nn.Module:
    assert call.module is not None
    return call.module


def _wraps(call: Call) -> str:
    if isinstance(call.output, Tensor):
        return "y"
    if isinstance(call.output, tuple) and call.output[0] is call.y and all(o is None for o in call.output[1:]):
        return {1: "(y,)", 2: "(y, None)"}.get(len(call.output)) or _unknown_output(call)
    return _unknown_output(call)


def _unknown_output(call: Call) -> str:
    raise NotFittingError(f"it returns {type(call.output).__name__} with more than one value")


# ---- arguments ------------------------------------------------------------------------------------------------------


def _arguments(
    call: Call, x: Tensor, mask: Tensor | None = None, positions: str | None = None, update: Call | None = None
) -> Arguments:
    def name_of(tensor: Tensor | None) -> str | None:
        tensors = {n: v for n, v in call.arguments.items() if isinstance(v, Tensor)}
        return next((n for n, v in tensors.items() if tensor is not None and _is_view(v, tensor)), None)

    x_name, mask_name, cache_name = name_of(x), name_of(mask), None
    if x_name is None:
        raise NotFittingError("its Linears do not take its argument")
    if update is not None:
        cache_name = next((n for n, v in call.arguments.items() if v is update.arguments["cache"]), None)
        if mask_name is None or cache_name is None:
            raise NotFittingError("it is not given the mask and the cache that it uses")
    used = {x_name, mask_name, positions, cache_name}
    other = {n: v for n, v in call.arguments.items() if n not in used}
    return Arguments(
        tuple(inspect.signature(_module(call).forward).parameters),
        x_name,
        frozenset(n for n, v in other.items() if _holds_tensor(v)),
        {n: v for n, v in other.items() if not _holds_tensor(v)},
        mask_name,
        positions,
        cache_name,
        update.arguments["layer"] if update is not None else 0,
    )


def _renamed(inner: Arguments, part: Call, block: Call, x: Tensor) -> Arguments:
    """The same arguments as the block around gets them."""

    def name_of(name: str | None) -> Any:
        value = part.arguments[name] if name else None
        return next((n for n, v in block.arguments.items() if v is value), None) if name else None

    names = [name_of(name) for name in (inner.mask, inner.positions, inner.cache)]
    if [n is None for n in names] != [n is None for n in (inner.mask, inner.positions, inner.cache)]:
        raise NotFittingError("it does not hand on the mask, the positions or the cache that it is given")
    outer = _arguments(block, x)
    used = {n for n in names if n}
    return replace(
        outer,
        without_effect=outer.without_effect - used,
        flags={n: v for n, v in outer.flags.items() if n not in used},
        mask=names[0],
        positions=names[1],
        cache=names[2],
        cache_layer=inner.cache_layer,
    )


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value))


def _is_view(a: Tensor, b: Tensor) -> bool:
    return a is b or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
