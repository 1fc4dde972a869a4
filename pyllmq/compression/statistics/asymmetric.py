"""Asymmetric calibration: the error that the compressed part of a model has at a Linear's place, for the Linear to make up for.

Sources: GPTAQ (arXiv 2504.02692) and QEP (2504.09629): a Linear's target is what the dense model has at its place, not what its
dense weight would give on the compressed model's inputs. Where the output is only added to a residual stream, the stream's
error is made up for as well: the place is the sum.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model_state import hooked

TOLERANCE = 0.02
"""Of the probe's root mean square: how closely a sum must follow it. Half-precision sums are rounded."""

SAMPLED = 64
"""Tokens of a sequence by which places are told: whole ones are 0.3 GB in the block of a 7B model."""


class Enough(Exception):
    """Ends a run of a model behind the last place of interest."""


@dataclass(eq=False)
class AsymmetricTarget:
    """e = (activation in the dense model) - (activation in the compressed model with this Linear still dense), at the tensor that
    the Linear's output reaches."""

    products: Tensor
    """float [N, K]: mean of e x^T over the tokens."""
    mean: Tensor
    """float [N]: mean of e."""

    def take_products(self) -> Tensor:
        """They are as large as the weight, so who uses them has them alone. Raises RuntimeError the second time."""
        if not self.products.numel():
            raise RuntimeError("the products of this target were taken; make its InputStatistics anew")
        products, self.products = self.products, torch.empty(0)
        return products


@dataclass(frozen=True)
class Place:
    """Where a Linear's output is looked at: the output of a module, or its first argument."""

    module: nn.Module
    entering: bool = False


class DenseBlock:
    """A block as it was before compression, run on what the dense blocks before it gave."""

    def __init__(
        self, block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[nn.Module, int], Tensor]
    ) -> None:
        """`run(block, index)` runs it on the dense inputs of batch `index`."""
        # Tensors are shared: compression puts other modules in the places of the dense ones and changes none of their tensors.
        shared = itertools.chain(block.parameters(), block.buffers())
        self.block = copy.deepcopy(block, {id(tensor): tensor for tensor in shared})
        self.run = partial(run, self.block)
        copies = dict(zip(block.modules(), self.block.modules(), strict=True))
        modules = {copied: module for module, copied in copies.items()}
        of_copy = {name: copies[module] for name, module in linears.items()}
        self.places = _find_places(self.block, of_copy, run)
        self.places_in_block = {
            name: Place(modules[place.module], place.entering) for name, place in self.places.items()
        }

    def look(self, names: Sequence[str], index: int, once: bool) -> dict[str, Tensor]:
        """What the dense model has at the places of `names`; if each of them runs `once`, the run ends where that is known."""
        found: dict[str, Tensor] = {}

        def check() -> None:
            if once and len(found) == len(names):
                raise Enough

        with watch({name: self.places[name] for name in names}, found, then=check), suppress(Enough):
            self.run(index)
        return found


@contextmanager
def watch(
    places: Mapping[Any, Place],
    found: dict[Any, Tensor],
    sample: bool = False,
    then: Callable[[], None] = lambda: None,
) -> Iterator[Counter[Any]]:
    """While it is open, whatever passes a place is written into `found`; with `sample` only the first tokens of it.

    `then` is called after each. Gives how often each place was passed.
    """
    passed: Counter[Any] = Counter()

    def keep(key: Any, value: Any) -> None:
        value = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(value, Tensor):
            found[key] = _sample(value.detach()).clone() if sample else value.detach()
            passed[key] += 1
            then()

    def hook(key: Any, place: Place) -> Any:
        if place.entering:
            return place.module.register_forward_pre_hook(lambda module, args: keep(key, args))
        return place.module.register_forward_hook(lambda module, args, output: keep(key, output))

    with hooked(hook(key, place) for key, place in places.items()):
        yield passed


def _sample(value: Tensor) -> Tensor:
    return value[:1, :SAMPLED] if value.dim() > 1 else value[:1]


def _find_places(
    block: nn.Module, linears: Mapping[str, nn.Module], run: Callable[[nn.Module, int], Tensor]
) -> dict[str, Place]:
    """For each Linear the last place that follows its output one to one, found by adding noise to it; else the output itself."""
    sums = [Place(module, entering=True) for module in block.modules() if module is not block] + [Place(block)]
    own = {name: Place(linear) for name, linear in linears.items()}
    before: dict[Any, Tensor] = {}
    with watch({place: place for place in (*sums, *own.values())}, before, sample=True) as passed:
        stream = run(block, 0)
    scale = stream.float().square().mean().sqrt()
    shape = _sample(stream).shape
    places = dict(own)
    for name, linear in linears.items():
        # Only what is shaped as the stream is added to it: not the experts, of which there may be hundreds.
        if own[name] not in before or before[own[name]].shape != shape:
            continue
        noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(0)).to(stream) * scale
        after: dict[Any, Tensor] = {}

        # A decoder's keys and values of the encoder are longer than its stream, which a sample does not show.
        def add(module: nn.Module, args: Any, output: Tensor, noise: Tensor = noise) -> Tensor:
            return output + noise if output.shape == noise.shape else output

        with (
            linear.register_forward_hook(add),
            watch({place: place for place in sums}, after, sample=True),
        ):
            run(block, 0)
        for place, value in after.items():
            if passed[place] == 1 and value.shape == before[place].shape == shape:
                rest = value.float() - before[place].float() - _sample(noise).float()
                if bool(rest.square().mean().sqrt() <= TOLERANCE * scale):
                    places[name] = place
    return places
