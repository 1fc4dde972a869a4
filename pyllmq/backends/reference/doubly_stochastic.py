"""doubly_stochastic in plain torch, on any device: in fp64 for fp64 logits and in fp32 for others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...operations import DOUBLY_STOCHASTIC, DOUBLY_STOCHASTIC_BACKWARD, Normalisation, anything
from .rows import BECAUSE, ORDER


def check_logits(logits: Tensor, shifted: bool) -> None:
    """Raise ValueError for values that have no doubly stochastic limit. Waits for the device."""
    if bool((logits.isnan() | (logits == torch.inf)).any()):
        raise ValueError("logits have a NaN or +inf entry; allowed: finite, or -inf where the result must be 0")
    impossible = logits == -torch.inf
    if bool(impossible.all(-1).any() or impossible.all(-2).any()):
        raise ValueError("a row or column of logits is -inf throughout, so it cannot sum to 1; make an entry finite")
    if not shifted and bool((logits > math.log(torch.finfo(logits.dtype).max) - 1).any()):
        raise ValueError(f"logits up to {float(logits.max()):.4g} overflow in exp; use shift='line' or shift='matrix'")


def doubly_stochastic(logits: Tensor, how: Normalisation) -> Tensor:
    """logits [B, n, m] -> [B, n, m]; see pyllmq.doubly_stochastic."""
    if how.columns_first:
        return doubly_stochastic(logits.mT, how._replace(columns_first=False)).mT
    iterations, _, softmax_start, shift, matrix_epsilon, division_epsilon = how
    if logits.device.type == "cpu":
        check_logits(logits, softmax_start or shift != "none")
    if softmax_start:
        matrix = torch.softmax(logits, -1)
    else:
        if shift == "line":
            logits = logits - logits.amax(-1, keepdim=True)
        elif shift == "matrix":
            logits = logits - logits.amax((-1, -2), keepdim=True)
        matrix = logits.exp()
        matrix = matrix / (matrix.sum(-1, keepdim=True) + division_epsilon)
    matrix = matrix + matrix_epsilon
    for iteration in range(iterations):
        if iteration:
            matrix = matrix / (matrix.sum(-1, keepdim=True) + division_epsilon)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + division_epsilon)
    return matrix


def doubly_stochastic_backward(logits: Tensor, grad: Tensor, how: Normalisation) -> Tensor:
    """The loop again, under autograd."""
    with torch.enable_grad():
        again = logits.detach().requires_grad_()
        return torch.autograd.grad(doubly_stochastic(again, how), again, grad)[0]


DOUBLY_STOCHASTIC.register("reference.doubly_stochastic", ORDER, anything, doubly_stochastic, BECAUSE)
DOUBLY_STOCHASTIC_BACKWARD.register(
    "reference.doubly_stochastic_backward", ORDER, anything, doubly_stochastic_backward, BECAUSE
)
