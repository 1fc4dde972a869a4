"""Spending a budget at one price: what each of many buys is where a further unit saves as much for the same cost everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def buy(options: Mapping[str, tuple[Tensor, Tensor]], budget: float) -> dict[str, int] | None:
    """name -> which option it gets, for the least loss in all at a cost of at most `budget`; None where nothing is that cheap.

    The price is found by bisection; what it leaves over goes to those that would change next.

    Args:
        options: name -> (cost, loss) of each of its options, float64, in one unit each for all names.
    """

    def at(price: float) -> dict[str, int]:
        return {name: int((loss + price * cost).argmin()) for name, (cost, loss) in options.items()}

    def cost_of(chosen: Mapping[str, int]) -> float:
        return sum(float(options[name][0][at]) for name, at in chosen.items())

    least = {name: int(cost.argmin()) for name, (cost, _) in options.items()}
    if cost_of(least) > budget:
        return None
    largest = max(float(loss.max()) for _, loss in options.values())
    high = math.log(largest + 1e-280) + 1
    low = high - 100
    while high - low > 1e-6:
        middle = (low + high) / 2
        if cost_of(at(math.exp(middle))) > budget:
            low = middle
        else:
            high = middle
    chosen, richer = at(math.exp(high)), at(math.exp(low))
    if cost_of(chosen) > budget:
        chosen = least
    for name in chosen:
        if cost_of(chosen | {name: richer[name]}) <= budget:
            chosen[name] = richer[name]
    return chosen
