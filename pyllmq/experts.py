"""Stacked experts taken apart: transformers keeps all experts of a layer in 3-D parameters; here each projection of each expert is
a Linear of its own, which methods compress, folders name and packed layers replace like any other.

Every class that transformers' `use_experts_implementation` decorates is known by the attributes that it sets, whatever the family.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layers.linear import PackedLinear
from .operations import ACTIVATIONS, PRECISIONS, Gate, PackedExperts, by_expert
from .ops import routed_experts

UP, DOWN = "up", "down"
"""The last parts of the names of an expert's Linears; `up` holds gate and up as the stack does."""


class ExpertLinear(nn.Linear):
    """One projection of one expert, seen in the stack that it is part of: no tensor of its own."""

    stack: Any

    def __init__(self, stack: RoutedExperts, parameter: str, index: int) -> None:
        nn.Module.__init__(self)
        self.__dict__["stack"] = stack  # not as a child: it is one of the stack's
        self.parameter, self.index = parameter, index
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out_features, in_features]."""
        part = self.stack._parameters[self.parameter][self.index]
        return part.T if self.stack.dense.is_transposed else part

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        biases = self.stack._parameters.get(f"{self.parameter}_bias")
        return None if biases is None else biases[self.index]


class RoutedExperts(nn.Module):
    """What takes the place of a module of stacked experts and computes the same, expert after expert.

    Its children are `expert_0_up`, `expert_0_down` and so on. It has the parameters of the `dense` module itself, so checkpoints
    load into it and are saved from it as before; a stack of which every expert was packed is in no state dict.
    """

    dense: Any

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.__dict__["dense"] = dense  # its gate, its settings; the parameters are common
        self._held: tuple[list[Any], PackedExperts] | None = None
        self.first = 0
        self._parameters = dense._parameters
        first = "gate_up_proj" if self.dense.has_gate else "up_proj"
        self.experts = len(dense._parameters[first])  # type: ignore[arg-type]
        for index in range(self.experts):
            self.add_module(f"expert_{index}_{UP}", ExpertLinear(self, first, index))
            self.add_module(f"expert_{index}_{DOWN}", ExpertLinear(self, "down_proj", index))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; of each token the experts `top_k_index` [tokens, k] (one past the last: none) and
        their weights. -> [tokens, hidden]. Only the experts that some token was sent to are read.

        One operation where all experts are packed; else, and for gradients, one expert after the other.
        """
        if (packed := self._packed(hidden_states, top_k_index, top_k_weights)) is not None:
            return routed_experts(hidden_states, top_k_index, top_k_weights, packed)

        def run(index: int, x: Tensor) -> Tensor:
            up, down = self._linears(index)
            hidden = up(x)
            return down(self.dense._apply_gate(hidden) if self.dense.has_gate else self.dense.act_fn(hidden))

        return by_expert(hidden_states, top_k_index, top_k_weights, self.experts, run)

    def outside(self, first: int, stop: int) -> list[str]:
        """Names of the children that are not of the experts `first` to `stop` - 1."""
        numbers = [n for n in range(self.first, self.first + self.experts) if not first <= n < stop]
        return [f"expert_{number}_{part}" for number in numbers for part in (UP, DOWN)]

    def keep(self, first: int, stop: int) -> None:
        """Forget all experts but those from `first` to `stop` - 1, which keep their names; 0 then means the first of them."""
        if (first, stop) == (self.first, self.first + self.experts):
            return
        for name in self.outside(first, stop):
            delattr(self, name)
        for name, stack in self._parameters.items():
            if stack is not None:
                part = stack[first - self.first : stop - self.first].clone()
                self._parameters[name] = nn.Parameter(part, stack.requires_grad)
        for child in self.children():
            if isinstance(child, ExpertLinear):
                child.index += self.first - first
        self.first, self.experts, self._held = first, stop - first, None

    def _linears(self, index: int) -> tuple[nn.Module, nn.Module]:
        up, down = (self._modules[f"expert_{self.first + index}_{part}"] for part in (UP, DOWN))
        assert up is not None and down is not None
        return up, down

    def _packed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> PackedExperts | None:
        """All experts as the operation takes them; None where it cannot give what is asked for."""
        inputs = (hidden_states, top_k_index, top_k_weights)
        if torch.compiler.is_compiling() or not all(type(each) is Tensor and not each.is_meta for each in inputs):
            return None
        if torch.is_grad_enabled() and (
            self.dense.has_bias or hidden_states.requires_grad or top_k_weights.requires_grad
        ):
            return None
        if self._held is None or not self._holds(top_k_index):
            self._held = None
            linears = (each for index in range(self.experts) for each in self._linears(index))
            if not all(map(_runs_as_it_is, linears)) or (gate := gate_of(self.dense)) is None:
                return None
            packed = self._made(gate)  # lays out what is not yet
            self._held = _state(cast(list[nn.Module], list(self._modules.values()))), packed
        return self._held[1]

    def _holds(self, top_k_index: Tensor) -> bool:
        """Is what was made of the experts still what they are? One token on a CPU asks only those that it chose: 8 of 128 in 15 us,
        all of them in 83. Who was chosen on a GPU would have to be waited for."""
        assert self._held is not None
        linears: list[Any] = list(self._modules.values())
        made = self._held[0]
        if len(linears) != len(made[0]):
            return False
        if top_k_index.device.type != "cpu" or top_k_index.numel() > self.experts // 2:
            return _state(linears) == made
        # The operation says what is wrong with an index outside.
        experts = [index for index in top_k_index.flatten().tolist() if 0 <= index < self.experts]
        chosen = [2 * index + part for index in experts for part in (0, 1)]
        return _state([linears[place] for place in chosen]) == [[column[place] for place in chosen] for column in made]

    def _made(self, gate: Gate) -> PackedExperts:
        ups, downs = zip(*map(self._linears, range(self.experts)), strict=True)
        precision = min((each.precision for each in (*ups, *downs)), key=PRECISIONS.index)
        up, down = (tuple(each.operand() for each in part) for part in (ups, downs))
        return PackedExperts(up, down, gate, _stacked_biases(ups), _stacked_biases(downs), precision)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def packed_stacks(self, besides: Container[str] = ()) -> list[str]:
        """The parameters of which no expert is dense any more, or would be once the children `besides` are packed, too."""
        dense = {c.parameter for n, c in self.named_children() if isinstance(c, ExpertLinear) and n not in besides}
        return [name for name in self._parameters if name.removesuffix("_bias") not in dense]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.packed_stacks():
            destination.pop(prefix + name, None)


def _state(linears: Sequence[nn.Module]) -> list[list[Any]]:
    """All of each that `RoutedExperts._made` depends on."""
    held = list(map(vars, linears))
    return [
        list(linears),
        [each.get("_operand") for each in held],
        [each.get("_precision") for each in held],
        [each["_forward_hooks"] or each["_forward_pre_hooks"] or each.get("forward") for each in held],
        [None if (bias := each["_parameters"].get("bias")) is None else _state_of(bias) for each in held],
    ]


def _state_of(bias: Tensor) -> tuple[int, int | None]:
    return bias.data_ptr(), None if bias.is_inference() else bias._version


def _runs_as_it_is(linear: nn.Module) -> bool:
    """Neither dense nor watched."""
    watched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return isinstance(linear, PackedLinear) and not watched


def _stacked_biases(linears: Sequence[PackedLinear]) -> Tensor | None:
    """fp32 [experts, rows]."""
    if all(each.bias is None for each in linears):
        return None
    found = [None if each.bias is None else each.bias.detach().float() for each in linears]
    zeros = next(torch.zeros_like(bias) for bias in found if bias is not None)
    return torch.stack([zeros if bias is None else bias for bias in found])


def gate_of(dense: Any) -> Gate | None:
    """What a module of stacked experts does between its Linears, found by trying: a family may have an `_apply_gate` of its own,
    whose limits stand in attributes. None where no `Gate` computes the same."""
    given = {name: getattr(dense, name, None) for name in ("limit", "swiglu_limit", "alpha", "swiglu_alpha")}
    number = {name: value for name, value in given.items() if isinstance(value, int | float) and value > 0}
    limits = [math.inf, *(value for name, value in number.items() if "limit" in name)]
    scales = [(1.0, 0.0), *((value, 1.0) for name, value in number.items() if "alpha" in name)]
    # Both sides of every limit, alone and against each other.
    ends = [end for limit in limits if limit < math.inf for end in (-2 * limit, 2 * limit)]
    values = torch.tensor([x / 2 for x in range(-12, 13)] + ends, dtype=torch.float32, device="cpu")
    pairs = torch.cartesian_prod(values, values)
    h = torch.cat([pairs, pairs.flip(0, 1)], -1)  # two units: their order shows
    try:
        expected = dense._apply_gate(h) if dense.has_gate else dense.act_fn(h)
    except (RuntimeError, TypeError, AttributeError):  # a gate that needs more than these numbers
        return None
    layouts = (False, True) if dense.has_gate else (False,)
    for interleaved, activation, limit, (alpha, offset) in product(layouts, ACTIVATIONS, limits, scales):
        gate = Gate(activation, dense.has_gate, interleaved, limit, alpha, offset)
        made = gate(h)
        if made.shape == expected.shape and torch.allclose(made, expected, rtol=1e-5, atol=1e-5):
            return gate
    return None


def is_stack(module: nn.Module) -> bool:
    known = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))
    down = module._parameters.get("down_proj")
    return known and down is not None and down.dim() == 3


def take_apart(model: nn.Module) -> None:
    """Put a `RoutedExperts` in the place of every module of stacked experts."""
    for name, module in list(model.named_modules()):
        if is_stack(module) and name:
            _replace(model, name, RoutedExperts(module))


def put_together(model: nn.Module) -> None:
    """Undo `take_apart` where no expert was packed; elsewhere drop the stacks of which none is dense."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, RoutedExperts):
            continue
        if all(isinstance(child, ExpertLinear) for child in module.children()):
            _replace(model, name, module.dense)
        for stack in module.packed_stacks():
            del module._parameters[stack]


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """The experts of `model` as Linears of their own within, put together again however it ends."""
    try:
        take_apart(model)
        yield
    finally:
        put_together(model)


def stacks_of(model: nn.Module, linears: set[str]) -> set[str]:
    """Keys of the stacked parameters whose experts are all among the named `linears`."""
    whole = set()
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            packed = {child for child, _ in module.named_children() if f"{name}.{child}" in linears}
            whole |= {f"{name}.{key}" for key in module.packed_stacks(packed)}
    return whole


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    new.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), leaf, new)
