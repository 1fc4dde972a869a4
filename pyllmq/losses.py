"""Losses for distillation. SinKD: a Sinkhorn distance between the outputs of a teacher and a student over a batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import softmax_cdist_l1
from .transport import sinkhorn

IGNORED_LABEL = -100
"""Label of a token that no loss looks at, as in torch and transformers."""

OVER = ("tokens", "sequences")


class SinkhornDistillationLoss(nn.Module):
    """SinKD (arXiv 2402.17110): cross-entropy with the labels, KL divergence from the teacher, and a Sinkhorn distance.

        D[i, j] = sum over v of |softmax(student_i / T)[v] - softmax(teacher_j / T)[v]|        rows i, j of one batch
        P = exp(-D / epsilon), its rows and then its columns scaled to sum 1, `iterations` times
        loss = cross_entropy_weight * CE + kl_weight * KL(teacher || student) + weight * sum over i, j of P[i, j] D[i, j]

    KL at the temperature T without the factor T^2, CE at temperature 1, both averaged over the rows; the sum over P is one of
    all rows, as published. The gradient goes through all iterations; the teacher gets none.

    Args:
        temperature: T of the Sinkhorn term, and of KL unless kl_temperature is given.
        epsilon, iterations: of Sinkhorn's loop.
        weight, cross_entropy_weight, kl_weight: the published code has 0.8 * 0.001, 0.1 and 0.9 for classifiers; 0.0008, 1 and 0.1
            for language models. 0 leaves a term out.
        over: what a batch is for logits [B, L, V]: "tokens", all tokens of the call; or "sequences", the tokens of each sequence.
        group: at most so many rows to a batch, in their order (None: all). The cost of D is rows x group x V.

    Source: arXiv 2402.17110 and its released code, with the vocabulary as the softmax's dimension throughout.
    """

    def __init__(
        self,
        temperature: float = 2.0,
        epsilon: float = 0.1,
        iterations: int = 20,
        weight: float = 0.0008,
        cross_entropy_weight: float = 0.1,
        kl_weight: float = 0.9,
        kl_temperature: float | None = None,
        over: str = "tokens",
        group: int | None = None,
    ) -> None:
        super().__init__()
        if over not in OVER:
            raise ValueError(f"over is {over!r}; allowed: {', '.join(map(repr, OVER))}")
        if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
            raise ValueError(f"group is {group!r}; allowed: None, or an integer of at least 1")
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations is {iterations!r}; allowed: an integer of at least 1")
        self.kl_temperature = temperature if kl_temperature is None else kl_temperature
        positive = {"temperature": temperature, "epsilon": epsilon, "kl_temperature": self.kl_temperature}
        for name, number in positive.items():
            if not 0 < number < math.inf:
                raise ValueError(f"{name} is {number!r}; it must be positive and finite")
        weights = {"weight": weight, "cross_entropy_weight": cross_entropy_weight, "kl_weight": kl_weight}
        for name, number in weights.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} is {number!r}; allowed: a number of at least 0")
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.weight, self.cross_entropy_weight, self.kl_weight = weight, cross_entropy_weight, kl_weight
        self.over, self.group = over, group

    def extra_repr(self) -> str:
        names = ["temperature", "epsilon", "iterations", "weight", "cross_entropy_weight", "kl_weight", "over", "group"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            student_logits, teacher_logits: [B, V] or [B, L, V], of one shape.
            labels: [B] or [B, L], of the same positions (a causal model's are shifted before); -100 where there is none. Needed
                unless cross_entropy_weight is 0.
            mask: bool or 0/1, [B] or [B, L], true for rows that take part, such as an attention mask; None: those with a label,
                or all.

        Raises:
            ValueError: shapes that do not fit, labels missing, or a mask that leaves no row.
        """
        terms = self.terms(student_logits, teacher_logits, labels, mask)
        weights = {"cross_entropy": self.cross_entropy_weight, "kl": self.kl_weight, "sinkhorn": self.weight}
        return sum(
            (weights[name] * term for name, term in terms.items()),
            student_logits.new_zeros((), dtype=_wide(student_logits)),
        )

    def terms(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms whose weight is not 0, before it: "cross_entropy", "kl", "sinkhorn". Arguments as of `forward`."""
        valid = self._valid(student_logits, teacher_logits, labels, mask)
        teacher_logits = teacher_logits.detach()
        taking_part = int(valid.sum())
        if not taking_part:
            raise ValueError(
                f"no row of {tuple(valid.shape)} takes part: the mask, or the labels where there is no mask, leave none"
            )
        every = taking_part == valid.numel()
        student, teacher = (
            logits.flatten(0, -2) if every else logits[valid] for logits in (student_logits, teacher_logits)
        )
        terms = {}
        if self.cross_entropy_weight and labels is not None:
            wanted = labels[valid]
            labelled = (wanted != IGNORED_LABEL).sum().clamp_min(1)
            summed = F.cross_entropy(student.to(_wide(student)), wanted, ignore_index=IGNORED_LABEL, reduction="sum")
            terms["cross_entropy"] = summed / labelled
        if self.kl_weight:
            log_p, log_q = (
                F.log_softmax(logits.to(_wide(logits)) / self.kl_temperature, -1) for logits in (student, teacher)
            )
            terms["kl"] = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        if self.weight:
            terms["sinkhorn"] = self._sinkhorn(student, teacher, valid)
        return terms

    def _valid(self, student: Tensor, teacher: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        """bool [B] or [B, L]: the rows that take part."""
        if student.dim() not in (2, 3) or student.shape != teacher.shape:
            raise ValueError(
                f"student_logits are {tuple(student.shape)}, teacher_logits {tuple(teacher.shape)}; both must be [B, V] or "
                "[B, L, V] of one shape"
            )
        for name, given in (("labels", labels), ("mask", mask)):
            if given is not None and given.shape != student.shape[:-1]:
                raise ValueError(
                    f"{name} is {tuple(given.shape)}; it must be {tuple(student.shape[:-1])}, as the logits without V"
                )
        if labels is None and self.cross_entropy_weight:
            raise ValueError("labels are needed for the cross-entropy term; pass them, or set cross_entropy_weight=0")
        if mask is not None:
            return mask.bool()
        if labels is not None:
            return labels != IGNORED_LABEL
        return torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)

    def _sinkhorn(self, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
        """sum of P D over the batches that the rows [rows, V], the valid ones in their order, fall into."""
        rows = student.shape[0]
        counts = valid.sum(-1).tolist() if self.over == "sequences" and valid.dim() == 2 else [rows]
        begins: list[int] = []
        sizes: list[int] = []
        begin = 0
        for count in counts:
            step = self.group or max(count, 1)
            begins += range(begin, begin + count, step)
            sizes += [min(step, count - at) for at in range(0, count, step)]
            begin += count
        longest = max(sizes)
        place, size = torch.arange(longest, device="cpu"), torch.tensor(sizes, device="cpu")[:, None]
        mass = (place < size).to(student.device, _wide(student))
        if sizes == [longest] * len(sizes):
            shape = (len(sizes), longest, student.shape[-1])
            student, teacher = student.reshape(shape), teacher.reshape(shape)
        else:  # places behind the last row of a batch repeat one of its rows, without mass
            index = (torch.tensor(begins, device="cpu")[:, None] + torch.minimum(place, size - 1)).to(student.device)
            student, teacher = student[index], teacher[index]
        distance = softmax_cdist_l1(student, teacher, self.temperature)
        plan = sinkhorn(distance, mass, mass, self.epsilon, self.iterations)
        assert isinstance(plan, Tensor)  # output="plan"
        return (plan * distance).sum()


def _wide(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(logits.dtype, torch.float32)
