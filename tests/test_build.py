"""setup.py on a small tree of its own, in a folder whose name has a space: what is built, and what is built again."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "setup.py"
FILES = {
    "pyproject.toml": '[project]\nname = "small"\nversion = "1"\n',
    "pyllmq/__init__.py": "",
    "pyllmq/benchmarks/__init__.py": "",
    "pyllmq/triton_kernels/__init__.py": "",
    "csrc/bindings_cpu.cpp": '#include "answer.h"\nint one(); int two(); int three();\nextern "C" '
    '__attribute__((visibility("default"))) int answer() { return ANSWER + one() + two() + three(); }\n',
    "csrc/answer.h": "#define ANSWER 36\n",
    "csrc/one/cpu/leaf.cpp": "int one() { return 1; }\n",
    "csrc/two/cpu/leaf.cpp": '#include "two/cpu/leaf.h"\nint two() { return TWO; }\n',
    "csrc/two/cpu/leaf.h": "#define TWO 2\n",
    "csrc/runtime/leaf.cpp": "int three() { return 3; }\n",
    "csrc/bindings_cuda.cpp": "#error not for _cpu\n",
    "csrc/one/cuda/leaf.cu": "#error not for _cpu\n",
    "csrc/cuda/emulator/emulator.cpp": "#error only for the tests\n",
}


@pytest.fixture
def tree(tmp_path):
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    root = tmp_path / "a tree"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copy(SETUP, root)
    return root


def build(tree, *arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYLLMQ_", "CUDA", "LD_PRELOAD"))}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *(arguments or ("build_ext", "--inplace"))],
        cwd=tree,
        env=kept | {"CXXFLAGS": "-O0", "CCACHE_DISABLE": "1"} | environment,
        capture_output=True,
        text=True,
    )


def objects(tree):
    """Modification time of each object, by the name of its source."""
    found = {}
    for path in (tree / "build").rglob("*.o"):
        found[str(path).partition("pyllmq._cpu/csrc/")[2].removesuffix(".o")] = path.stat().st_mtime_ns
    return found


def answer(tree):
    (library,) = (tree / "pyllmq").glob("_cpu*")
    asked = [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


def test_only_what_changed_is_built_again(tree):
    done = build(tree, PYLLMQ_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert answer(tree) == 42
    first = objects(tree)
    assert set(first) == {"bindings_cpu.cpp", "one/cpu/leaf.cpp", "two/cpu/leaf.cpp", "runtime/leaf.cpp"}

    assert build(tree, PYLLMQ_CUDA="0").returncode == 0
    assert objects(tree) == first

    (tree / "csrc/two/cpu/leaf.h").write_text("#define TWO 20\n")
    assert build(tree, PYLLMQ_CUDA="0").returncode == 0
    assert answer(tree) == 60
    assert {name for name, time in objects(tree).items() if time != first[name]} == {"two/cpu/leaf.cpp"}

    # another build of the same tree shares nothing with it, and leaves it as it is
    sanitized = build(tree, "build", "--build-base", "build/other", "--build-lib", "build/other/lib", PYLLMQ_CUDA="0")
    assert sanitized.returncode == 0, sanitized.stdout + sanitized.stderr
    before = objects(tree)
    assert build(tree, PYLLMQ_CUDA="0").returncode == 0 and objects(tree) == before

    commands = json.loads((tree / "build/compile_commands.json").read_text())
    binding = [c["command"] for c in commands if c["file"] == "csrc/bindings_cpu.cpp"]
    others = [c["command"] for c in commands if c["file"] != "csrc/bindings_cpu.cpp"]
    assert len(binding) == 1 and len(others) == 3
    assert "pybind11" in binding[0] and not any("pybind11" in command for command in others)


def test_a_source_that_does_not_compile_is_named_and_nothing_is_left_behind(tree):
    (tree / "csrc/one/cpu/leaf.cpp").write_text("int one() { return nothing; }\n")
    done = build(tree, PYLLMQ_CUDA="0")
    assert done.returncode != 0
    assert "csrc/one/cpu/leaf.cpp" in done.stdout + done.stderr and "the build failed" in done.stderr
    assert not list((tree / "pyllmq").glob("_cpu*"))


FAKE_NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then echo compute_80; exit 0; fi
if [ "$1" = --help ]; then echo --compress-mode; exit 0; fi
echo "$@" >> "{log}"
while [ "$1" != -o ]; do shift; done
touch "$2"
"""


def with_fake_nvcc(tree):
    nvcc = tree / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(log=tree / "nvcc.log"))
    nvcc.chmod(0o755)
    (tree / "csrc/bindings_cuda.cpp").write_text("")
    return str(nvcc)


def test_cuda_is_built_when_asked_for_and_for_what_is_asked(tree):
    asked = {"CUDACXX": with_fake_nvcc(tree), "PYLLMQ_CUDA": "1", "PYLLMQ_CUDA_ARCHS": "80+PTX 90a"}
    done = build(tree, **asked)
    assert done.returncode == 0, done.stdout + done.stderr
    compiles = [line for line in (tree / "nvcc.log").read_text().splitlines() if "-c csrc/one/cuda/leaf.cu " in line]
    assert len(compiles) == 1 and "-lineinfo" not in compiles[0]
    assert "--compress-mode=size" in compiles[0]
    assert "code=[sm_80,compute_80]" in compiles[0] and "arch=compute_90a,code=sm_90a" in compiles[0]
    assert list((tree / "pyllmq").glob("_cuda*"))
    assert build(tree, PYLLMQ_DEBUG="1", **asked).returncode == 0
    assert "-lineinfo" in (tree / "nvcc.log").read_text()


def test_auto_builds_no_cuda_where_no_driver_is(tree):
    try:
        import ctypes

        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a driver")
    done = build(tree, CUDACXX=with_fake_nvcc(tree), PYLLMQ_CUDA="auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tree / "nvcc.log").exists() and not list((tree / "pyllmq").glob("_cuda*"))


@pytest.mark.parametrize(
    ("value", "complaint"), [("yes", "PYLLMQ_CUDA='yes' is not understood; allowed: 0"), ("1", "no nvcc was found")]
)
def test_what_is_asked_and_impossible_is_said(tree, value, complaint):
    compiler = shutil.which(os.environ.get("CXX", "g++").split()[0])
    done = build(tree, PYLLMQ_CUDA=value, PATH=str(tree), CXX=compiler)
    assert done.returncode != 0 and complaint in done.stderr


def test_what_an_instruction_set_compiles_runs_nowhere_else():
    """A variable that is made at import, or an inline function that the linker may take for other files, would run vectors of
    AVX-512 on every processor."""
    objects = [
        path for path in ROOT.glob("build/*/pyllmq._cpu/csrc/**/*.o") if re.search("_avx|_amx|avx2|avx512", path.name)
    ]
    if not objects or shutil.which("nm") is None:
        pytest.skip("the extension was not built here, or there is no nm")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        assert not [line for line in symbols if "_GLOBAL__sub_I" in line], path
        shared = [
            line for line in symbols if re.search(r" [WVu] ", line) and not re.search(r"pyllmq::cpu::.*(Isa|Amx)", line)
        ]
        assert not shared, (path, shared)
