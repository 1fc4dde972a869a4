"""Which rows of the C++ half serve each operation, by instruction set: what `pyllmq doctor` prints. The choices themselves stand
in csrc/<operation>/cpu/."""

from __future__ import annotations

_FEW, _MORE, _WHOLE = "codebook, few tokens", "codebook, more tokens", "codebook, decoded"
_SPARSE, _OTHERS, _PLAIN = "sparse", "Sinkhorn, distances, k-means, decode steps", "codes, chosen rows, training"
_BOTH_WAYS = ("sinkhorn", "doubly_stochastic", "softmax_cdist_l1")
_FORMATS = ("bitmap", "sparse24", "sparse24_codebook")

ROWS_OF: dict[str, tuple[str, ...]] = {
    _FEW: ("codebook_linear", "routed_experts"),
    _MORE: ("codebook_linear", "routed_experts"),
    _WHOLE: ("codebook_dequantize",),
    _SPARSE: tuple(f"{kind}_{op}" for kind in _FORMATS for op in ("linear", "dequantize")),
    _OTHERS: (
        *(f"{op}{way}" for op in _BOTH_WAYS for way in ("", "_backward")),
        *(f"kmeans_1d{what}{where}" for what in ("", "_errors") for where in ("", "_moved")),
        "fit_columns",
    ),
    _PLAIN: (
        *("pack_codes", "unpack_codes", "codebook_rows"),
        *("codebook_gradient", "decode_checkpoint", "decode_checkpoint_and_matmul"),
    ),
}
"""What `pyllmq doctor` prints on one line -> the rows of dispatch, without "cpu.", that run it."""


def _served(vectors: str, more: str, sparse: str = "") -> dict[str, str]:
    """A processor's best vectors serve all but what is said otherwise."""
    best = {_FEW: vectors, _MORE: f"{vectors} {more}", _WHOLE: vectors, _SPARSE: vectors + sparse, _OTHERS: vectors}
    return best | {_PLAIN: "scalar, as on every processor"}


SERVED: dict[str, dict[str, str]] = {
    "amx": _served("avx512", "", ", bf16 in amx") | {_MORE: "amx, exact in avx512 fp32"},
    "avx512": _served("avx512", "int16, exact in fp32, fast in int8"),
    "avx_vnni": _served("avx2", "int16 by vpdpwssd, exact in fp32, fast in int8 by vpdpbusd"),
    "avx2": _served("avx2", "int16, exact in fp32, fast in int8 by vpmaddubsw"),
    "neon_i8mm": _served("neon", "fp32, fast in int8 by smmla"),
    "neon_dotprod": _served("neon", "fp32, fast in int8 by sdot"),
    "neon": _served("neon", "fp32"),
    "scalar": _served("scalar", "fp32"),
}
"""By the name that `_cpu.isa()` gives: line -> instruction set."""

FASTER = {
    "amx": "nothing that is written here",
    "avx512": "a processor with AMX (Sapphire Rapids or later) for many tokens",
    "avx_vnni": "a processor with AVX-512 VBMI and VNNI (Zen 4, Sapphire Rapids or later)",
    "avx2": "a processor with AVX-512 VBMI and VNNI (Ice Lake, Zen 4 or later); with AVX-VNNI (Alder Lake) for many tokens",
    "neon_i8mm": "nothing that is written here; no time was ever measured on ARM",
    "neon_dotprod": "a processor with i8mm (Neoverse V1, N2, Apple M2 or later) for many tokens with precision='fast'",
    "neon": "a processor with dot product (Cortex-A75, Neoverse N1 or later) for many tokens with precision='fast'",
    "scalar": "a processor with AVX2, FMA and F16C, or 64-bit ARM: 20 times",
}
