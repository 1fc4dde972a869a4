"""Tensor parallel inference: every process of a torch.distributed group holds a part of each Linear. See `tensor_parallel`."""

from .integrations.parallel_loading import from_pretrained
from .tensor_parallel import COLUMNS, ROWS, STYLES, Plan, Split, cut, parallelize, plan

__all__ = ["COLUMNS", "ROWS", "STYLES", "Plan", "Split", "cut", "from_pretrained", "parallelize", "plan"]
