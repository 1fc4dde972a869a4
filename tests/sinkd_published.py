"""SinKD's loss term as its paper and released code define it (arXiv 2402.17110), written anew in plain torch, fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def sinkhorn_term(student: Tensor, teacher: Tensor, temperature: float, epsilon: float, iterations: int) -> Tensor:
    """[N, V] each -> sum of P D, P the plan after so many normalisations of rows, then columns, to 1."""
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (student, teacher))
    distance = torch.stack([torch.stack([(row - other).abs().sum() for other in q]) for row in p])
    plan = torch.exp(-distance / epsilon)
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * distance).sum()


def kl_term(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (student, teacher))
    return (q * (q.log() - p.log())).sum(-1).mean()


def cross_entropy_term(student: Tensor, labels: Tensor) -> Tensor:
    chosen = torch.softmax(student.double(), -1)[torch.arange(len(labels)), labels]
    return -chosen.log().mean()
