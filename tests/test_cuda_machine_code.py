"""What nvcc makes of the kernels of byte planes, wgmma, products, tables and of decoding: no spills, instructions per weight."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from . import gpu_loops

ROOT = Path(__file__).resolve().parents[1]
MOST_REGISTERS = 128  # of two blocks of 256 threads

# Issued and ALU instructions per weight and lane of the loop of a width, by the tokens, beside wider columns and for sm_80, too.
# The aims for one token are 1.15 and 0.9 at 2 bits, 1.35 and 1.0 at 3, 2.0 and 1.45 at 4.
MOST = {
    (1, 1): (1.20, 0.91),
    (2, 1): (1.20, 0.89),
    (3, 1): (1.33, 0.86),
    (4, 1): (1.98, 1.23),
    (1, 2): (1.58, 1.06),
    (2, 2): (1.55, 1.03),
    (3, 2): (1.72, 1.00),
    (4, 2): (2.44, 1.33),
}
MORE_FOR_80 = {
    (1, 2): (1.64, 1.09),
    (2, 2): (1.62, 1.06),
    (3, 2): (1.76, 1.04),
    (4, 2): (2.51, 1.37),
}
MOST_AT_2_BITS = 1.15  # issued, one token, where no column is wider


# The same of decoding for wgmma, at 4 tiles of 64 rows and at 2; and registers that the threads of a block leave each other.
MOST_OF_WGMMA = {
    4: {1: (1.85, 1.28), 2: (1.85, 1.28), 3: (2.15, 1.65), 4: (3.25, 2.80)},
    2: {1: (2.15, 1.30), 2: (2.15, 1.30), 3: (2.45, 1.70), 4: (3.50, 2.85)},
}
# Loads of codes and exchanges between lanes for a tile x group, 4 bytes a lane each: clocks of shared memory.
PASSES_OF_WGMMA = {1: 1, 2: 2, 3: 3 + 2, 4: 4}
MOST_WGMMA_REGISTERS = {16: 128, 32: 128, 64: 128, 128: 168, 256: 168}

# The same of decoding into registers: a pass of a group, and one with what comes once for two of them; without asking, which
# one warp of four does.
MOST_OF_WGMMA_REGISTERS = {
    1: ((2.75, 1.50), (3.50, 1.95)),
    2: ((2.75, 1.50), (3.50, 1.95)),
    3: ((2.75, 1.60), (3.40, 1.95)),
    4: ((4.00, 2.65), (4.70, 3.10)),
}
MOST_REGISTERS_OF_WGMMA_REGISTERS = {16: 128, 32: 128, 64: 255}

MOST_OF_PRODUCTS = 4.6, 2.8  # per kept weight
MOST_OF_TABLES = 7.6, 3.5  # the same
MOST_REGISTERS_OF_TABLES = 64  # two blocks of 512 threads

MOST_OF_DEQUANTIZE = 4.0  # issued, of columns of 1, 2, 3 or 4 bits stored in 16 bits without a row scale


@pytest.fixture(params=["80", "90a"])
def architecture(request):
    return request.param


def compiled(source, architecture, folder):
    """(what ptxas says of each kernel, the kernels' lines)."""
    nvcc, nvdisasm = shutil.which("nvcc"), gpu_loops.tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        pytest.skip("no nvcc, or no nvdisasm on PATH or beside triton")
    cubin = folder / "kernels.cubin"
    arch = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-O3", "-std=c++20", "-DNDEBUG", arch, "-Icsrc", "-Xptxas=-v", "-cubin", f"-o={cubin}", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, gpu_loops.kernels(nvdisasm, cubin)


def by_instance(names):
    """{(widest, tokens): name} of the kernel's instances."""
    found = {}
    for name in names:
        if numbers := re.search(r"byte_planes_kernelILi(\d)ELi(\d)E", name):
            found[int(numbers[1]), int(numbers[2])] = name
    return found


@pytest.mark.slow
def test_byte_planes_have_no_spills_and_few_instructions_a_weight(architecture, tmp_path):
    said, kernels = compiled("csrc/codebook/cuda/linear_byte_planes.cu", architecture, tmp_path)
    reports = {report.split("'")[1]: report for report in said.split("Compiling entry function")[1:]}
    instances = by_instance(kernels)
    assert set(instances) == {(widest, tokens) for widest in (2, 3, 4) for tokens in (1, 2)}
    for (widest, tokens), name in instances.items():
        report = reports[name]
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= MOST_REGISTERS, report
        loops = [gpu_loops.counts(loop) for loop in gpu_loops.loops(kernels[name])]
        loops = [loop for loop in loops if loop["IMMA"]]
        assert len(loops) == widest, "a loop for each width"
        for width, loop in enumerate(loops, 1):
            # An instruction is 64 rows x 8 columns of one of two planes, of 4 bits of one of two halves; 32 lanes.
            assert loop["IMMA"] == (64 if width == 4 else 32), "loops stand in the order of their widths"
            weights = 512 // tokens * 16 / 32
            issued, alu = loop["issued"] / weights, loop["ALU"] / weights
            most_issued, most_alu = MOST[width, tokens]
            if architecture == "80":
                most_issued, most_alu = MORE_FOR_80.get((width, tokens), MOST[width, tokens])
            if (widest, tokens, width) == (2, 1, 2):
                most_issued = MOST_AT_2_BITS
            assert issued <= most_issued and alu <= most_alu, (widest, tokens, width, issued, alu)


# Of the frame for few tokens, at most. __threadfence in place of acquire and release is two MEMBAR.SC.
FRAME = {"80": {"MEMBAR": 1, "CCTL": 1, "ATOMG": 1}, "90a": {"MEMBAR": 2, "CCTL": 3, "ATOMG": 1}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", ["codebook/cuda/linear_byte_planes", "sparse/cuda/linear_products", "sparse/cuda/linear_tables"]
)
def test_one_token_begins_early_gives_up_what_it_read_and_waits_for_no_fence(source, architecture, tmp_path):
    _, kernels = compiled(f"csrc/{source}.cu", architecture, tmp_path)
    for name, lines in kernels.items():
        found = gpu_loops.counts(lines)
        for instruction, most in FRAME[architecture].items():
            assert found[instruction] <= most, (name, instruction, found[instruction])
        assert not any("MEMBAR.SC" in line for line in lines), name
        assert any(re.search(r"0x12[0f]", line) and "UMOV" in line for line in lines), "L2's policy, a constant"
        words = list(map(gpu_loops.word, lines))
        of_90 = [words.count(each) for each in ("PREEXIT", "UCGABAR_ARV", "UCGABAR_WAIT")]
        if architecture == "80":
            assert of_90 == [0, 0, 0] and "ACQBULK" not in words
            continue
        assert of_90 == [1, 2, 2], "let_next_begin; a cluster meets twice"
        # Weights are asked for before the wait and needed behind it; another wait is of a layout that is none of this shape.
        waits = [i for i, each in enumerate(words) if each == "ACQBULK"]
        assert len(waits) == 2 and words.index("PREEXIT") < words.index("LDGSTS")
        assert any(words.index("LDGSTS") < wait < words.index("DEPBAR") for wait in waits)


@pytest.mark.slow
def test_decoding_stores_16_bytes_and_takes_few_instructions_a_weight(architecture, tmp_path):
    said, kernels = compiled("csrc/codebook/cuda/dequantize.cu", architecture, tmp_path)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    assert spills and set(spills) == {("0", "0")}, said
    (name,) = (name for name in kernels if "codebook_dequantize_kernelILb0E" in name)
    loops = [loop for loop in gpu_loops.loops(kernels[name]) if gpu_loops.counts(loop)["MOVM"] == 32]
    assert len(loops) == 4, "a loop for each width up to 4"
    for loop in loops:
        stores = [line for line in loop if gpu_loops.word(line) == "STG"]
        assert len(stores) == 8 and all(".128" in line for line in stores), stores
        assert len(loop) / 64 <= MOST_OF_DEQUANTIZE, len(loop)  # 32 lanes decode 64 rows of 32 columns


@pytest.mark.slow
def test_wgmma_runs_on_while_others_decode_in_few_instructions_a_weight(tmp_path):
    said, kernels = compiled("csrc/codebook/cuda/linear_wgmma.cu", "90a", tmp_path)
    assert "serialized" not in said, "wgmma would wait for each other"
    reports = {report.split("'")[1]: report for report in said.split("Compiling entry function")[1:]}
    found = {int(m[1]): name for name in kernels if (m := re.search(r"wgmma_kernelILi(\d+)E", name))}
    assert set(found) == set(MOST_WGMMA_REGISTERS)
    for tokens, name in found.items():
        report, tiles = reports[name], 2 if tokens == 256 else 4
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= MOST_WGMMA_REGISTERS[tokens], report
        counted = [gpu_loops.counts(loop) for loop in gpu_loops.loops(kernels[name])]
        (products,) = (loop for loop in counted if loop["HGMMA"])
        assert products["HGMMA"] == 4 * tiles // 2 and products["issued"] <= 140, "four depths of 16, two warp groups"
        # A loop is a tile of 64 rows, or two: it stores 16 bytes of each of a lane's four columns. Wide ones look up in memory.
        at_once = tiles // 2
        widths = [
            loop for loop in counted if loop["STS"] == 4 * at_once and loop["PRMT"] and loop["LDS"] < 32 * at_once
        ]
        assert len(widths) == 4
        for width, loop in enumerate(sorted(widths, key=lambda loop: (loop["PRMT"], loop["LDS"])), 1):
            issued, alu = loop["issued"] / (32 * at_once), loop["ALU"] / (32 * at_once)
            most_issued, most_alu = MOST_OF_WGMMA[tiles][width]
            assert issued <= most_issued and alu <= most_alu, (tokens, width, issued, alu)
            assert loop["LDS"] + loop["SHFL"] == PASSES_OF_WGMMA[width] * at_once, (tokens, width)


@pytest.mark.slow
def test_wgmma_from_registers_runs_on_while_the_same_warps_decode(tmp_path):
    said, kernels = compiled("csrc/codebook/cuda/linear_wgmma_registers.cu", "90a", tmp_path)
    assert "serialized" not in said, "wgmma would wait for each other"
    reports = {report.split("'")[1]: report for report in said.split("Compiling entry function")[1:]}
    found = {int(m[1]): name for name in kernels if (m := re.search(r"registers_kernelILi(\d+)E", name))}
    assert set(found) == set(MOST_REGISTERS_OF_WGMMA_REGISTERS)
    for n, name in found.items():
        report = reports[name]
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= MOST_REGISTERS_OF_WGMMA_REGISTERS[n], report
        passes, stages = [], []
        for loop in gpu_loops.every_loop(kernels[name]):
            if gpu_loops.counts(loop)["HGMMA"] != 8 or len(loop) > 600:
                continue  # two tiles, halves and fragments; what is left of the loop of pieces of work is far longer
            copies = [i for i, line in enumerate(loop) if gpu_loops.word(line) == "UBLKCP"]
            if copies:  # what asks ends with what it stores for the next time
                stores = [i for i, line in enumerate(loop) if gpu_loops.word(line) == "STS" and i > copies[-1]]
                loop = loop[stores[-1] + 1 :]
            (stages if copies else passes).append(gpu_loops.counts(loop))
        assert len(passes) == len(stages) == 4, "a loop of stages for each width, and in it one of groups"
        for loops, which in ((passes, 0), (stages, 1)):
            for width, loop in enumerate(sorted(loops, key=lambda loop: (loop["PRMT"], loop["LDS"])), 1):
                issued, alu = loop["issued"] / 64, loop["ALU"] / 64  # a lane decodes 64 weights of a group
                most_issued, most_alu = MOST_OF_WGMMA_REGISTERS[width][which]
                assert issued <= most_issued and alu <= most_alu, (n, width, which, issued, alu)


@pytest.mark.slow
def test_tables_of_products_have_no_spills_and_few_instructions_a_kept_weight(architecture, tmp_path):
    said, kernels = compiled("csrc/sparse/cuda/linear_tables.cu", architecture, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= MOST_REGISTERS_OF_TABLES, said
    (name,) = (name for name in kernels if "tables_kernel" in name)
    counted = [gpu_loops.counts(loop) for loop in gpu_loops.loops(kernels[name])]
    (loop,) = (loop for loop in counted if loop["LDGSTS"])
    kept = 2 * 64 * 16 / 32  # of a lane: two cells of 32 columns, of which 16 are kept, of 64 rows
    loads = kept * (1 + 2 / 8) + 2  # a lookup each, codes and positions of eight, x twice
    assert loop["LDS"] <= loads + 4 * loop["LDGSTS"], "with a copy come loads that are never executed"
    most_issued, most_alu = MOST_OF_TABLES
    assert loop["issued"] / kept <= most_issued and loop["ALU"] / kept <= most_alu, loop


@pytest.mark.slow
def test_products_have_no_spills_and_few_instructions_a_kept_weight(architecture, tmp_path):
    said, kernels = compiled("csrc/sparse/cuda/linear_products.cu", architecture, tmp_path)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= MOST_REGISTERS, said
    (name,) = (name for name in kernels if "products_kernel" in name)
    counted = [gpu_loops.counts(loop) for loop in gpu_loops.loops(kernels[name])]
    (loop,) = (loop for loop in counted if loop["IMMA"])
    assert loop["IMMA"] == 128, "a cell of eight strips: 64 columns, of which 32 are kept, of 512 rows"
    kept = 512 * 32 / 32  # of a lane
    most_issued, most_alu = MOST_OF_PRODUCTS
    assert loop["issued"] / kept <= most_issued and loop["ALU"] / kept <= most_alu, loop


@pytest.mark.slow
@pytest.mark.parametrize("source", ["linear_wgmma", "linear_wgmma_registers"])
def test_there_is_no_wgmma_for_other_devices(source, tmp_path):
    """By the shared memory that stands in its place the host knows."""
    said, kernels = compiled(f"csrc/codebook/cuda/{source}.cu", "80", tmp_path)
    for report in said.split("Compiling entry function")[1:]:
        assert ("bytes smem" in report) == bool(re.search("wgmma(_registers)?_kernel", report)), report
    assert not any(gpu_loops.word(line) == "HGMMA" for lines in kernels.values() for line in lines)
