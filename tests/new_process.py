"""Python in a new process that has imported torch and transformers and nothing of ours.

It is forked from a server that has imported those two: they take 8 of the 9 seconds that a process of these tests would need.
"""

import multiprocessing
import os
import subprocess
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch", "transformers.models.auto.modeling_auto", "transformers.generation", "tokenizers"]
)

CHILD = """
import os, runpy, sys, warnings
for stream, name in enumerate(("stdout", "stderr"), 1):
    os.dup2(os.open(os.path.join(place, name), os.O_WRONLY | os.O_CREAT), stream)
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
warnings.simplefilter("ignore")
first, *rest = arguments
sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
sys.path.insert(0, folder if first in ("-c", "-m") else os.path.dirname(first))
if first == "-c":
    sys.argv = ["-c", *rest[1:]]
    exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
elif first == "-m":
    sys.argv = rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = arguments
    runpy.run_path(first, run_name="__main__")
"""


def run_python(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 600):
    """`python *arguments` (`-c CODE ...`, `-m MODULE ...` or `FILE ...`) with warnings off: what subprocess.run gives."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as place:
        names = {
            "place": place,
            "environment": dict(env or os.environ),
            "folder": str(cwd or Path.cwd()),
            "arguments": words,
        }
        process = SERVER.Process(target=exec, args=(CHILD, names))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout)
        said = [Path(place, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, process.exitcode, *said)
