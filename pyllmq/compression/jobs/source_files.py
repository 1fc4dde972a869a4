"""What a model folder holds beside its weights: tokenizer, processors, templates, licence, sub-folders of other libraries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


class SourceFiles:
    """The files of a model folder that compression replaces by nothing of its own."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __iter__(self) -> Iterator[Path]:
        """Relative to the folder; none that is hidden, and none of the weights."""
        for file in sorted(self.folder.rglob("*")):
            part = file.relative_to(self.folder)
            if file.is_file() and not part.name.endswith(WEIGHTS) and not any(p.startswith(".") for p in part.parts):
                yield part

    @property
    def nbytes(self) -> int:
        return sum((self.folder / part).stat().st_size for part in self)

    def save_pretrained(self, folder: Path) -> None:
        """Copy those that `folder` has not. As an item of `save_pretrained` it comes last."""
        for part in self:
            target = Path(folder) / part
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / part, target)
