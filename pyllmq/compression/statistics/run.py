"""What statistics are taken from: a walk through the blocks of a model, and how much each token and row of it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..calibration import Batch
from ..ranks import ALONE, Ranks
from .blocks import BlockLoop
from .loss_gradients import LossGradients


@dataclass
class CalibrationRun:
    """The calibration data of this process on its way through the blocks."""

    loop: BlockLoop
    ranks: Ranks = ALONE
    gradients: LossGradients = field(default_factory=LossGradients)
    """Weights of rows and tokens by the loss; empty: all alike."""
    sequential: bool = True
    """The Linears of a block see the change of those before them in the block."""
    silence: bool = False
    """What follows a sound counts, too. Whisper sees it, whatever the mask says."""
    covariance: bool = False
    """Hessians are the mean of x x^T, and the mean of x comes with them where all Linears have a bias; else 2/n sum x x^T."""

    @property
    def batches(self) -> Sequence[Batch]:
        return self.loop.batches
