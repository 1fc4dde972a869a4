"""Builds pyllmq._cpu always and pyllmq._cuda where nvcc is found; neither links libtorch, so one build serves every torch.

PYLLMQ_CUDA=0|1|auto   never / must / if nvcc is found (default auto)
PYLLMQ_CUDA_ARCHS      compute capabilities for nvcc, default "80+PTX 90a"; the PTX serves what is newer than all of them
PYLLMQ_DEBUG=1         keep symbols and assertions
CXXFLAGS               appended to every C++ compile and to the link (sanitizers)
MAX_JOBS               parallel compiles, default: all cores
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent / "csrc"
DEBUG = os.environ.get("PYLLMQ_DEBUG", "0") == "1"
# -ffp-contract=off keeps the scalar and the AVX2 files comparable: no fused multiply-add that the source did not write.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-pthread",
    "-ffunction-sections",
    "-fdata-sections",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-pragmas",
    *([] if DEBUG else ["-DNDEBUG"]),
]
# Instruction sets are switched on per file, by the end of its name, and chosen at run time: no global -march. Elsewhere
# than on x86 those files are left out and the scalar kernels run.
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi", "vbmi2", "vnni")),
    "-Wno-uninitialized",  # gcc 12 warns about its own AVX-512 headers (GCC bug 105593)
]
ISA_FLAGS = {"_avx2": AVX2, "_avx512": AVX512, "_amx": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]}


def find_nvcc():
    want = os.environ.get("PYLLMQ_CUDA", "auto")
    if want not in ("0", "1", "auto"):
        raise SystemExit(
            f"PYLLMQ_CUDA={want!r} is not understood; allowed: 0 (never), 1 (must), auto (if nvcc is found)"
        )
    if want == "0":
        return None
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    for nvcc in (os.environ.get("CUDACXX"), *(os.path.join(h, "bin", "nvcc") for h in homes), shutil.which("nvcc")):
        if nvcc and os.access(nvcc, os.X_OK):
            return nvcc
    if want == "1":
        raise SystemExit(
            "PYLLMQ_CUDA=1 but no nvcc was found; set CUDA_HOME or CUDACXX, put nvcc on PATH, or use PYLLMQ_CUDA=auto"
        )
    return None


def compile_or_explain(command):
    done = subprocess.run(command, capture_output=True, text=True)
    print(" ".join(command) + "\n" + done.stdout + done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(
            f"this command failed with exit code {done.returncode}:\n{' '.join(command)}\n{done.stderr[-4000:]}"
        )


class BuildExtension(build_ext):
    """Compiles the sources of an extension in parallel, each with the flags that its name asks for, then links once."""

    def build_extension(self, ext):
        objects_dir = Path(self.build_temp) / ext.name
        objects_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc() if ext.name.endswith("_cuda") else None

        commands, objects = [], []
        for source in map(Path, ext.sources):
            obj = objects_dir / ("_".join(source.with_suffix("").parts) + ".o")
            objects.append(str(obj))
            commands.append(
                [
                    *(self.nvcc_compile(nvcc) if source.suffix == ".cu" else self.cxx_compile(source)),
                    "-c",
                    str(source),
                    "-o",
                    str(obj),
                ]
            )
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(compile_or_explain, commands))

        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        if nvcc:  # nvcc knows where its own static cudart lies, whatever the toolkit's layout
            link = [
                nvcc,
                "-shared",
                "-cudart=static",
                "-Xlinker=--exclude-libs,ALL,--gc-sections",
                *(f"-Xcompiler={f}" for f in extra),
            ]
        else:
            link = [self.cxx(), "-shared", "-pthread", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections", *extra]
        compile_or_explain([*link, *objects, "-o", str(output)])
        if not DEBUG and not extra:
            subprocess.run(["strip", "--strip-unneeded", str(output)], check=False)

    @staticmethod
    def cxx():
        return os.environ.get("CXX", "g++")

    @staticmethod
    def includes():
        try:
            import pybind11

            binding = pybind11.get_include()
        except ImportError:  # torch carries the same headers
            found = find_spec("torch")
            if found is None:
                raise SystemExit(
                    "pybind11 is missing, and so is torch, which carries its headers; pip install pybind11"
                ) from None
            binding = str(Path(found.origin).parent / "include")
        return ["-I" + binding, "-I" + sysconfig.get_paths()["include"], "-I" + str(CSRC)]

    def cxx_compile(self, source):
        isa = next((flags for suffix, flags in ISA_FLAGS.items() if source.stem.endswith(suffix)), [])
        return [self.cxx(), *CXX_FLAGS, *isa, *self.includes(), *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def nvcc_compile(self, nvcc):
        archs = os.environ.get("PYLLMQ_CUDA_ARCHS", "80+PTX 90a").split()
        codes = []
        for arch in archs:
            number = arch.removesuffix("+PTX")
            code = f"sm_{number}" if number == arch else f"[sm_{number},compute_{number}]"
            codes.append(f"-gencode=arch=compute_{number},code={code}")
        return [
            nvcc,
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-I" + str(CSRC),
            *codes,
        ]


def sources(*patterns):
    root = CSRC.parent
    found = sorted(p for pattern in patterns for p in CSRC.glob(pattern))
    return [str(p.relative_to(root)) for p in found if X86 or not p.stem.endswith(tuple(ISA_FLAGS))]


extensions = [Extension("pyllmq._cpu", sources("bindings_cpu.cpp", "*/cpu/*.cpp", "runtime/*.cpp"))]
if find_nvcc():
    extensions.append(Extension("pyllmq._cuda", sources("bindings_cuda.cpp", "*/cuda/*.cpp", "*/cuda/*.cu")))

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
