"""Where the weights of a model are while a block of it is worked on: in memory, or in the files of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

OUTSIDE = ""
"""Unit of everything that is in no block."""


class MadeFromOthersError(ValueError):
    """A weight that no tensor of the files is: transformers merges, splits or stacks those of the files as it loads."""


class Weights:
    """Where the weights are while they are not worked on: in this class, always in memory."""

    def load(self, unit: str) -> None:
        """Make the tensors of a block, or of `OUTSIDE`, ready to run."""

    def drop(self, unit: str) -> None:
        """They are not needed for now."""

    def rest(self, unit: str) -> None:
        """Its tensors are not read for a while."""

    def settle(self, blocks: Iterable[str]) -> None:
        """Only these blocks are units of their own; everything else belongs to `OUTSIDE`."""

    @contextmanager
    def loaded(self, unit: str) -> Iterator[None]:
        self.load(unit)
        try:
            yield
        finally:
            self.drop(unit)
