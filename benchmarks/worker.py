"""A system under test in a process of its own: it answers lines of JSON on stdin with lines of JSON on stdout."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pyllmq.memory import peak_memory, return_freed


class System(Protocol):
    nbytes: int
    """Of all weights, as they lie in memory or in the file."""

    def prompt(self, tokens: int) -> float:
        """Seconds from the call to the first token."""

    def decode(self, context: int, tokens: int) -> list[float]:
        """Seconds of each token after `context` others."""


# ---- in the process -------------------------------------------------------------------------------------------------


def serve(make: Callable[[], System]) -> None:
    """Make the system and do what stdin says until it ends. What anything else prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        system = make()
        _forget_peak()
        answer(nbytes=system.nbytes)
        for line in sys.stdin:
            asked = json.loads(line)
            what = asked.pop("do")
            answer(found=peak_memory() if what == "peak" else getattr(system, what)(**asked))
    except Exception as error:  # whatever it is, the run of the others goes on
        answer(error=f"{type(error).__name__}: {error}")


def _forget_peak() -> None:
    """Making the model may take more memory than running it."""
    gc.collect()
    return_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


# ---- outside of it --------------------------------------------------------------------------------------------------


HIDDEN = ("scipy", "sklearn", "triton")
"""transformers imports them where they are installed, 135 MB. pyllmq does not ask for them, and no system uses them."""

_START = """
import runpy, sys
sys.modules.update(dict.fromkeys({hidden}))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Worker:
    """A process that makes its system; `nbytes` waits until it has. Raises RuntimeError with its own words where it fails."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(hidden=HIDDEN), module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    @cached_property
    def nbytes(self) -> int:
        made: int = self._answer()["nbytes"]
        return made

    def ask(self, what: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()["found"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the process ended: {self.log.read().strip()[-300:] or 'it said nothing'}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()
