"""The pictures of docs/, as SVG: `python docs/draw.py` writes docs/img/*.svg. A test compares the files with what this prints."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

BLUE, GOLD, GREY, RED, WHITE = "#cfe3f5", "#fbe7b2", "#e6e8eb", "#f6cfd3", "#ffffff"


class Picture:
    """Boxes, rows of cells and arrows on white, in pixels; texts are 13 pixels high."""

    def __init__(self, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="13">',
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            '<path d="M0 0 8 4 0 8z"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="{WHITE}"/>',
        ]

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        for i, line in enumerate(text.split("\n")):
            self.parts.append(f'<text x="{x:g}" y="{y + 17 * i:g}" text-anchor="{anchor}">{escape(line)}</text>')

    def box(self, x: float, y: float, w: float, h: float, text: str = "", fill: str = BLUE) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{fill}" stroke="#555"/>'
        )
        if text:
            self.text(x + w / 2, y + h / 2 + 5 - 8.5 * text.count("\n"), text)

    def cells(self, x: float, y: float, values: str, fills: str = "", width: float = 24) -> None:
        """One cell for each word of `values` ("." is an empty one); `fills` has a letter of b, g, w, r, y for each."""
        colours = {"b": BLUE, "g": GREY, "w": WHITE, "r": RED, "y": GOLD}
        for i, value in enumerate(values.split()):
            fill = colours[fills[i]] if fills else BLUE
            self.box(x + i * width, y, width, 24, "" if value == "." else value, fill)

    def arrow(self, x: float, y: float, to_x: float, to_y: float, text: str = "") -> None:
        self.parts.append(f'<path d="M{x:g} {y:g} {to_x:g} {to_y:g}" stroke="#222" marker-end="url(#head)"/>')
        if text:
            self.text((x + to_x) / 2, (y + to_y) / 2 - 6, text)

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def chain(p: Picture, y: float, h: float, steps: list[tuple[float, str, str]], x: float = 10, gap: float = 28) -> None:
    """Boxes from left to right, an arrow between two: (width, text, fill)."""
    for i, (w, text, fill) in enumerate(steps):
        if i:
            p.arrow(x - gap, y + h / 2, x, y + h / 2)
        p.box(x, y, w, h, text, fill)
        x += w + gap


def codebook_tables() -> Picture:
    p = Picture(760, 290)
    p.text(10, 22, "One token: products once, then lookups", "start")
    p.text(10, 58, "x_k", "start")
    p.box(45, 42, 60, 24, "x_k", GOLD)
    p.text(10, 98, "codebook of column k (4 bits)", "start")
    p.cells(10, 106, "C0 C1 C2 C3 … C15", "bbbbbb", 34)
    p.arrow(222, 118, 292, 118, "x_k · C")
    p.text(300, 98, "table: 16 products in fixed point", "start")
    p.cells(300, 106, "p0 p1 p2 p3 … p15", "yyyyyy", 34)
    p.text(10, 170, "codes of column k, 32 rows: two in a byte", "start")
    p.cells(10, 180, "7 2 0 15 … 3", "gggggg", 34)
    p.arrow(222, 192, 396, 142)
    p.text(300, 196, "a byte shuffle does 32 (AVX2)\nor 64 (AVX-512) lookups", "start")
    p.arrow(508, 118, 560, 118)
    p.box(560, 90, 185, 56, "add to one integer\nsum per row", BLUE)
    p.arrow(652, 146, 652, 218)
    p.box(560, 218, 185, 56, "after 256 lookups:\ny += sum · unit", BLUE)
    p.text(10, 250, "Nothing is decoded and nothing is multiplied per weight;", "start")
    p.text(10, 267, "the integer sums are exact until the last line.", "start")
    return p


def codebook_decode() -> Picture:
    p = Picture(760, 150)
    p.text(10, 22, "Many tokens: decode a block once into the L1 cache, then multiply", "start")
    steps = [
        (170, "codes\n32 rows x 256 columns", GREY),
        (170, "weights in L1\nfp32, int16 or int8", BLUE),
        (170, "multiply by all tokens\nof a pass", GOLD),
        (140, "sums, scale, bias", BLUE),
    ]
    chain(p, 48, 60, steps)
    p.text(10, 138, "x is packed once per pass; the dense matrix never exists in memory.", "start")
    return p


def codebook_cuda() -> Picture:
    p = Picture(760, 230)
    p.text(10, 22, "Which kernel runs, by number of tokens (predicted, never measured on a GPU)", "start")
    for i, (tokens, name, text) in enumerate(
        (
            ("1 or 2 tokens", "cuda.byte_planes", "up to 4 bits: bytes looked up by prmt, into integer tensor cores"),
            ("up to 64", "cuda.fused", "codebooks in registers, looked up by prmt, into tensor cores"),
            ("more", "cuda.dequantize_matmul", "decode into x's dtype, then torch's matmul"),
        )
    ):
        y = 40 + 62 * i
        p.box(10, y, 90, 46, tokens, GOLD)
        p.arrow(100, y + 23, 128, y + 23)
        p.box(128, y, 180, 46, name, BLUE)
        p.text(320, y + 28, text, "start")
    return p


def triton_layout() -> Picture:
    p = Picture(760, 190)
    p.text(10, 22, "3-bit codes: 8 columns of a row fill 3 bytes; the layout transposes the bytes", "start")
    p.text(10, 48, "checkpoint: a row's bytes side by side", "start")
    for row in range(3):
        p.text(10, 75 + 28 * row, f"row {row}", "start")
        p.cells(60, 58 + 28 * row, "b0 b1 b2 b3 …", "yyybb", 36)
    p.arrow(255, 98, 325, 98, "at load")
    p.text(340, 48, "layout triton: a byte of neighbouring rows side by side", "start")
    for byte in range(3):
        p.text(340, 75 + 28 * byte, f"b{byte}", "start")
        p.cells(370, 58 + 28 * byte, "r0 r1 r2 r3 … r31", "yyyyyy", 36)
    p.text(
        10, 172, "Neighbouring threads read neighbouring bytes; code i = (b0 | b1 << 8 | b2 << 16) >> 3i & 7.", "start"
    )
    return p


def sparse_cells() -> Picture:
    p = Picture(760, 270)
    p.text(10, 22, "A cell holds 16 rows side by side; the three formats differ in what a cell stores", "start")
    p.text(10, 52, "bitmap", "start")
    p.cells(110, 36, "1 0 0 1 1 0", "wwwwww")
    p.text(270, 52, "2 bytes of mask per column, then the stored values in that order", "start")
    p.cells(110, 66, "w w w", "bbb")
    p.text(10, 122, "2:4", "start")
    p.cells(110, 106, "w . . w", "bggb")
    p.text(270, 122, "2 values and 2 positions (2 bits each) of every group of 4 columns", "start")
    p.text(10, 162, "2:4 with codes", "start")
    p.cells(110, 146, "3 . . 1", "yggy")
    p.text(270, 162, "position and code are one index into products x_k · C_k[c]", "start")
    chain(
        p,
        196,
        50,
        [
            (190, "one column of 16 rows\nin a register", BLUE),
            (190, "x_k broadcast,\nmultiply-add", GOLD),
            (210, "16 sums; nothing is\nadded across lanes", BLUE),
        ],
    )
    return p


def kmeans_intervals() -> Picture:
    p = Picture(760, 210)
    p.text(
        10,
        22,
        "Clusters of sorted points are intervals, so k-means in one dimension is a choice of k - 1 cuts",
        "start",
    )
    points = (20, 42, 50, 58, 190, 205, 214, 260, 420, 436, 450, 462, 640, 655, 700)
    p.parts.append('<path d="M10 70H740" stroke="#555"/>')
    p.parts += [f'<circle cx="{x + 10}" cy="70" r="5" fill="#1b6ca8"/>' for x in points]
    for cut in (130, 350, 560):
        p.parts.append(f'<path d="M{cut} 45V95" stroke="#c00" stroke-dasharray="4 3"/>')
    p.text(
        10,
        120,
        "F_l[i] = best gain of the first i points in l clusters = max over j of F_(l-1)[j] + gain(j, i)",
        "start",
    )
    steps = [(140, "sort, prefix sums", GREY), (90, "F_1", BLUE), (90, "F_2", BLUE), (90, "… F_k", BLUE)]
    chain(p, 140, 44, [*steps, (150, "trace the cuts back", GOLD)])
    return p


def sinkhorn_pass() -> Picture:
    p = Picture(760, 220)
    p.text(10, 22, "One iteration reads K once; no exponential is taken in it", "start")
    p.box(10, 44, 130, 60, "cost", GREY)
    p.arrow(140, 74, 220, 74, "exp, once")
    p.box(220, 44, 130, 60, "K, in registers\nor cache", BLUE)
    p.arrow(350, 74, 410, 74, "K g")
    p.box(410, 44, 130, 60, "f = a / (K g)\n4 rows at a time", GOLD)
    p.arrow(540, 74, 600, 74, "Kᵀ f")
    p.box(600, 44, 140, 60, "g = b / (Kᵀ f)", GOLD)
    p.arrow(670, 104, 670, 150)
    p.box(560, 150, 180, 50, "f or g above 2^36?", RED)
    p.arrow(560, 175, 350, 175, "then")
    p.box(150, 150, 200, 50, "move the offsets,\nbuild K again", RED)
    p.arrow(250, 150, 280, 104)
    return p


def softmax_distances() -> Picture:
    p = Picture(760, 190)
    p.text(10, 22, "Distances straight from logits: probabilities exist only in the L2 cache", "start")
    steps = [
        (175, "logits\n64 rows x 512 columns", GREY),
        (150, "exp\np and q in the cache", BLUE),
        (140, "sum of min(p, q)\nfor 4 x 4 pairs", GOLD),
        (190, "D = Σp + Σq - 2 Σmin(p, q)", BLUE),
    ]
    chain(p, 44, 56, steps, gap=24)
    p.text(10, 130, "Backward: h = Σ_j G_ij sign(p_i - q_j), then dL/dlogits = p (h - <p, h>) / T,", "start")
    p.text(10, 147, "written where the gradient has to lie.", "start")
    p.text(10, 175, "Tiles of 512 columns are summed in fp32 and joined in fp64.", "start")
    return p


def column_sweep() -> Picture:
    p = Picture(760, 220)
    p.text(10, 22, "The sweep fits one column at a time and moves its error onto the columns after it", "start")
    p.cells(30, 44, "q q q j . . . . . .", "yyyrbbbbbb", 46)
    p.text(30, 88, "stored as codes", "start")
    p.arrow(190, 68, 190, 140)
    p.box(110, 140, 160, 56, "k-means of column j\n(or its mask)", RED)
    p.arrow(270, 168, 330, 168)
    p.box(330, 140, 170, 56, "error e_j / U_jj", GOLD)
    p.arrow(420, 140, 420, 72)
    p.text(430, 112, "W[:, j+1:] -= e_j / U_jj · U[j, j+1:]", "start")
    p.text(520, 172, "U: Cholesky factor of the\ninverse Hessian of the inputs", "start")
    return p


def column_codebook() -> Picture:
    p = Picture(760, 210)
    p.text(10, 22, "column-codebook: what each stage decides", "start")
    chain(
        p,
        44,
        62,
        [
            (160, "error of every width\nof every column", GREY),
            (150, "one price:\nwidths, outliers", GOLD),
            (150, "sweep:\ncodes, codebooks", BLUE),
            (190, "coordinate descent:\nrefit columns together", BLUE),
        ],
        gap=24,
    )
    p.text(10, 136, "What they work with:", "start")
    p.box(10, 146, 230, 46, "weights of the rows:\ngradients of the loss", RED)
    p.box(258, 146, 230, 46, "target of the Linear:\nasymmetric calibration", RED)
    p.box(506, 146, 210, 46, "afterwards, if asked for:\ncodebook tuning", RED)
    return p


def pruning_sweep() -> Picture:
    p = Picture(760, 190)
    p.text(10, 22, "Pruning: 4 columns at a time, then one descent over all stored weights", "start")
    chain(
        p,
        44,
        56,
        [
            (130, "scores of\n4 columns", GREY),
            (130, "mask", RED),
            (170, "zeros\n(and codebooks)", BLUE),
            (210, "error / U_jj onto\nall later columns", GOLD),
        ],
    )
    p.arrow(580, 100, 580, 130)
    p.arrow(580, 130, 75, 130, "next 4 columns")
    p.arrow(75, 130, 75, 100)
    p.text(10, 172, "refine: w_j ← mask · (w_j - (E H)_j / H_jj),  E = stored - original", "start")
    return p


def low_rank() -> Picture:
    p = Picture(760, 200)
    p.text(10, 22, "y = W x:  N K numbers", "start")
    p.box(20, 40, 150, 100, "W\nN x K", GREY)
    p.arrow(180, 90, 300, 90, "project outputs")
    p.text(320, 22, "y' = outer (inner x):  r (N + K) numbers", "start")
    p.box(320, 40, 44, 100, "outer\nN x r", BLUE)
    p.box(376, 40, 150, 34, "inner  r x K", BLUE)
    p.text(376, 96, "the r directions of the weighted", "start")
    p.text(376, 113, "outputs with the most variance", "start")
    p.text(590, 22, "what each direction loses", "start")
    for i, height in enumerate((92, 66, 48, 30, 20, 12, 8, 5)):
        p.box(594 + 19 * i, 142 - height, 15, height, "", BLUE if i < 4 else RED)
    p.text(632, 162, "bought")
    p.text(708, 162, "lost")
    p.text(
        10,
        188,
        "one price for a direction's N + K numbers, in all Linears: red sums, on the scale of the model's loss, are the least",
        "start",
    )
    return p


def structured() -> Picture:
    p = Picture(760, 210)
    p.text(10, 22, "A channel of an MLP: a row of those that write it, a column of the one that reads it", "start")
    for i in range(6):
        gone = i in (1, 4)
        p.box(40, 44 + 22 * i, 130, 18, "", RED if gone else BLUE)
        p.box(190, 44 + 22 * i, 130, 18, "", RED if gone else BLUE)
        p.box(470 + 28 * i, 50, 22, 110, "", RED if gone else GOLD)
    p.text(105, 196, "gate")
    p.text(255, 196, "up")
    p.arrow(330, 105, 455, 105, "act(gate) · up")
    p.text(554, 196, "down: what stays is solved again")
    return p


def streaming() -> Picture:
    p = Picture(760, 230)
    p.text(10, 22, "One block of the model is in memory at a time", "start")
    for i in range(3):
        p.box(10, 44 + 48 * i, 120, 38, f"block {i} of SRC", GREY)
    p.arrow(130, 111, 200, 111, "read")
    p.box(200, 78, 170, 66, "block in memory:\ncalibrate, compress", BLUE)
    p.arrow(370, 111, 450, 111, "write")
    p.box(450, 44, 160, 38, "file of block 0", GOLD)
    p.box(450, 92, 160, 38, "file of block 1", GOLD)
    p.box(450, 140, 160, 38, "manifest (SHA-256)", RED)
    p.arrow(610, 111, 660, 111)
    p.box(660, 88, 85, 46, "OUT", GOLD)
    p.arrow(285, 144, 285, 186)
    p.box(170, 186, 230, 34, "hidden states for the next block", GREY)
    return p


def house() -> Picture:
    floors = (
        ("commands", "cli, evaluate, benchmarks", GREY),
        ("compression", "methods, solver, statistics, jobs", GOLD),
        ("models", "swap, integrations, loading, parallel", GOLD),
        ("public views, layers", "functional, nn, layers of packed layers", BLUE),
        ("back ends", "reference, cpu, cuda, triton: rows of kernels and layouts", RED),
        ("formats, experts", "one file per kind: structure, weight, reference decode, layer", BLUE),
        ("packing", "packing without data, losses, structures, k-means, transport", BLUE),
        ("operations", "schemas, gradients, layouts, the table of kernels", BLUE),
        ("kernels", "csrc (no Python, no torch), triton_kernels", RED),
    )
    p = Picture(760, 30 + 44 * len(floors))
    for i, (name, what, fill) in enumerate(floors):
        y = 12 + 44 * i
        p.box(10, y, 170, 32, name, fill)
        p.text(195, y + 21, what, "start")
        if i:
            p.arrow(95, y - 12, 95, y)
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    "codebook-tables": codebook_tables,
    "codebook-decode": codebook_decode,
    "codebook-cuda": codebook_cuda,
    "triton-layout": triton_layout,
    "sparse-cells": sparse_cells,
    "kmeans-intervals": kmeans_intervals,
    "sinkhorn-pass": sinkhorn_pass,
    "softmax-distances": softmax_distances,
    "column-sweep": column_sweep,
    "column-codebook": column_codebook,
    "pruning-sweep": pruning_sweep,
    "low-rank": low_rank,
    "structured": structured,
    "streaming": streaming,
    "house": house,
}

if __name__ == "__main__":
    for name, picture in PICTURES.items():
        (Path(__file__).parent / "img" / f"{name}.svg").write_text(picture().svg(), encoding="utf-8")
