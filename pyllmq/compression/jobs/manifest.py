"""What a compression job has finished, kept in a folder beside its output, so that it can be taken up again.

    OUT.partial/
        manifest.json       the signature of the job, its plan, and one entry for every finished unit
        folder/             the future OUT: one safetensors file for every finished unit
        hidden.*            what the last finished block gave out for each calibration batch

Every file is written beside its place, synced and renamed into it. The manifest is written last: what it does not name does not
count.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration import Batch

PART = ".part"


class Manifest:
    """The working folder of the job that writes `output`; `contents` are the signature, the plan and the finished units."""

    def __init__(self, output: Path, contents: dict[str, Any]) -> None:
        self.place, self.contents = working_folder(output), contents
        self.folder = self.place / "folder"
        self.finished: list[dict[str, Any]] = contents["finished"]

    # ---- begin and resume ----

    @classmethod
    def begin(cls, output: Path, signature: Mapping[str, Any]) -> Manifest:
        """A new job. Raises FileExistsError if there is an unfinished one."""
        place = working_folder(output)
        if (place / "manifest.json").exists() and (place / "folder").is_dir() and cls._read(place)["finished"]:
            raise FileExistsError(
                f"{place} holds an unfinished compression; go on with --resume, or delete that folder to begin anew"
            )
        if (place / "lock").exists():
            with _lock(place):
                shutil.rmtree(place, ignore_errors=True)
        manifest = cls(output, {"signature": dict(signature), "plan": None, "finished": []})
        manifest.folder.mkdir(parents=True, exist_ok=True)
        manifest._write()
        return manifest

    @classmethod
    def resume(cls, output: Path, signature: Mapping[str, Any], finished: bool = False) -> Manifest:
        """The unfinished job, or one that was kept when it was `finished`. Raises ValueError, with what differs, if it is not the
        same as `signature` says."""
        place = working_folder(output)
        if not (place / "manifest.json").exists():
            raise FileNotFoundError(f"there is nothing to resume: {place} has no manifest.json; leave --resume out")
        folder = place / "folder"
        if not folder.is_dir() and finished and output.is_dir():
            folder = output
        if not folder.is_dir():
            raise FileNotFoundError(f"there is nothing to resume: {output} is finished; {place} can be deleted")
        manifest = cls(output, cls._read(place))
        differences = list(_differences(manifest.contents["signature"], json.loads(json.dumps(signature))))
        if differences:
            more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise ValueError(
                f"{place} cannot be resumed, because this is another job: {'; '.join(differences[:5])}{more}. Give the same as "
                "then, or delete that folder to begin anew"
            )
        for entry in manifest.finished:
            file = folder / entry["file"]
            if not file.is_file() or file_digest(file) != entry["sha256"]:
                raise ValueError(f"{file} is not as it was written; it is damaged, delete {place} to begin anew")
        return manifest

    @staticmethod
    def _read(place: Path) -> dict[str, Any]:
        try:
            contents = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
            contents["signature"], contents["finished"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place / 'manifest.json'} cannot be read ({error!r}); delete {place}") from error
        return contents

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises RuntimeError if another process is at work on the same job. Clears what a killed one left half written, and what
        is left of a job that is refused before anything of it is finished."""
        with _lock(self.place):
            self._clear()
            try:
                yield
            except ValueError:
                if not self.finished:
                    self.remove()
                raise

    def _clear(self) -> None:
        """By what the manifest names, not by our own suffix: safetensors writes under a passing name of its own (`.tmp...`)."""
        named = {entry["file"] for entry in self.finished}
        strays = [file for file in self.folder.iterdir() if file.name not in named] if self.folder.is_dir() else []
        strays += [file for file in self.place.iterdir() if file.name.startswith(".") or file.name.endswith(PART)]
        for stray in strays:
            if stray.is_dir():  # what a tokenizer may have begun to write
                shutil.rmtree(stray)
            else:
                stray.unlink()

    # ---- what is finished ----

    @property
    def plan(self) -> dict[str, Any] | None:
        return self.contents["plan"]

    def set_plan(self, plan: Mapping[str, Any]) -> None:
        self.contents["plan"] = dict(plan)
        self._write()

    def add(self, unit: str, file: str, more: Mapping[str, Any]) -> None:
        """From here on the unit is finished."""
        written = self.folder / file
        entry = {"unit": unit, "file": file, "bytes": written.stat().st_size, "sha256": file_digest(written)}
        self.finished.append(entry | dict(more))
        self._write()

    def _write(self) -> None:
        write_text(self.place / "manifest.json", json.dumps(self.contents, indent=1) + "\n")

    def remove(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    with (place / "lock").open("wb") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"another process is at work in {place}; wait for it, or end it") from error
        yield


def working_folder(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


# ---- signature ------------------------------------------------------------------------------------------------------

SIGNED = (".json", ".safetensors", ".model", ".txt", ".jinja")


def source_signature(folder: Path) -> dict[str, str]:
    """File -> SHA-256, of all files that a model and its tokenizer are made of."""
    return {f.name: file_digest(f) for f in sorted(folder.iterdir()) if f.is_file() and f.suffix in SIGNED}


def file_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def batches_digest(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            tensor = batch[key].detach().cpu().contiguous()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _differences(then: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _differences(then.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    elif then != now:
        yield f"{path} was {_short(then)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


# ---- whole files or none --------------------------------------------------------------------------------------------


def write_text(target: Path, text: str) -> None:
    with _placed(target) as part:
        part.write_text(text, encoding="utf-8")


def write_tensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. Raises OSError if the disk is full or read-only; an earlier file then stays as it was."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _placed(target) as part:
        try:
            save_file(dict(tensors), part, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{target} cannot be written ({error}); is the disk full?") from error


@contextmanager
def _placed(target: Path) -> Iterator[Path]:
    part = target.with_name(target.name + PART)
    try:
        yield part
        sync(part)
        os.replace(part, target)
        sync(target.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    windows = sys.platform == "win32"  # it opens no folders, and syncs no file that is open for reading alone
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
