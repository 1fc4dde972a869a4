"""Stacked experts taken apart: transformers keeps all experts of a layer in 3-D parameters; here each projection of each expert is
a Linear of its own, which methods compress, folders name and packed layers replace like any other.

Every class that transformers' `use_experts_implementation` decorates is known by the attributes that it sets, whatever the family.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

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
        self._parameters = dense._parameters
        first = "gate_up_proj" if self.dense.has_gate else "up_proj"
        self.experts = len(dense._parameters[first])  # type: ignore[arg-type]
        for index in range(self.experts):
            self.add_module(f"expert_{index}_{UP}", ExpertLinear(self, first, index))
            self.add_module(f"expert_{index}_{DOWN}", ExpertLinear(self, "down_proj", index))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; of each token the experts `top_k_index` [tokens, k] (one past the last: none) and
        their weights. -> [tokens, hidden]. Only the experts that some token was sent to are read."""
        total = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index == self.experts:
                continue
            if not 0 <= index < self.experts:
                raise IndexError(f"a token was sent to expert {index}; allowed: 0 to {self.experts - 1}")
            token, place = torch.where(top_k_index == index)
            up, down = (getattr(self, f"expert_{index}_{part}") for part in (UP, DOWN))
            hidden = up(hidden_states[token])
            hidden = self.dense._apply_gate(hidden) if self.dense.has_gate else self.dense.act_fn(hidden)
            weighted = down(hidden) * top_k_weights[token, place, None]
            total.index_add_(0, token, weighted.to(total.dtype))
        return total

    def packed_stacks(self, besides: Container[str] = ()) -> list[str]:
        """The parameters of which no expert is dense any more, or would be once the children `besides` are packed, too."""
        dense = {c.parameter for n, c in self.named_children() if isinstance(c, ExpertLinear) and n not in besides}
        return [name for name in self._parameters if name.removesuffix("_bias") not in dense]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.packed_stacks():
            destination.pop(prefix + name, None)


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
