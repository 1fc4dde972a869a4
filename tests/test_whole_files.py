"""A disk that fails at any write, flush or rename of a job: whole files or none, and what is finished is not done again."""

import errno
import io
import os
import shutil
from contextlib import contextmanager

import pytest
import safetensors.torch
from safetensors import SafetensorError

import pyllmq
from pyllmq import KMeansConfig, compress_files, loading
from pyllmq.compression.jobs.manifest import working_folder

from . import models
from .kill_and_resume import digests
from .test_stream import small_batches, small_llama, streamed


class Disk:
    """Counts what is written below a folder, and fails at one of these operations."""

    def __init__(self, place, fails_at, number):
        self.place, self.fails_at, self.number, self.count = str(place), fails_at, number, 0

    def operation(self, path):
        if not str(path).startswith(self.place):
            return
        self.count += 1
        if self.count == self.fails_at:
            raise OSError(self.number, os.strerror(self.number), str(path))

    @contextmanager
    def in_use(self, monkeypatch):
        opened, serialized = io.open, safetensors.torch.serialize_file

        def open_(file, mode="r", *more, **named):
            if set(mode) & set("wax+"):
                self.operation(file)
            return opened(file, mode, *more, **named)

        def serialize(tensors, file, *more, **named):
            try:
                self.operation(file)
            except OSError as error:
                with opened(file, "wb") as part:
                    part.write(b"\x80" * 100)  # the disk was full in the middle of it
                raise SafetensorError(f"I/O error: {error.strerror}") from error
            return serialized(tensors, file, *more, **named)

        def counted(name):
            before = getattr(os, name)

            def call(path, *more, **named):
                if name != "mkdir" or not os.path.isdir(path):
                    self.operation(os.readlink(f"/proc/self/fd/{path}") if name == "fsync" else path)
                return before(path, *more, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(io, "open", open_)
            patch.setattr("builtins.open", open_)
            patch.setattr(safetensors.torch, "serialize_file", serialize)
            for name in ("replace", "rename", "fsync", "mkdir"):
                patch.setattr(os, name, counted(name))
            yield


def by_blocks(source, output, resume=False):
    streamed(source, output, batches=BATCHES, resume=resume)


def by_files(source, output, resume=False):
    compress_files(source, output, KMeansConfig(2), resume=resume, progress=False)


def as_a_model(source, output, resume=False):
    model = loading.load_model(source)
    pyllmq.swap_linear(model, lambda linear: pyllmq.CodebookLinear.from_dense(linear, 2))
    pyllmq.save_pretrained(model, output)


BATCHES = small_batches(1)


@pytest.mark.parametrize("write", [by_blocks, by_files, as_a_model])
@pytest.mark.parametrize("earlier", [False, True])
def test_whole_folders_or_none(tmp_path, monkeypatch, write, earlier):
    source, whole, output = tmp_path / "source", tmp_path / "undisturbed" / "output", tmp_path / "place" / "output"
    small_llama(num_hidden_layers=1).save_pretrained(source, max_shard_size="30KB")
    whole.parent.mkdir()
    output.parent.mkdir()
    disk = Disk(whole.parent, 0, 0)
    with disk.in_use(monkeypatch):
        write(source, whole)
    wanted, operations = digests(whole), disk.count
    assert operations >= 3
    if earlier:
        shutil.copytree(whole, output)
        (output / "config.json").write_text("{}")
    before = digests(output) if earlier else None
    failed = resumed = 0
    # Each operation fails in one of the two cases; of the many of a job by blocks, every fifth.
    turns = range(1 + earlier * (5 if write is by_blocks else 1), operations + 1, 10 if write is by_blocks else 2)
    for at in turns:
        number = (errno.ENOSPC, errno.EROFS, errno.EIO)[at % 3]
        try:
            with Disk(output.parent, at, number).in_use(monkeypatch):
                write(source, output)
        except (OSError, SafetensorError):
            failed += 1
        else:
            continue
        assert (digests(output) if output.exists() else None) in (before, wanted)
        left = {path.name for path in output.parent.iterdir()}
        assert left <= {output.name, working_folder(output).name}
        assert not list(output.parent.rglob("*.part"))
        resume = (working_folder(output) / "manifest.json").exists()
        write(source, output, resume)
        resumed += resume
        assert digests(output) == wanted and not working_folder(output).exists()
        shutil.rmtree(output)
        if earlier:
            shutil.copytree(whole, output)
            (output / "config.json").write_text("{}")
    assert failed == len(turns) and (resumed or write is as_a_model)


def test_a_shard_that_cannot_be_read(tmp_path, monkeypatch):
    source, output = tmp_path / "source", tmp_path / "output"
    models.tiny_llama().save_pretrained(source, max_shard_size="100KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "kept")
    shard.mkdir()
    for write in (by_blocks, by_files):
        with pytest.raises(OSError, match=shard.name):
            write(source, output)
        assert not output.exists() and not working_folder(output).exists()
    shard.rmdir()
    (tmp_path / "kept").rename(shard)
    by_files(source, output)
    packed = sorted(output.glob("*.safetensors"))[1]
    packed.unlink()
    packed.mkdir()
    with pytest.raises(pyllmq.FormatError, match=f"{packed.name} cannot be read"):
        pyllmq.from_pretrained(output)
