"""Builds pyllmq._cpu always and pyllmq._cuda where it can serve; neither links libtorch, so one build serves every torch.

Writes BASE/PLATFORM/build.ninja and BASE/compile_commands.json (BASE is --build-base, else build/) and lets ninja do what is
left to do: a changed source or header costs its own compiles and a link. The objects stay there however the build was asked
for (pip install, editable or not, build_ext --inplace).

PYLLMQ_CUDA=0|1|auto   never / must / where nvcc and a GPU or its driver are found (default auto)
PYLLMQ_CUDA_ARCHS      compute capabilities for nvcc, "80+PTX 90a" say; PTX serves what is newer. Default: the GPUs of this
                       machine, and without one 80+PTX 90a
PYLLMQ_DEBUG=1         keep symbols and assertions, and line numbers in CUDA code
CXX, CXXFLAGS          the C++ compiler; flags appended to every C++ compile and to the link (sanitizers)
MAX_JOBS               parallel compiles, default: all cores
ccache is used where it is found. PYLLMQ_CUDA=emulated builds pyllmq._cuda alone, for the CPU, as the tests do
(tests/cuda_emulator.py). `CXX=<cross compiler> setup.py build_driver` builds the kernels and tests/arm_driver.cpp as a program,
without Python (tests/test_arm.py).
"""

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEBUG = os.environ.get("PYLLMQ_DEBUG", "0") == "1"
EXTRA = shlex.split(os.environ.get("CXXFLAGS", ""))
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
    "-Wno-ignored-attributes",  # a vector as an argument of a template loses may_alias, which nothing here needs
    "-Wno-unknown-pragmas",
    *([] if DEBUG else ["-DNDEBUG"]),
]
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    *(["-lineinfo"] if DEBUG else ["-DNDEBUG"]),
]


def compiler_command():
    return shlex.split(os.environ.get("CXX", "c++" if sys.platform == "darwin" else "g++"))


def target_machine():
    """What the compiler compiles for, which is another machine where it is a cross compiler."""
    try:
        target = subprocess.run(
            [*compiler_command(), "-dumpmachine"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.machine().lower()  # no compiler: an sdist, say
    return target.split("-")[0].replace("arm64", "aarch64")


# Instruction sets are switched on per file, by the end of its name, and chosen at run time: no global -march. Files of another
# architecture are left out; on one that is not here the scalar kernels run.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi", "vbmi2", "vnni")),
    "-Wno-uninitialized",  # gcc 12 warns about its own AVX-512 headers (GCC bug 105593)
]
ISA_FLAGS_OF = {
    "x86_64": {
        "_avx2": AVX2,
        "_avxvnni": [*AVX2, "-mavxvnni"],
        "_avx512": AVX512,
        "_amx": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    },
    "aarch64": {"_neon": [], "_dotprod": ["-march=armv8.2-a+dotprod"], "_i8mm": ["-march=armv8.2-a+dotprod+i8mm"]},
}
ISA_FLAGS = ISA_FLAGS_OF.get(target_machine(), {})
FOREIGN = tuple(suffix for flags in ISA_FLAGS_OF.values() for suffix in flags if suffix not in ISA_FLAGS)
# What a file *_simd.cpp is compiled for, each with the vectors that csrc/runtime/simd.h has for that instruction set.
SIMD_FLAGS = {
    "scalar": [],
    **{isa: ISA_FLAGS[f"_{isa}"] for isa in ("avx2", "avx512", "neon") if f"_{isa}" in ISA_FLAGS},
}

CUDA = os.environ.get("PYLLMQ_CUDA", "auto")
DEFAULT_ARCHS = ["80+PTX", "90a"]
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # of cuDeviceGetAttribute


def find_nvcc():
    homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    for nvcc in (os.environ.get("CUDACXX"), *(os.path.join(h, "bin", "nvcc") for h in homes), shutil.which("nvcc")):
        if nvcc and os.access(nvcc, os.X_OK):
            return nvcc
    return None


def visible_capabilities():
    """Compute capabilities (90, say) of the GPUs that the driver shows; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []  # a driver whose GPU is not here or not ready: a container at build time
    found = set()
    for device in range(count.value):
        driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
        found.add(10 * major.value + minor.value)
    return sorted(found)


def wanted_archs(nvcc, capabilities):
    """What nvcc shall compile for: as asked, else the visible GPUs, else the defaults."""
    if asked := os.environ.get("PYLLMQ_CUDA_ARCHS"):
        return asked.split()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if not capabilities or any(f"compute_{c}" not in known for c in capabilities):
        return DEFAULT_ARCHS  # its PTX serves a GPU that is newer than this nvcc
    return ["90a" if c == 90 else str(c) for c in capabilities]


def cuda_build():
    """nvcc and the architectures to compile for, or None where pyllmq._cuda is not built."""
    if CUDA not in ("0", "1", "auto", "emulated"):
        raise SystemExit(
            f"PYLLMQ_CUDA={CUDA!r} is not understood; allowed: 0 (never), 1 (must), "
            "auto (where nvcc and a GPU or its driver are found), emulated (for the tests)"
        )
    if CUDA in ("0", "emulated"):
        return None
    nvcc, capabilities = find_nvcc(), visible_capabilities()
    if CUDA == "1" and not nvcc:
        raise SystemExit(
            "PYLLMQ_CUDA=1 but no nvcc was found; set CUDA_HOME or CUDACXX, put nvcc on PATH, or use PYLLMQ_CUDA=auto"
        )
    if CUDA == "auto" and (capabilities is None or not nvcc):
        return None
    return nvcc, wanted_archs(nvcc, capabilities)


@cache
def smallest_code(nvcc):
    """The code for GPUs compressed as far as nvcc can, where it can: 0.4 of its default. The driver unpacks a kernel when it is
    first launched."""
    said = subprocess.run([nvcc, "--help"], capture_output=True, text=True).stdout
    return ["--compress-mode=size"] if "--compress-mode" in said else []


def cached(compiler):
    """The compiler's command behind ccache, where there is one and nobody named it already."""
    ccache = shutil.which("ccache")
    return [ccache, *compiler] if ccache and "ccache" not in Path(compiler[0]).name else compiler


def binding_includes():
    try:
        import pybind11

        headers = pybind11.get_include()
    except ImportError:  # torch carries the same headers
        found = find_spec("torch")
        if found is None:
            raise SystemExit(
                "pybind11 is missing, and so is torch, which carries its headers; pip install pybind11"
            ) from None
        headers = str(Path(found.origin).parent / "include")
    return ["-I" + headers, "-I" + sysconfig.get_paths()["include"]]


def find_ninja():
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("ninja is missing, which runs the compilers; pip install ninja") from None
        return found


def compile_command(source, cuda, isa=None):
    """Of one source, all but its name and its object's. Only bindings see Python, only device code sees nvcc."""
    if source.suffix == ".cu" and cuda:
        nvcc, archs = cuda
        codes = []
        for arch in archs:
            number = arch.removesuffix("+PTX")
            code = f"sm_{number}" if number == arch else f"[sm_{number},compute_{number}]"
            codes.append(f"-gencode=arch=compute_{number},code={code}")
        return [*cached([nvcc]), *NVCC_FLAGS, *smallest_code(nvcc), *codes, "-Icsrc"]
    flags = next((flags for suffix, flags in ISA_FLAGS.items() if source.stem.endswith(suffix)), [])
    if isa:
        flags = [*SIMD_FLAGS[isa], f"-DPYLLMQ_ISA={isa}"]
    includes = ["-Icsrc", *(binding_includes() if source.stem.startswith("bindings") else [])]
    emulated = ["-DPYLLMQ_CUDA_EMULATED", "-x", "c++"] if CUDA == "emulated" else []
    return [*cached(compiler_command()), *CXX_FLAGS, *flags, *includes, *EXTRA, *emulated]


def link_command(cuda):
    if sys.platform == "darwin":  # Python's own symbols are found when it loads the bundle
        return [*compiler_command(), "-bundle", "-undefined", "dynamic_lookup", "-Wl,-dead_strip", *EXTRA]
    strip = [] if DEBUG else ["--strip-all"]
    if cuda:  # nvcc knows where its own static cudart lies, whatever the toolkit's layout
        linker = ",".join(["--exclude-libs,ALL,--gc-sections", *strip])
        return [cuda[0], "-shared", "-cudart=static", "-Xlinker=" + linker, *(f"-Xcompiler={f}" for f in EXTRA)]
    linker = ",".join(["-Wl,--exclude-libs,ALL,--gc-sections", *strip])
    return [*compiler_command(), "-shared", "-pthread", linker, *EXTRA]


def escaped(path):
    """A path in a `build` line of ninja's."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def edge(rule, inputs, output, command):
    shell = shlex.join(command).replace("$", "$$")
    return f"build {escaped(output)}: {rule} {' '.join(map(escaped, inputs))}\n  command_line = {shell}\n"


def compile_edges(sources, objects_folder, cuda=None):
    """One for each source, or for each instruction set that a *_simd.cpp is compiled for; and the objects."""
    lines, objects = [], []
    for source in map(Path, sources):
        for isa in SIMD_FLAGS if source.stem.endswith("_simd") else [None]:
            name = f"{source.name}.{isa}.o" if isa else f"{source.name}.o"
            objects.append(objects_folder / source.with_name(name))
            lines.append(edge("compile", [source], objects[-1], compile_command(source, cuda, isa)))
    return lines, objects


def run_ninja(base, folder, edges, verbose):
    lines = [
        f"builddir = {str(folder).replace('$', '$$')}",
        "rule compile\n  command = $command_line -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $command_line $in -o $out",
        *edges,
    ]
    written = ROOT / folder / "build.ninja"
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text("\n".join(lines))

    ninja = [find_ninja(), "-C", str(ROOT), "-f", str(folder / "build.ninja")]
    commands = subprocess.run([*ninja, "-t", "compdb", "compile"], capture_output=True, text=True, check=True).stdout
    (ROOT / base / "compile_commands.json").write_text(commands[commands.index("[\n") :])
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    sys.stdout.flush()
    status = subprocess.run([*ninja, "-j", jobs, *([] if verbose else ["--quiet"])]).returncode
    if status:
        raise SystemExit(f"the build failed (ninja's exit code {status}); each command that failed stands above")


class BuildExtension(build_ext):
    def build_extensions(self):
        base = Path(self.get_finalized_command("build").build_base)
        folder = base / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        edges = []
        for ext in self.extensions:
            cuda = cuda_build() if ext.name == "pyllmq._cuda" else None
            lines, objects = compile_edges(ext.sources, folder / ext.name, cuda)
            target = os.path.abspath(self.get_ext_fullpath(ext.name))
            edges += [*lines, edge("link", objects, target, link_command(cuda))]
        run_ninja(base, folder, edges, self.verbose)


class BuildDriver(Command):
    """Kernels and tests/arm_driver.cpp as one program BASE/driver, for the machine that CXX compiles for."""

    description = "build the test driver of the CPU kernels, a program without Python"
    user_options = [("build-base=", None, "folder of objects and program")]

    def initialize_options(self):
        self.build_base = "build/driver"

    def finalize_options(self):
        pass

    def run(self):
        base = Path(self.build_base)
        kernels = [source for source in cpu_extension.sources if "bindings" not in source]
        lines, objects = compile_edges([*kernels, "tests/arm_driver.cpp"], base / "objects")
        link = [*compiler_command(), "-pthread", "-static-libstdc++", "-static-libgcc", *EXTRA]
        run_ninja(base, base, [*lines, edge("link", objects, os.path.abspath(base / "driver"), link)], self.verbose)


def sources(of_cuda, *suffixes):
    """Of csrc/, what lies in a folder `cuda`, and bindings_cuda.cpp; or all the rest."""
    found = []
    for path in sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*")):
        emulator = any("emulator" in part for part in path.parts)
        is_cuda = emulator or "cuda" in path.parts or path.stem == "bindings_cuda"
        if path.suffix not in suffixes or is_cuda != of_cuda:
            continue
        if path.stem.endswith(FOREIGN):
            continue
        if path.name == "runtime.cu" if CUDA == "emulated" else emulator:
            continue  # the emulator's runtime.cpp stands for runtime.cu
        found.append(str(path))
    return found


cpu_extension = Extension("pyllmq._cpu", sources(False, ".cpp"))
cuda_extension = Extension("pyllmq._cuda", sources(True, ".cpp", ".cu"))
by_setting = {"emulated": [cuda_extension], "0": [cpu_extension]}
extensions = by_setting.get(CUDA) or [cpu_extension, *([cuda_extension] if cuda_build() else [])]
if sys.platform == "win32":  # POSIX threads and gcc's vectors: the back end `reference` serves there
    extensions = []

packages = {*find_packages(str(ROOT), include=["pyllmq", "pyllmq.*"]), "pyllmq.triton_kernels", "pyllmq.benchmarks"}
commands = {"build_ext": BuildExtension, "build_driver": BuildDriver}
setup(packages=sorted(packages), ext_modules=extensions, cmdclass=commands)
